"""Settings of a modality, in a vocabulary where its ids stand behind others."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, tiny_backbone
from transformers import RobertaConfig, RobertaForCausalLM

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import collate
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder


class Ids:
    """A codec of ids that stand for themselves; BOS, EOS and PAD are three of them."""

    kind, rate = "ids", None

    def __init__(self, size: int, first_special: int) -> None:
        self.vocab_size = size
        self.bos_id, self.eos_id, self.pad_id = range(first_special, first_special + 3)

    def encode(self, values: list) -> list:
        return [list(v) for v in values]


def single() -> SingleDecoder:
    torch.manual_seed(0)
    codecs: dict[str, Any] = {"text": Ids(31, 0), "speech": Ids(20, 17)}
    model = expand("text", tiny_backbone("llama", 31), codecs)
    model.processor = None
    return model


GIVEN = [doc(("text", [7, 8])), doc(("speech", [3, 4]), ("text", [9]))]


@pytest.mark.parametrize(
    "settings",
    [
        {"suppress_tokens": [1, 6]},
        {"begin_suppress_tokens": list(range(10))},
        {"bad_words_ids": [[i] for i in range(8)]},
        {"sequence_bias": [[[i], -100.0] for i in range(8)]},
        {"sequence_bias": {(i,): -100.0 for i in range(8)}},
    ],
    ids=lambda s: next(iter(s)),
)
def test_ids_in_settings_are_the_modalitys(settings: dict[str, Any]) -> None:
    """All but suppress_tokens meant ids of the base modality, whatever modality was written."""
    model = single()
    plain = model.generate(GIVEN, ["speech"], settings={"speech": {"max_new_tokens": 8}})
    written = model.generate(GIVEN, ["speech"], settings={"speech": {"max_new_tokens": 8, **settings}})
    assert ids_of(written) != ids_of(plain)
    (field,) = settings
    if field != "begin_suppress_tokens":
        forbidden = {1, 6} if field == "suppress_tokens" else set(range(8))
        assert not forbidden & {i for d in written for i in d[-1].ids or []}
        assert forbidden & {i for d in plain for i in d[-1].ids or []}


def test_the_last_token_may_be_named() -> None:
    written = single().generate(GIVEN, ["speech"], settings={"speech": {"max_new_tokens": 4, "forced_eos_token_id": 6}})
    assert {d[-1].ids[-1] for d in written if len(d[-1].ids or []) == 4} == {6}


def test_stop_strings() -> None:
    codec, model = TextCodec.train(["three one four one five"] * 4, vocab_size=31), single()
    model.processor = SimpleNamespace(codecs={"text": codec}, encode=copy.deepcopy)  # type: ignore[assignment]
    given = [doc(("speech", [3, 4, 5]))]
    plain = model.generate(given, ["text"], settings={"text": {"max_new_tokens": 9}}, decode=False)[0][-1].ids
    settings = {"max_new_tokens": 9, "stop_strings": codec.decode([plain[:4]])}
    stopped = model.generate(given, ["text"], settings={"text": settings}, decode=False)[0][-1].ids
    assert len(stopped) <= 4 < len(plain)
    assert stopped == plain[: len(stopped)]
    with pytest.raises(ValueError, match="'speech': stop_strings needs a codec of text"):
        model.generate(given, ["speech"], settings={"speech": settings}, decode=False)


def test_a_decoder_that_does_not_write_what_it_reads_is_refused() -> None:
    """RoBERTa and its kin count positions of the tokens that they are handed: from the second on, what the single
    decoder wrote was wrong, without a word. A tower of that kind was refused."""
    torch.manual_seed(0)
    codecs: dict[str, Any] = {"text": Ids(31, 0), "speech": Ids(20, 17)}
    config = RobertaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        is_decoder=True,
        pad_token_id=1,
    )
    model = expand("text", RobertaForCausalLM(config), codecs)
    model.processor = None
    assert model(collate([doc(("text", [7, 8]), target=True)], model.specials)).loss is not None
    with pytest.raises(ValueError, match="can be read, but not written with"):
        model.generate([doc(("text", [7, 8]))], ["speech"])


def test_a_cache_that_does_not_hold_is_not_used() -> None:
    model = single()
    wanted = ids_of(model.generate(GIVEN, ["speech"], settings={"speech": {"max_new_tokens": 6}}))
    model.interface = replace(model.interface, cache=None, writing="uncached")
    seen: list[bool] = []
    model.backbone.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
    assert ids_of(model.generate(GIVEN, ["speech"], settings={"speech": {"max_new_tokens": 6}})) == wanted
    assert seen
    assert not any(seen)
