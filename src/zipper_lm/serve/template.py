"""A chat as a text tower was trained to read it: by its tokenizer's own template, whose marks no message can forge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from zipper_lm.serve.errors import Refusal

_PLACE = "\ue000{}\ue001"  # of the private use area: no template has it
_PLACES = re.compile("\ue000([0-9]+)\ue001")


def chat_ids(codec: Any, messages: Sequence[Mapping[str, str]], name: str) -> list[int]:
    """The ids of a chat, up to where the answer begins.

    Args:
        codec: the text tower's. messages: each with a role and a content. name: of the model, for messages.

    Raises:
        Refusal: if the tokenizer has no template, or the template does not take these messages.
    """
    tokenizer = codec.tokenizer
    if not tokenizer.chat_template:
        raise Refusal(
            400,
            f"the text tower of {name} has no chat template: it cannot answer text alone; send sound with it, or use "
            "/v1/documents",
            param="messages",
            code="no_chat_template",
        )
    try:
        codec.encode([m["content"] for m in messages])
    except ValueError as error:  # characters that the tokenizer lacks would be lost without a word
        raise Refusal(400, f"messages: {error}", param="messages", code="invalid_value") from error
    specials = [token for token in tokenizer.all_special_tokens if token]
    if not any(token in m["content"] for m in messages for token in specials):
        return list(tokenizer(_rendered(tokenizer, messages), add_special_tokens=False)["input_ids"])
    # A text that spells a special token is only text: what the template says is encoded apart from what messages say.
    places = [{**m, "content": _PLACE.format(number)} for number, m in enumerate(messages)]
    ids: list[int] = []
    for part, text in enumerate(_PLACES.split(_rendered(tokenizer, places))):
        said = part % 2 == 1
        value = messages[int(text)]["content"] if said else text
        ids += tokenizer(value, add_special_tokens=False, split_special_tokens=said)["input_ids"]
    return ids


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:  # of any kind: what a template says of messages that it does not take
        raise Refusal(
            400,
            f"the chat template does not take these messages: {str(error)[:200]}",
            param="messages",
            code="invalid_value",
        ) from error
