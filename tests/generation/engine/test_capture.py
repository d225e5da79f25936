"""Whether a step can be captured is learned by trying it."""

from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_model
from tower_families import captured
from transformers import LlamaConfig, LlamaForCausalLM

from zipper_lm import ZipperModel
from zipper_lm.generation.engine import capture
from zipper_lm.generation.engine.capture import learn_capture
from zipper_lm.generation.engine.column_cache import StateLayer
from zipper_lm.generation.engine.rows import Rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2-tied", "qwen3", "mistral", "mamba", "lfm2"])
def test_attention_and_recurrent_states_are_captured(kind: str) -> None:
    assert learn_capture(tiny_model(kinds={"text": kind}), "text").fault is None


@pytest.mark.parametrize("family", ["qwen3_next", "falcon_h1", "gemma3n_text"])
def test_so_is_what_keeps_both_or_nothing(family: str) -> None:
    """Linear attention between layers of attention; both in one layer; layers that use what others keep."""
    assert captured(family).fault is None


def test_states_between_layers_may_have_another_dtype_than_the_weights() -> None:
    """Mamba adds up in float32 what its layers in bfloat16 give. Where others read that, a step kept it in the dtype of
    the weights, and failed."""
    model = tiny_model(kinds={"text": "mamba"}).to(torch.bfloat16)
    assert learn_capture(model, "text").fault is None


def test_a_state_that_was_somebody_elses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who begins in a row that was used would go on from a stranger's state."""
    monkeypatch.setattr(StateLayer, "join", lambda self, row, layer, column: None)
    assert "off by" in str(learn_capture(tiny_model(kinds={"text": "mamba"}), "text").fault)


@pytest.mark.parametrize(
    ("family", "said"),
    [("bart", "padding changes what it computes"), ("openai-gpt", "no cache"), ("deepseek_v32", "keeps indexer_keys")],
)
def test_why_a_family_is_not_is_said_in_words(family: str, said: str) -> None:
    fault = str(captured(family).fault)
    assert said in fault
    assert "Error:" not in fault


def test_a_step_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that shows a row the columns of who sat there before would change what it writes, and fail nowhere."""
    monkeypatch.setattr(Rows, "mask", lambda self: torch.ones(self.count, self.columns, dtype=torch.long))
    assert "off by" in str(learn_capture(tiny_model(), "text").fault)


def test_positions_that_do_not_count_from_the_stream_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rows, "positions", lambda self: self.column.expand(self.count)[:, None])
    assert "off by" in str(
        learn_capture(tiny_model(), "speech").fault
    )  # vectors of positions: rotary ones are relative


def test_nothing_is_left_behind() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    keys = [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.modules()]
    torch.manual_seed(3)
    capture.learn_capture(model, "text")
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(torch.rand(()), drawn)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert keys == [list(module._forward_hooks) + list(module._forward_pre_hooks) for module in model.modules()]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 2.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_a_rotation_that_is_stretched_for_a_whole_batch(rope: dict[str, Any]) -> None:
    """Such a family was captured, as a trial of eight tokens shows nothing. Then a row's tokens came from frequencies
    that the furthest of its neighbours decided: log-probabilities were off by 3.7."""
    rope = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if rope["rope_type"] == "dynamic":
        del rope["original_max_position_embeddings"]
    config = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 31, "initializer_range": 0.3}
    config |= {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(0)
    text = LlamaForCausalLM(LlamaConfig(**config, **special, max_position_embeddings=32, rope_parameters=rope)).eval()
    model = ZipperModel.fuse({"text": text, "speech": tiny_backbone("gpt2", 53)}).eval()
    assert "how far another row is" in (learn_capture(model, "text").fault or "")
