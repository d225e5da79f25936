"""How a backbone is called is learned by trying it: a name that is believed without trial fails open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import doc, ids_of, limits, naive_greedy, often_ending, open_gates, tiny_backbone
from transformers import LlamaForCausalLM
from transformers.utils import ModelOutput

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.fusion.interface import CacheInterface, learn
from zipper_lm.fusion.reading import State, read
from zipper_lm.fusion.tower import Tower

THEIRS = learn(tiny_backbone("llama", 31)).cache.argument  # type: ignore[union-attr]  # what transformers calls it today
RAGGED = [doc(("speech", [5, 6, 7])), doc(("text", [5, 6, 7, 8, 9])), doc(("text", [4]), ("speech", [12, 13]))]


@dataclass
class Remembering(ModelOutput):
    logits: torch.Tensor | None = None
    remembered: Any = None


class Renamed(LlamaForCausalLM):
    """What transformers did to `past_key_values` in 5.24, once more, and another name in what is returned."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, brought=None, use_cache=None, **kwargs):
        kwargs[THEIRS] = brought if brought is not None else kwargs.get(THEIRS)  # as its generate() calls it
        output = super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **kwargs)
        return Remembering(logits=output.logits, remembered=output[THEIRS] if use_cache else None)


class Forgetful(LlamaForCausalLM):
    """Takes a cache, returns one, and does not look at it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, past_key_values=None, **kwargs):
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


class Blurred(LlamaForCausalLM):
    """Goes on token by token, but takes only the first of several."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, cache=None, past_key_values=None, **kwargs):
        past = cache if cache is not None else past_key_values
        if past is not None and past.get_seq_length() and input_ids.shape[1] > 1:
            input_ids = input_ids[:, :1].expand_as(input_ids)
        return super().forward(input_ids, attention_mask, position_ids, **{THEIRS: past}, **kwargs)


class Misplaced(LlamaForCausalLM):
    """Places that it is told come out one in three apart, so that they are not counted from a mask."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        return super().forward(input_ids, attention_mask, None if position_ids is None else position_ids * 3, **kwargs)


class Unmasked(LlamaForCausalLM):
    """Looks at padding, as families do that count places without a mask."""

    def forward(self, input_ids, attention_mask=None, **kwargs):
        return super().forward(input_ids, **kwargs)


def of(kind: type[LlamaForCausalLM], dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A tiny Llama of that class."""
    plain = tiny_backbone("llama", 31)
    backbone = kind(plain.config).eval()
    backbone.load_state_dict(plain.state_dict())
    return backbone.to(dtype)  # type: ignore[arg-type]


def fused(kind: type[LlamaForCausalLM]) -> ZipperModel:
    torch.manual_seed(0)
    model = ZipperModel.fuse(
        {"text": of(kind), "speech": tiny_backbone("gpt2", 53, 6)}, zips=ZipSpec(gate_start=1.0, layers=3)
    )
    open_gates(model, 1.0)
    return often_ending(model)


DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_is_found_under_whatever_name(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """transformers 5.24 renamed `past_key_values`, our list of names did not have the new one, and towers forgot what
    they had read: logits were off by 2, without a word."""
    tower = Tower(of(Renamed, dtype))
    assert tower.interface.cache == CacheInterface("brought", "remembered", several=True)
    assert tower.interface.writing == "cached", "generate() hands on what it has under the name that it knows"
    assert not caplog.records


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_that_is_lost_is_not_used_and_that_is_said(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    tower = Tower(of(Forgetful, dtype), "text")
    assert (tower.interface.cache, tower.interface.writing) == (None, "uncached")
    (record,) = caplog.records
    assert record.getMessage() == (
        f"tower 'text': Forgetful: going on from {THEIRS!r} does not give what reading everything at once gives, so it "
        "is not used"
    )
    assert tower(torch.tensor([[5, 6]]), use_cache=True)[1] is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cache_that_goes_on_token_by_token_only(dtype: torch.dtype) -> None:
    interface = learn(of(Blurred, dtype))
    assert interface.cache == CacheInterface(interface.cache.field, THEIRS, several=False)  # type: ignore[union-attr]
    assert interface.writing == "cached"
    assert interface.going_on == "token by token"
    assert learn(tiny_backbone("llama", 31).to(dtype)).going_on == "by several tokens"


@pytest.mark.parametrize("kind", [Renamed, Forgetful, Blurred])
def test_writing_does_not_depend_on_what_is_remembered(kind: type[LlamaForCausalLM]) -> None:
    model = fused(kind)
    schedule = ["text", "speech", "text", "text"]
    written = ids_of(model.generate(RAGGED, schedule, settings=limits(model, 6)))
    assert written == naive_greedy(model, RAGGED, schedule, 6)


@pytest.mark.parametrize("kind", [Forgetful, Blurred])
@torch.no_grad()
def test_to_go_on_from_nothing_is_refused(kind: type[LlamaForCausalLM]) -> None:
    """A tower without a cache took the rest for everything there is."""
    model, state = fused(kind), State()
    document = [("text", [4, 5]), ("text", [6, 7])]
    batches = [collate([doc(segment)], model.specials) for segment in document]
    read(model, batches[0], state)
    with pytest.raises(ValueError, match=r"tower 'text': .*(no cache of those before|goes on token by token)"):
        read(model, batches[1], state)


def test_padding_that_is_seen_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """BART's and Whisper's decoders count places without a mask: written together, documents of different length came
    out otherwise than alone, without a word."""
    Tower(of(Unmasked), "text")
    assert "tower 'text': Unmasked: padding changes what it computes" in caplog.records[0].getMessage()
    assert learn(tiny_backbone("llama", 31)).faults == ()


def test_places_are_given_where_they_are_heeded_as_we_count_them() -> None:
    assert learn(tiny_backbone("llama", 31)).positions == "position_ids"
    assert learn(of(Misplaced)).positions is None
    assert learn(tiny_backbone("mamba", 31)).positions is None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "mamba", "lfm2"])
def test_a_trial_leaves_no_trace(kind: str) -> None:
    backbone = tiny_backbone(kind, 31).train()
    frozen = next(backbone.children()).eval()  # a part that its user put to rest
    tensors, state = {k: v.clone() for k, v in backbone.state_dict().items()}, torch.get_rng_state()
    learn(backbone)
    assert backbone.training
    assert not any(module.training for module in frozen.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, tensors[k]) for k, v in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_what_cannot_be_told_is_not_used(weight: float) -> None:
    backbone = tiny_backbone("llama", 31)
    for parameter in backbone.parameters():
        torch.nn.init.constant_(parameter, weight)
    interface = learn(backbone)
    assert (interface.cache, interface.writing) == (None, "uncached")
    assert "cannot be tried" in interface.faults[0]


def test_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """`fuse` made every tower twice, the first time to count its layers."""
    fused(Forgetful)
    assert len(caplog.records) == 1


def test_on_meta_names_must_do() -> None:
    cache = learn(tiny_backbone("llama", 31).to("meta")).cache
    assert cache is not None
    assert cache.argument == cache.field == THEIRS
