"""The tower by itself: stand-ins, layer lists, listeners; families are walked in evaluation/test_parity.py."""

import threading
from typing import Any

import pytest
import torch
from torch import nn
from tower_families import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from zipper_lm.evaluation.parity import check_parity
from zipper_lm.fusion.interface import learn
from zipper_lm.fusion.tower import LayerList, Tower, find_layers, listening

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


class Recorder:
    """Notes what it is told; adds `shift` after one depth."""

    def __init__(self, depth: int = -1, shift: float = 0.0) -> None:
        self.depth, self.shift = depth, shift
        self.depths: list[int] = []
        self.shapes: list[torch.Size] = []

    def before(self, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
        self.depths.append(depth)
        return hidden_states

    def after(self, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
        self.shapes.append(hidden_states.shape)
        if depth != self.depth:
            return hidden_states
        return hidden_states + self.shift * torch.linspace(-1, 1, hidden_states.shape[-1])


@pytest.fixture(scope="module")
def llama() -> Tower:
    return Tower(tiny_model("llama"), "text")


@torch.no_grad()
def test_listener_hears_each_layer_once_in_order(llama: Tower) -> None:
    heard = Recorder()
    mask = torch.ones_like(IDS)
    logits, cache = llama(IDS, mask, use_cache=True, listener=heard)
    llama(IDS[:, :1], torch.ones(2, 5, dtype=torch.long), cache=cache, listener=heard)
    assert logits.shape == (2, 4, llama.vocab_size)
    assert heard.depths == [0, 1, 2, 3] * 2
    assert heard.shapes == [torch.Size([2, 4, llama.hidden_size])] * 4 + [torch.Size([2, 1, llama.hidden_size])] * 4


@torch.no_grad()
def test_where_nothing_is_said_layers_are_themselves(llama: Tower) -> None:
    """Each layer was asked for at each token, with a stand-in and its arguments in between: as many calls of Python as
    a fifth of the bare backbone's."""
    whole, part = Recorder(2, 0.5), Recorder(2, 0.5)
    logits = llama(IDS, listener=whole)[0]
    with listening(llama.layers, part, heard={0, 2}):
        handed = list(llama.layers)
        said = [llama.backbone(IDS).logits for _ in range(2)]
    real = list(llama.layers)
    assert [a is b for a, b in zip(handed, real)] == [False, True, False, True]
    assert part.depths == [0, 2] * 2
    assert all(torch.equal(each, logits) for each in said)


@torch.no_grad()
def test_layers_that_are_called_in_another_order_are_all_heard() -> None:
    """Which call a layer is answers a count alone there, and a count needs them all."""
    made: dict[str, Any] = {}
    exec(REMOTE.replace("in self.mixers", "in list(self.mixers)[::-1]"), made)
    tower = Tower(made["HomeMadeForCausalLM"](made["HomeMadeConfig"]()))
    with listening(tower.layers, heard := Recorder(), heard={0}):
        tower.backbone(IDS)
    assert heard.depths == [0, 1, 2]


@torch.no_grad()
def test_outside_listening_the_real_layers_are_handed_out(llama: Tower) -> None:
    real = [type(layer).__name__ for layer in nn.ModuleList.__iter__(llama.layers)]
    assert all(a is b for a, b in zip(llama.layers, nn.ModuleList.__iter__(llama.layers)))
    with listening(llama.layers, Recorder()):
        assert all(not isinstance(layer, nn.Linear) and type(layer) is not layer.__class__ for layer in llama.layers)
        assert [layer.__class__.__name__ for layer in llama.layers] == real
        assert len(llama.layers[1:3]) == 2
    assert isinstance(llama.layers[0], nn.Module)


@torch.no_grad()
def test_listening_ends_after_an_error(llama: Tower) -> None:
    class Broken(Recorder):
        def before(self, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken listener")

    bare = llama(IDS)[0]
    with pytest.raises(RuntimeError, match="broken listener"):
        llama(IDS, listener=Broken())
    assert torch.equal(llama(IDS)[0], bare)


@torch.no_grad()
def test_two_threads_listen_to_one_tower_without_mixing(llama: Tower) -> None:
    """A context variable, not the module, says who listens: each thread gets what it would get alone."""
    shifts = [0.0, 0.5, 1.0, 2.0]
    alone = [llama(IDS, listener=Recorder(1, s))[0] for s in shifts]
    together: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(shifts))}

    @torch.no_grad()
    def work(i: int) -> None:
        together[i] = [llama(IDS, listener=Recorder(1, shifts[i]))[0] for _ in range(8)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(shifts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, expected in enumerate(alone):
        assert len(together[i]) == 8
        assert all(torch.equal(got, expected) for got in together[i])
    assert not torch.equal(alone[0], alone[1])


def test_gradients_flow_through_a_listener() -> None:
    tower = Tower(tiny_model("gpt2"))
    weight = nn.Parameter(torch.tensor(0.1))

    class Scaled(Recorder):
        def after(self, depth: int, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states * (1 + weight) if depth == 1 else hidden_states

    tower(IDS, listener=Scaled())[0].square().mean().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0


@torch.no_grad()
def test_making_a_tower_leaves_no_trace() -> None:
    backbone = tiny_model("llama").train()
    keys, state = list(backbone.state_dict()), torch.get_rng_state()
    tower = Tower(backbone)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    assert list(backbone.state_dict()) == keys
    assert tower.layers_path == "model.layers"
    assert isinstance(tower.layers, LayerList)
    again = Tower(backbone)  # a second tower over the same backbone shares its list
    assert again.layers is tower.layers
    heard = Recorder()
    again(IDS, listener=heard)
    assert heard.depths == list(range(again.depth))


def test_layer_list_that_text_runs_through_is_found() -> None:
    backbone = tiny_model("git")  # has an image encoder's list as well
    assert find_layers(backbone) == "git.encoder.layer"


def test_errors_name_tower_list_and_remedy() -> None:
    backbone = tiny_model("llama")
    with pytest.raises(ValueError, match=r"tower 'text': layers='model.norm' is a LlamaRMSNorm"):
        Tower(backbone, "text", layers="model.norm")
    with pytest.raises(ValueError, match=r"no single list .*transformer.attentions.*Name it with layers="):
        Tower(tiny_model("xlm"))
    with pytest.raises(ValueError, match=r"passes \[\(3, 15, 32\)\].*needs \[batch, time, hidden\]"):
        Tower(tiny_model("prophetnet"))


@torch.no_grad()
def test_layers_skipped_at_random_are_refused() -> None:
    backbone = tiny_model("opt")
    tower = Tower(backbone)
    backbone.model.decoder.layerdrop = 1.0
    backbone.train()
    with pytest.raises(RuntimeError, match="layerdrop"):
        tower(IDS, listener=Recorder())


@torch.no_grad()
def test_several_streams_are_one_hidden_state() -> None:
    """Hyper-connections pass ``[batch, time, 4, d]``, Gemma 3n passes ``[4, batch, time, d]``."""
    for family, axes in (("deepseek_v4", (0, 1)), ("gemma3n_text", (1, 2))):
        tower = Tower(tiny_model(family))
        heard = Recorder()
        tower(IDS, listener=heard)
        assert tower.layers.axes == axes
        assert tower.hidden_size == 4 * 32
        assert set(heard.shapes) == {torch.Size([2, 4, 128])}


@torch.no_grad()
def test_positions_of_families_that_do_not_count_from_zero_are_left_to_them() -> None:
    roberta = tiny_model("roberta")
    bare = roberta(IDS).logits
    assert learn(roberta).positions is None
    assert torch.equal(Tower(roberta)(IDS, torch.ones_like(IDS))[0], bare)
    assert learn(tiny_model("gpt2")).positions == "position_ids"


@torch.no_grad()
def test_left_padding_changes_nothing_but_rounding() -> None:
    for family in ("llama", "gpt2", "mamba"):
        tower = Tower(tiny_model(family))
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        padded = tower(IDS, mask)[0]
        alone = tower(IDS[1:, 2:])[0]
        torch.testing.assert_close(padded[1:, 2:], alone, rtol=1e-4, atol=1e-4)


def test_parity_check_notices_a_tower_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that all of the parity suite rests on can fail: answered with a bare tensor, Falcon loses its batch."""
    import zipper_lm.fusion.tower as module

    call = module._StandIn.__call__
    monkeypatch.setattr(module._StandIn, "__call__", lambda *a, **k: _bare(call(*a, **k)))
    broken = check_parity(tiny_model("falcon"))
    assert not broken.passed
    assert "forward" in broken.problems
    monkeypatch.setattr(module._StandIn, "__call__", lambda self, *a, **k: self._layer(*a, **k))
    deaf = check_parity(tiny_model("llama"))
    assert not deaf.passed
    assert "listener is heard" in deaf.problems


def _bare(output: object) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]  # type: ignore[index]


REMOTE = """
import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class HomeMadeConfig(PreTrainedConfig):
    model_type = "home_made"

    def __init__(self, vocab_size=64, width=24, num_hidden_layers=3, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.width, self.num_hidden_layers = vocab_size, width, num_hidden_layers


class Mixer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return (x + self.out(self.norm(x)).cumsum(1) / steps, None)


class HomeMadeForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HomeMadeConfig
    _no_split_modules = ["Mixer"]

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.mixers = nn.ModuleList(Mixer(config.width) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=True, **kwargs):
        x = self.embed(input_ids)
        for mixer in self.mixers:
            x, _ = mixer(x)
        return CausalLMOutput(logits=self.head(x))
"""


def test_remote_code_model_is_a_tower_by_explicit_opt_in(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "home_made"
    folder.mkdir()
    (folder / "modeling_home_made.py").write_text(REMOTE)
    (folder / "config.json").write_text(
        '{"model_type": "home_made", "auto_map": {"AutoConfig": "modeling_home_made.HomeMadeConfig", '
        '"AutoModelForCausalLM": "modeling_home_made.HomeMadeForCausalLM"}}'
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(folder)
    backbone = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(backbone).__name__ == "HomeMadeForCausalLM"
    found = check_parity(backbone)
    assert found.passed, (found.problems, found.lacks)
    assert (found.depth, found.hidden_size) == (3, 24)
    assert any("no cache" in note for note in found.notes)
