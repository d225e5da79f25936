"""A tower by itself is the backbone it was, also in an engine that writes documents with it."""

from typing import Any

import pytest
import torch
from tiny import doc, often_ending, tiny_model

from zipper_lm import Engine, ZipperModel

PROMPTS = [[4], [9, 8, 7, 6, 5, 4, 3], [0, 5, 5, 1, 0, 6, 6, 7]]
SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 9, "seed": 5}


def lively(**kwargs: Any) -> ZipperModel:
    return often_ending(tiny_model(gate=1.0, **kwargs)).eval()


def expected(model: ZipperModel, name: str, ids: list[int], most: int) -> list[int]:
    """Greedy, by the backbone itself, over the whole of its ids each time."""
    backbone, special, grown = model.tower(name).backbone, model.specials[name], list(ids)
    for _ in range(most):
        logits = backbone(input_ids=torch.tensor([grown])).logits[0, -1]
        logits[[special.bos, special.pad]] = -torch.inf
        if (token := int(logits.argmax())) == special.eos:
            break
        grown.append(token)
    return grown[len(ids) :]


@pytest.mark.parametrize("kind", ["llama", "mistral", "mamba"])
@torch.no_grad()
def test_it_goes_on_as_the_backbone_does(kind: str) -> None:
    """Also where its step is not captured; prompts are read in chunks of five, beside a document of the same tower."""
    model = lively(kinds={"text": kind})
    with Engine(model, slots=3, compile=False, chunk=5) as engine:
        other = engine.submit(doc(("speech", [5, 6, 7])), ["text"], {"text": {"max_new_tokens": 12}})
        told: list[int] = []
        handles = [engine.submit_alone("text", ids, {"max_new_tokens": 9}) for ids in PROMPTS]
        last = engine.submit_alone("text", [7, 8], {"max_new_tokens": 9}, on_token=lambda token: told.append(token.id))
        for ids, handle in zip(PROMPTS, handles):
            document = handle.result()
            assert [s.ids for s in document] == [ids, expected(model, "text", ids, 9)]
            assert [token.id for token in handle] == document[1].ids
        assert last.result()[1].ids == told == expected(model, "text", [7, 8], 9)
        plain = model.generate(doc(("speech", [5, 6, 7])), ["text"], settings={"text": {"max_new_tokens": 12}})
        assert other.result()[-1].ids == plain[-1].ids


def test_a_seed_draws_the_same_on_both_paths() -> None:
    model = lively()
    with Engine(model, slots=2, compile=False) as engine:
        step = engine.submit_alone("text", [5, 6], {"max_new_tokens": 9, **SAMPLED}).result()[1].ids
        again = engine.submit_alone("text", [5, 6], {"max_new_tokens": 9, **SAMPLED}).result()[1].ids
        how = {"max_new_tokens": 9, **SAMPLED, "renormalize_logits": True}  # which the step does not follow
        assert step == again == engine.submit_alone("text", [5, 6], how).result()[1].ids


def test_what_is_refused() -> None:
    with Engine(lively(), slots=2, compile=False, tokens=16) as engine:
        for name, ids, how, words in (
            ("text", [], {}, "no ids"),
            ("text", [99], {}, "99"),
            ("dna", [1], {}, "dna"),
            ("text", [5], {"guidance_scale": 2.0}, "guidance_scale"),
            ("text", [5], {"num_return_sequences": 2, "do_sample": True}, "one sample"),
            ("text", [5] * 10, {"max_new_tokens": 9}, "tokens=16"),
        ):
            with pytest.raises(ValueError, match=words):
                engine.submit_alone(name, ids, how)
