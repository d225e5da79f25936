"""Sound files whose header does not say how long they are, or says more than is there.

Who writes to a pipe cannot go back to put the length into the header: there stays nothing, all ones, or about the most
that a field holds. libsndfile takes some of these for the end of the file and some for no sound at all; and of a file
that was cut off it reads what there is, without a word. `with_true_length` looks at the field itself.

The forms: WAV and AIFF (IFF, EA 1985), RF64 (EBU Tech 3306), Wave64 (Sony), CAF (Apple), AU (Sun). FLAC needs no field:
its frames are read until none is left.
"""

from __future__ import annotations

import io
import os
import string
import struct
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

_UNSPOKEN = {4: 0x7E00_0000, 8: 1 << 62}
"""By bytes of a field: from here on it says nothing. The least that is seen for 4 is 0x7F000000, less what makes it a
multiple of a frame; that is two hours of the densest sound there is."""
_LETTERS = frozenset(string.printable.encode())


class _Form(NamedTuple):
    """How a container lays out its chunks."""

    header: str  # struct of a chunk's name and length
    begins: int  # first byte of the first chunk
    sound: bytes  # start of the name of the chunk that holds the sound
    ahead: int = 0  # bytes of that chunk in front of the sound
    aligned: int = 2
    counts_header: bool = False  # whether a length counts the chunk's name and length too


_FORMS = {
    b"RIFF": _Form("<4sI", 12, b"data"),
    b"RIFX": _Form(">4sI", 12, b"data"),
    b"RF64": _Form("<4sI", 12, b"data"),
    b"FORM": _Form(">4sI", 12, b"SSND", ahead=8),
    b"caff": _Form(">4sQ", 8, b"data", ahead=4, aligned=1),
    b"riff": _Form("<16sQ", 40, b"data", aligned=8, counts_header=True),
}


class _Chunk(NamedTuple):
    name: bytes
    body: int  # first byte behind its length
    length: int  # of the body


class _Field(NamedTuple):
    """Where a file says how many bytes of sound it holds."""

    at: int
    form: str  # its struct
    beside: int  # bytes that it counts and that are no sound
    start: int  # first byte of the sound


def with_true_length(file: BinaryIO, name: str) -> BinaryIO:
    """The file, if it says how long it is or is of another form than those above; else one with the length in place.

    Args:
        file: sound, open for reading; wherever it stands. name: of it, for messages.

    Raises:
        ValueError: if the file says how long it is, and is cut off before that.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    magic = file.read(4)
    form = _FORMS.get(magic)
    field = _au_field(file, magic) if form is None else _chunk_field(file, size, form, magic)
    if field is None or field.at + struct.calcsize(field.form) > size:
        return file
    file.seek(field.at)
    (said,) = struct.unpack(field.form, file.read(struct.calcsize(field.form)))
    promised, there = said - field.beside, max(0, size - field.start)
    if 0 < promised < _UNSPOKEN[struct.calcsize(field.form)] and there < promised:
        raise ValueError(f"{name}: the file is cut off: {there} of {promised} bytes of sound are there")
    if there == 0 or 0 < promised <= there:
        return file
    if promised <= 0 and form is not None and _chunks_to_the_end(file, size, form, field.start):
        return file  # there is no sound in it
    most = (1 << 8 * struct.calcsize(field.form)) - 1
    mended = struct.pack(field.form, min(there + field.beside, most))
    return cast(BinaryIO, _Mended(file, field.at, mended))


def _chunk_field(file: BinaryIO, size: int, form: _Form, magic: bytes) -> _Field | None:
    own = None
    for chunk in _chunks(file, size, form, form.begins):
        if magic == b"RF64" and chunk.name == b"ds64":
            own = chunk.body + 8  # behind the file's length
        if chunk.name.startswith(form.sound):
            if own is not None:
                return _Field(own, "<Q", 0, chunk.body)
            length = form.header[0] + form.header[-1]
            beside = form.ahead + struct.calcsize(form.header) * form.counts_header
            return _Field(chunk.body - struct.calcsize(length), length, beside, chunk.body + form.ahead)
    return None


def _au_field(file: BinaryIO, magic: bytes) -> _Field | None:
    order = {b".snd": ">", b"dns.": "<"}.get(magic)
    start = file.read(8)[:4]
    return None if order is None or len(start) < 4 else _Field(8, f"{order}I", 0, *struct.unpack(f"{order}I", start))


def _chunks(file: BinaryIO, size: int, form: _Form, position: int) -> Iterator[_Chunk]:
    header = struct.calcsize(form.header)
    while position + header <= size:
        file.seek(position)
        name, length = struct.unpack(form.header, file.read(header))
        length = max(0, length - header * form.counts_header)
        yield _Chunk(name, position + header, length)
        position += header + length
        position += -position % form.aligned


def _chunks_to_the_end(file: BinaryIO, size: int, form: _Form, position: int) -> bool:
    """Whether nothing but whole chunks follows, so that what is there is no sound."""
    chunk = None
    for chunk in _chunks(file, size, form, position):
        if not _LETTERS.issuperset(chunk.name[:4]):
            return False
    return chunk is not None and size - 1 <= chunk.body + chunk.length <= size


class _Mended(io.RawIOBase):
    """A file, read with other bytes in one place."""

    def __init__(self, file: BinaryIO, at: int, bytes_there: bytes) -> None:
        self._file, self._at, self._bytes = file, at, bytes_there

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        begin = self._file.tell()
        read = self._file.read(len(view))
        view[: len(read)] = read
        for place, byte in enumerate(self._bytes, self._at - begin):
            if 0 <= place < len(read):
                view[place] = byte
        return len(read)
