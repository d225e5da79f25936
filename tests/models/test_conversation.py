"""A spoken question is heard, answered by the bare text tower, and the answer spoken."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny_recipes import say, tiny_recipe, workshop

from zipper_lm import ZipperModel
from zipper_lm.data.document import Document
from zipper_lm.generation.bare import chat_prompt, write_greedily
from zipper_lm.jobs.towers import build_model
from zipper_lm.models.conversation import answer_aloud, check_can_talk, in_pieces

SETTINGS = {"text": {"min_new_tokens": 3, "max_new_tokens": 3}, "speech": {"min_new_tokens": 8, "max_new_tokens": 8}}
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}<s>"


@pytest.fixture(scope="module")
def talker() -> ZipperModel:
    recipe = tiny_recipe(workshop() / "unused", zips=[{"layers": 2, "gate_start": 1.0}])
    model: Any = build_model(recipe)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # it says something
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.processor.codecs["text"].tokenizer.chat_template = TEMPLATE
    return model.eval()


def test_the_answer_is_the_bare_towers_own(talker: ZipperModel) -> None:
    """And what is spoken is the answer, piece by piece, whatever zips the tower has."""
    question = say("one two")
    turn = answer_aloud(talker, question, system="six", tokens=12, longest=6, settings=SETTINGS)
    heard = talker.generate(Document([("speech", question)]), ["text"], settings=SETTINGS)[-1].value
    assert turn.heard == heard.strip()
    codec, backbone = check_can_talk(talker), talker.backbones()["text"]
    asked = [{"role": "system", "content": "six"}, {"role": "user", "content": turn.heard}]
    assert turn.answer == write_greedily(backbone, codec, [chat_prompt(codec, asked)], 12)[0]
    with torch.no_grad():
        ids = torch.tensor([chat_prompt(codec, asked)])
        first = int(backbone(input_ids=ids).logits[0, -1].argmax())
    assert turn.answer.startswith(codec.decode([[first]])[0].strip())
    assert " ".join(turn.spoken).replace(" ", "") == turn.answer.replace(" ", "")
    assert len(turn.spoken) > 1
    said = talker.generate([Document([("text", p)]) for p in turn.spoken], ["speech"], settings=SETTINGS)
    pauses = (len(said) - 1) * 2400
    assert len(turn.sound) == sum(len(d[-1].value) for d in said) + pauses
    np.testing.assert_array_equal(turn.sound[: len(said[0][-1].value)], said[0][-1].value)


def test_an_answer_without_words_is_silence(talker: ZipperModel) -> None:
    turn = answer_aloud(talker, say("one"), tokens=4, written_as=lambda _: "", settings=SETTINGS)
    assert (turn.spoken, turn.sound.shape, turn.sound.dtype) == ([], (0,), np.float32)


def test_who_cannot_talk(talker: ZipperModel) -> None:
    single = build_model(tiny_recipe(workshop() / "unused", architecture="single-decoder"))
    with pytest.raises(ValueError, match="a single decoder cannot be asked as itself"):
        check_can_talk(single)
    with pytest.raises(ValueError, match=r"needs towers 'text' and 'sound'; it has no \['sound'\]"):
        check_can_talk(talker, speech="sound")
    one_way = build_model(
        tiny_recipe(workshop() / "unused", zips=[{"reader": "text", "source": "speech", "layers": 2}])
    )
    with pytest.raises(ValueError, match="each tower must read the other"):
        check_can_talk(one_way)
    plain = build_model(tiny_recipe(workshop() / "unused"))
    with pytest.raises(ValueError, match="its tokenizer has no chat template"):
        check_can_talk(plain)
    plain.processor.codecs["text"].tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(ValueError, match="chat template: no system"):
        answer_aloud(plain, say("one"), settings=SETTINGS)  # type: ignore[arg-type]


def test_pieces_end_where_sentences_and_phrases_do() -> None:
    text = "It is Paris. The city lies on the Seine, which is a river; many people live there!\nYes"
    assert in_pieces(text, 40) == [
        "It is Paris.",
        "The city lies on the Seine,",
        "which is a river;",
        "many people live there!",
        "Yes",
    ]
    assert all(len(piece) <= 12 for piece in in_pieces(text, 12))
    assert " ".join(in_pieces(text, 12)).split() == text.split()
    assert in_pieces("incomprehensibilities are", 10) == ["incomprehensibilities", "are"]
    assert in_pieces("  \n ", 10) == []
