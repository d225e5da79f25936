"""Whether a step can be captured is learned by trying it."""

import pytest
import torch
from tiny import tiny_model
from tower_families import captured

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
