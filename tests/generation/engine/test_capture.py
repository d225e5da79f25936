"""Whether a step can be captured is learned by trying it."""

import pytest
import torch
from tiny import tiny_model
from tower_families import captured

from zipper_lm.generation.engine import capture
from zipper_lm.generation.engine.capture import learn_capture
from zipper_lm.generation.engine.rows import Rows


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt2-tied", "qwen3", "mistral"])
def test_attention_is_captured(kind: str) -> None:
    assert learn_capture(tiny_model(kinds={"text": kind}), "text").fault is None


@pytest.mark.parametrize(("kind", "said"), [("mamba", "keeps no keys"), ("lfm2", "keeps no keys")])
def test_recurrent_states_are_not(kind: str, said: str) -> None:
    assert said in str(learn_capture(tiny_model(kinds={"text": kind}), "text").fault)


@pytest.mark.parametrize(
    ("family", "said"),
    [("bart", "padding changes what it computes"), ("openai-gpt", "no cache"), ("qwen3_next", "its LinearAttention")],
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
