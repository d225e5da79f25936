"""Files of sound, in every container that is read."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import soundfile
from fuzz.octets import blind, mend_ogg
from fuzz.target import Target
from tiny_served import voice

from zipper_lm.codecs.audio import read_audio

FORMS = (
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAVEX", "PCM_24"), ("RF64", "PCM_16"), ("W64", "PCM_16")),
    *(
        ("AIFF", "PCM_16"),
        ("AU", "PCM_16"),
        ("CAF", "PCM_16"),
        ("CAF", "ALAC_16"),
        ("FLAC", "PCM_16"),
        ("NIST", "PCM_16"),
    ),
    *(
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", "MPEG_LAYER_III"),
        ("WAV", "IMA_ADPCM"),
        ("WAV", "GSM610"),
        ("VOC", "PCM_16"),
    ),
)


def make() -> Target:
    """Of a twentieth of a second in each form."""
    seeds = [_file(form, subtype) for form, subtype in FORMS]

    def change(data: bytes, draw: Random) -> bytes:
        new = blind(data, draw, seeds)
        return mend_ogg(new) if draw.random() < 0.8 else new

    instrument = ("zipper_lm.codecs", "soundfile")
    return Target(name="sounds", run=run, share=260, seeds=seeds, change=change, instrument=instrument)


def run(data: bytes, folder: Path) -> None:
    """From bytes; what is a path goes the same way."""
    read_audio(data)


def _file(form: str, subtype: str) -> bytes:
    out = io.BytesIO()
    rate = 16_000 if subtype != "GSM610" else 8000
    soundfile.write(out, voice(0.05, rate=rate), rate, format=form, subtype=subtype)
    return out.getvalue()
