"""How much one client may ask for, and how much all of them may together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from zipper_lm.codecs.audio import MAX_SECONDS

ROOM_FOR_FIELDS = 1 << 16
"""Bytes of a request beside its file."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
        upload: bytes of one file. seconds: of one sound. samples: of all channels of one, before they are averaged.
        pixels: of one picture. characters: of a text that is to be spoken. text: characters of all texts of a request.
        ids: token ids that a request gives, or comes to. tokens: that one segment may be let grow to.
        segments: of one document, given and written. documents: that wait or are written, of all clients together.
        connections: open at once. stall: seconds that a client may take to send or read the next piece. body: seconds
            that all of a request may take to come.
        messages: bytes of one message of a websocket. idle: seconds for which one may say nothing. faults: messages
            of one that cannot be followed.
    """

    upload: int = 25 << 20
    seconds: float = MAX_SECONDS
    samples: int = 1 << 25
    pixels: int = 1 << 24
    characters: int = 4096
    text: int = 100_000
    ids: int = 16_384
    tokens: int = 2048
    segments: int = 64
    documents: int = 128
    connections: int = 1024
    stall: float = 30.0
    body: float = 300.0
    messages: int = 1 << 22
    idle: float = 900.0
    faults: int = 100

    def __post_init__(self) -> None:
        for field in fields(self):
            if not (value := getattr(self, field.name)) > 0:
                raise ValueError(f"limits: {field.name} must be positive, got {value!r}")
        if self.seconds > MAX_SECONDS:
            raise ValueError(f"limits: seconds must be at most {MAX_SECONDS:g}, got {self.seconds:g}")
