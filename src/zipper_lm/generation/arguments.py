"""What a call may be given, in full or in a short form, checked before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from transformers import GenerationConfig

from zipper_lm.data.document import Document, Segment, as_segment, check_modalities
from zipper_lm.generation.candidates import samples_of
from zipper_lm.generation.settings import generation_config
from zipper_lm.generation.writer import Modalities

TEXT = "text"
"""The modality that a string is of."""

Given: TypeAlias = Document | Segment | str | tuple[str, Any]
"""One document: itself, its only segment, a text, or ``(modality, value)``."""
Schedule: TypeAlias = str | Sequence[str | Segment | tuple[str, Any]]
Settings: TypeAlias = Mapping[str, Mapping[str, Any] | GenerationConfig] | GenerationConfig


def documents_in(given: Given | Sequence[Given | Sequence[Segment | tuple[str, Any]]]) -> tuple[list[Document], bool]:
    """Documents, and whether there was one that was no list of them.

    Args:
        given: one document, or a list of them, in which a list of segments is a document, too.

    Raises:
        ValueError: for anything else.
    """
    if _is_one(given):
        return [_document(given)], True
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise ValueError(
            "documents must be a Document, a text, (modality, value) or a list of these, "
            f"got {type(given).__name__}: {given!r:.80}"
        )
    return [_document(entry) for entry in given], False


def _is_one(given: Any) -> bool:
    return isinstance(given, Document | Segment | str) or (
        isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str)
    )


def _document(given: Any) -> Document:
    if isinstance(given, Document):
        return given
    if isinstance(given, str):
        return Document([Segment(TEXT, given)])
    return Document([as_segment(given)] if _is_one(given) else given)


def checked_settings(
    model: Modalities, settings: Settings | None, flat: Mapping[str, Any] | None = None
) -> dict[str, GenerationConfig]:
    """Settings by modality.

    Args:
        settings: by modality, or a config for all; `None`: those kept beside the model. flat: of every modality. They
            win over kept settings; what `settings` says of a modality wins over them.

    Raises:
        ValueError: for an unknown modality or setting, or flat settings beside a whole config.
    """
    kept, flat = settings is None, dict(flat or {})
    if settings is None:
        settings = model.generation_settings
    elif isinstance(settings, GenerationConfig):
        settings = dict.fromkeys(model.names, settings)
    elif not isinstance(settings, Mapping):
        raise ValueError(f"settings must be given by modality, got {type(settings).__name__}: {settings!r:.80}")
    if unknown := sorted(str(name) for name in set(settings) - set(model.names)):
        raise ValueError(f"settings name {unknown}, but the towers are {model.names}")
    chosen = {}
    for name in model.names if flat else settings:
        own = settings.get(name)
        if flat and isinstance(own, GenerationConfig):
            raise ValueError(f"settings for {name!r} are a GenerationConfig: {sorted(flat)} belong there")
        if flat and (own is None or isinstance(own, Mapping)):
            own = {**(own or {}), **flat} if kept else {**flat, **(own or {})}
        chosen[name] = generation_config(name, own, model.specials.get(name))
    return chosen


def checked_schedule(model: Modalities, schedule: Schedule) -> list[str | Segment] | None:
    """What comes next, given segments with ids; `None` if the model says it.

    Raises:
        ValueError: for an unknown modality, nothing, or "auto" where nobody learned it.
    """
    if isinstance(schedule, str) and schedule == "auto":
        if getattr(model.config, "handover_weight", None) == 0:
            raise ValueError('schedule="auto": this model never learned who speaks next (handover_weight 0); name it')
        return None
    listed: Any = [schedule] if isinstance(schedule, str) else schedule
    if not isinstance(listed, Sequence) or not listed:
        raise ValueError(f'schedule must be "auto", a modality or a non-empty list of modalities, got {schedule!r}')
    try:
        entries = [entry if isinstance(entry, str) else as_segment(entry) for entry in listed]
    except ValueError as error:
        raise ValueError(f"schedule: {error}") from error
    for entry in entries:
        name = entry.modality if isinstance(entry, Segment) else entry
        if name not in model.names:
            raise ValueError(f"schedule names {name!r}, but the towers are {model.names}")
    given = [e for e in entries if isinstance(e, Segment)]
    coded = iter(encode_given(model, [Document(given)])[0]) if given else iter(())
    return [next(coded) if isinstance(e, Segment) else e for e in entries]


def check_streamed(documents: Sequence[Document], settings: Mapping[str, GenerationConfig]) -> None:
    """Raise `ValueError` for what has no single stream of tokens."""
    if len(documents) != 1:
        raise ValueError(f"tokens can be streamed for one document at a time, got {len(documents)}")
    for name, given in settings.items():
        if samples_of(given) > 1:
            raise ValueError(f"settings for {name!r}: the tokens of {samples_of(given)} samples cannot be streamed")


def encode_given(model: Modalities, documents: Sequence[Document]) -> list[Document]:
    """Copies with ids in every segment, each id in its tower's vocabulary."""
    encoded = _with_ids(model, documents)
    for document in encoded:
        for segment in document:
            model.check_ids(segment.modality, min(segment.ids or [0]), max(segment.ids or [0]))
    return encoded


def _with_ids(model: Modalities, documents: Sequence[Document]) -> list[Document]:
    if model.processor is not None:
        return model.processor.encode(documents)
    copies = [Document(replace(s) for s in d) for d in documents]
    check_modalities(copies, model.names)
    for number, document in enumerate(copies):
        for segment in document:
            if segment.ids is None:
                raise ValueError(
                    f"document {number}: {segment.modality} has a raw value, but the model has no processor"
                )
    return copies
