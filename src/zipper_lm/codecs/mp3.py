"""MP3 files that do not say how long they are.

Whoever reads an MP3 file takes its length from the note in its first frame (Xing, Info or VBRI). libsndfile guesses it
from the bit rate of the first frame where there is none: of a file of varying bit rate that starts loud it reads a
fifth, and says nothing. `with_length` counts the frames and puts such a note in front.

Frame headers: http://www.mp3-tech.org/programmer/frame_header.html; the note:
https://www.codeproject.com/Articles/8295/MPEG-Audio-Frame-Header (section 2.3).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_KBITS = (  # by bits 12 to 15 of a header of layer III
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),  # MPEG 1
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),  # MPEG 2 and 2.5
)
_HZ = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
_ROOMY = 9  # 128 or 80 kbit/s: a frame that has room for the note


@dataclass(frozen=True)
class _Frame:
    version: int  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    mono: bool
    length: int  # in bytes

    @property
    def notes(self) -> tuple[int, int]:
        """Where a note may be: Xing or Info behind the side information, VBRI at a fixed place."""
        side = (17 if self.mono else 32) if self.version == 3 else (9 if self.mono else 17)
        return 4 + side, 4 + 32


def with_length(data: bytes) -> bytes:
    """The file with a note of its length in front, if it is MP3 without one; any other file as it is.

    Raises:
        ValueError: if the last frame is cut off.
    """
    start = _behind_tags(data)
    first = _frame(data, start)
    if first is None or any(data[start + at :][:4] in (b"Xing", b"Info", b"VBRI") for at in first.notes):
        return data
    count, position = 0, start
    while (frame := _frame(data, position)) is not None:
        position += frame.length
        if position > len(data):
            raise ValueError(f"the file is cut off within its last frame, after {count} whole ones")
        count += 1
    if count < 2:
        return data  # chance made it look like a frame
    (bits,) = struct.unpack(">I", data[start : start + 4])
    bits = (bits | 1 << 16) & ~(0xF << 12 | 1 << 9) | _ROOMY << 12  # no checksum, no padding
    header = struct.pack(">I", bits)
    note = _frame(header, 0)
    assert note is not None
    said = header.ljust(note.notes[0], b"\0") + b"Info" + struct.pack(">II", 1, count)
    return said.ljust(note.length, b"\0") + data[start:]


def _behind_tags(data: bytes) -> int:
    """Where sound begins: behind an ID3v2 tag, whose size has seven bits a byte (https://id3.org/id3v2.4.0-structure)."""
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0)))
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _frame(data: bytes, at: int) -> _Frame | None:
    """The frame of layer III whose header is there, if one is."""
    if at + 4 > len(data):
        return None
    (bits,) = struct.unpack(">I", data[at : at + 4])
    version, layer, rate = bits >> 19 & 3, bits >> 17 & 3, bits >> 10 & 3
    kbits = _KBITS[version != 3][bits >> 12 & 15]
    if bits >> 21 != 0x7FF or version == 1 or layer != 1 or rate == 3 or kbits == 0:
        return None
    bytes_a_frame = (144 if version == 3 else 72) * kbits * 1000 // _HZ[version][rate]
    return _Frame(version, (bits >> 6 & 3) == 3, bytes_a_frame + (bits >> 9 & 1))
