"""Changes of bytes: blind ones, and what mends the checksums and lengths that would give every one of them away."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random

NOTABLE = (0, 1, 2, 3, 7, 8, 16, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 1)
MOST = 1 << 16
"""Bytes of an input: headers are what is tried."""


def blind(data: bytes, draw: Random, others: Sequence[bytes] = ()) -> bytes:
    """One to four changes anywhere, more of them near the front."""
    new = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = min(len(new), int(draw.random() ** draw.choice((1, 3)) * (len(new) + 1)))
        way = draw.randrange(8)
        if way == 0 and new:
            new[min(at, len(new) - 1)] ^= 1 << draw.randrange(8)
        elif way == 1:
            new[at : at + 1] = bytes([draw.randrange(256)])
        elif way in (2, 3):
            form = draw.choice(("<B", "<H", ">H", "<I", ">I", "<Q", ">Q"))
            size = struct.calcsize(form)
            new[at : at + size] = struct.pack(form, draw.choice(NOTABLE) & (1 << 8 * size) - 1)
        elif way == 4:
            del new[at : at + draw.choice((1, 2, 4, 16, 512))]
        elif way == 5:
            new[at:at] = new[at : at + draw.choice((1, 4, 16, 512))]
        elif way == 6 and others:
            other = draw.choice(list(others))
            start = draw.randrange(len(other) + 1)
            new[at : at + draw.choice((4, 64, 512))] = other[start : start + draw.choice((4, 64, 512))]
        else:
            new = new[:at] if draw.random() < 0.3 else new + bytes(draw.randrange(256) for _ in range(4))
    return bytes(new[:MOST])


def changing(seeds: Sequence[bytes], mend: Callable[[bytes], bytes]) -> Callable[[bytes, Random], bytes]:
    """`blind`, most often with what gives a change away put right."""

    def change(data: bytes, draw: Random) -> bytes:
        new = blind(data, draw, seeds)
        return mend(new) if draw.random() < 0.8 else new

    return change


def mend_png(data: bytes) -> bytes:
    """With the right checksum on every chunk."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    new, at = bytearray(data), 8
    while at + 12 <= len(new):
        (length,) = struct.unpack(">I", new[at : at + 4])
        if at + 12 + length > len(new):
            break
        new[at + 8 + length : at + 12 + length] = struct.pack(">I", zlib.crc32(new[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(new)


def mend_tar(data: bytes) -> bytes:
    """With the right checksum in every header, as far as sizes lead from one to the next."""
    new, at = bytearray(data), 0
    while at + 512 <= len(new) and any(new[at : at + 512]):
        new[at + 148 : at + 156] = b" " * 8
        new[at + 148 : at + 156] = b"%06o\0 " % sum(new[at : at + 512])
        try:
            size = int(bytes(new[at + 124 : at + 135]).strip(b" \0") or b"0", 8)
        except ValueError:
            size = 0
        at += 512 + (max(size, 0) + 511) // 512 * 512
    return bytes(new)


def mend_safetensors(data: bytes) -> bytes:
    """With the length of the header that is there: as far as the last closing brace."""
    end = data.rfind(b"}", 8) + 1
    return struct.pack("<Q", end - 8) + data[8:] if end > 8 else data


_OGG = [0] * 256
for _byte in range(256):
    _rest = _byte << 24
    for _ in range(8):
        _rest = (_rest << 1 ^ 0x04C11DB7 if _rest & 1 << 31 else _rest << 1) & 0xFFFFFFFF
    _OGG[_byte] = _rest


def mend_ogg(data: bytes) -> bytes:
    """With the right checksum on every page (RFC 3533, section 6)."""
    if data[:4] != b"OggS":
        return data
    new, at = bytearray(data), 0
    while new[at : at + 4] == b"OggS" and at + 27 <= len(new):
        table = new[at + 27 : at + 27 + new[at + 26]]
        end = at + 27 + len(table) + sum(table)
        if end > len(new):
            break
        new[at + 22 : at + 26] = bytes(4)
        rest = 0
        for byte in new[at:end]:
            rest = (rest << 8 & 0xFFFFFFFF) ^ _OGG[rest >> 24 ^ byte]
        new[at + 22 : at + 26] = struct.pack("<I", rest)
        at = end
    return bytes(new)
