"""Tars of samples: opened as data, and every row is read."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from fuzz.octets import changing, mend_tar
from fuzz.target import Target
from tiny_served import sound_file

from zipper_lm.data.sources.readers import read_rows


def make() -> Target:
    """In each of the forms that tars have, with links, folders and long names."""
    seeds = [_tar(form) for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]
    seeds.append(_tar(tarfile.PAX_FORMAT, small=True))
    change = changing(seeds, mend_tar)
    instrument = ("zipper_lm.data", "zipper_lm.utils.json_files", "tarfile")
    return Target(name="tars", run=run, share=170, seeds=seeds, change=change, instrument=instrument)


def run(data: bytes, folder: Path) -> None:
    """As `data.source` names one."""
    (file := folder / "train.tar").write_bytes(data)
    rows = read_rows(file)
    for number in range(min(len(rows), 50)):
        rows[number]
    rows.column("text")
    rows.fingerprint()


def _tar(form: int, small: bool = False) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        files = [("0.wav", sound_file(seconds=0.01)), ("0.txt", b"one"), ("0.json", b'{"speaker": "kim", "n": [1]}')]
        for name, content in files if not small else files[1:]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if form == tarfile.PAX_FORMAT:
                info.pax_headers = {"comment": "x", "mtime": "1.5"}
            archive.addfile(info, io.BytesIO(content))
        if not small:
            for kind, name in ((tarfile.SYMTYPE, "1.wav"), (tarfile.LNKTYPE, "2.wav"), (tarfile.DIRTYPE, "../3")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, "../secret.wav"
                archive.addfile(info)
            info = tarfile.TarInfo("long" * 12 + "/" + "n" * 80 + ".txt")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"two"))
    return out.getvalue()
