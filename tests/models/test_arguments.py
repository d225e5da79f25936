"""What transformers' own loaders and savers take is followed, or refused by name; nothing is dropped."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import doc, ids_of, tiny_backbone, tiny_model
from transformers import AutoModel, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from zipper_lm import SingleDecoder, ZipperConfig, ZipperModel, ZipperProcessor, load
from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import collate
from zipper_lm.models.baseline.config import SingleDecoderConfig
from zipper_lm.models.baseline.expand import expand

MODELS = ("ZipperModel", "SingleDecoder")


def digits() -> TextCodec:
    return TextCodec.train(["one two three", "three one two"], vocab_size=31)


def made(kind: str, **kwargs: Any) -> Any:
    if kind == "ZipperModel":
        return tiny_model(gate=0.5, **kwargs)
    torch.manual_seed(0)
    return expand("text", tiny_backbone("llama", 31), {"text": digits(), "speech": digits()})


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    model = made(request.param)
    model.save_pretrained(tmp_path / "model", card=False)
    return model, tmp_path / "model"


def names_of(function: Callable[..., Any], *followed: str) -> list[str]:
    """Named arguments of a function of the installed transformers, without those that are followed."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]
    left = {"self", "cls", "pretrained_model_name_or_path", "save_directory", "repo_id", *followed}
    return [name for name in names if name not in left]


def popped(function: Callable[..., Any]) -> list[str]:
    """What a function of transformers takes without saying so in its signature."""
    text = inspect.getsource(function)
    return sorted({part.split('"')[1] for part in text.split("kwargs.pop(")[1:] if part.startswith('"')})


HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision")
LOADED_AS = ("dtype", "torch_dtype", "device_map", "attn_implementation", "config", "trust_remote_code")
DROPPED_BY_TRANSFORMERS = ("_commit_hash", "_from_auto")


@pytest.mark.parametrize("kind", [ZipperModel, SingleDecoder])
def test_loading_follows_or_refuses_each_argument_of_transformers(kind: Any, tmp_path: Path) -> None:
    """`from_pretrained(quantization_config=..., nonsense=1)` was taken; one class warned, the other said nothing."""
    theirs = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]
    followed = {*HUB, *LOADED_AS, *DROPPED_BY_TRANSFORMERS}
    names = [*names_of(theirs, *followed), *(n for n in popped(theirs) if n not in followed)]
    assert {"quantization_config", "ignore_mismatched_sizes", "variant", "output_loading_info"} <= set(names)
    for name in [*names, "load_in_8bit", "nonsense"]:
        with pytest.raises(ValueError, match=rf"{kind.__name__}.from_pretrained: .*\b{name}="):
            kind.from_pretrained(tmp_path, **{name: object()})
    with pytest.raises(ValueError, match="one argument without a name"):
        kind.from_pretrained(tmp_path, "config.json")


@pytest.mark.parametrize("kind", MODELS)
def test_saving_follows_or_refuses_each_argument_of_transformers(kind: str, tmp_path: Path) -> None:
    """`save_pretrained(variant="fp16")` wrote plain files and said nothing."""
    model = made(kind)
    followed = ("is_main_process", "state_dict", "max_shard_size", "push_to_hub")
    names = names_of(PreTrainedModel.save_pretrained, *followed)
    assert {"variant", "token"} <= set(names)
    for name in [*names, "safe_serialization", "save_function", "repo_id", "nonsense"]:
        with pytest.raises(ValueError, match=rf"{kind}.save_pretrained: .*\b{name}="):
            model.save_pretrained(tmp_path / "model", **{name: object()})
    for name in names_of(PreTrainedModel.push_to_hub, *HUB, "commit_message", "commit_description", "private"):
        if name != "create_pr":
            with pytest.raises(ValueError, match=rf"push_to_hub: .*\b{name}="):
                model.push_to_hub("somebody/model", **{name: object()})
    assert list(tmp_path.iterdir()) == []


def test_a_processor_follows_or_refuses_each_argument(tmp_path: Path) -> None:
    processor = ZipperProcessor({"text": digits()})
    saving = names_of(ProcessorMixin.save_pretrained)
    assert "push_to_hub" in saving
    for name in [*saving, "repo_id", "nonsense"]:
        with pytest.raises(ValueError, match=rf"save_pretrained: .*\b{name}="):
            processor.save_pretrained(tmp_path, **{name: object()})
    loading = names_of(ProcessorMixin.from_pretrained.__func__, *HUB)  # type: ignore[attr-defined]
    for name in [*loading, "subfolder", "use_fast", "nonsense"]:
        with pytest.raises(ValueError, match=rf"from_pretrained: .*\b{name}="):
            ZipperProcessor.from_pretrained(tmp_path, **{name: object()})
    called = names_of(ProcessorMixin.__call__)
    assert "text" in called
    for name in [*called, "return_tensors", "nonsense"]:
        with pytest.raises(ValueError, match=rf"processor: .*\b{name}="):
            processor([doc(("text", [4]))], **{name: object()})
    with pytest.raises(ValueError, match="a processor goes along with its model"):
        processor.push_to_hub("somebody/processor")
    processor.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", [ZipperConfig, SingleDecoderConfig])
def test_a_config_drops_no_argument(kind: Any, tmp_path: Path) -> None:
    kind(loss_weights={}).save_pretrained(tmp_path)
    for name in names_of(PreTrainedConfig.from_pretrained.__func__, *HUB):  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=name):
            kind.from_pretrained(tmp_path, **{name: object()})
    with pytest.raises(ValueError, match=r"Config.from_pretrained: unknown argument nonsense=1"):
        kind.from_pretrained(tmp_path, nonsense=1)
    assert kind.from_pretrained(tmp_path, loss_weights={}).loss_weights == {}
    assert kind.from_pretrained(tmp_path, nonsense=1, return_unused_kwargs=True)[1] == {"nonsense": 1}


def test_values_that_ask_for_nothing(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    nothing = {"use_safetensors": True, "weights_only": True, "low_cpu_mem_usage": True, "quantization_config": None}
    again = type(model).from_pretrained(
        folder, device_map=None, torch_dtype="auto", output_loading_info=False, **nothing
    )
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    model.save_pretrained(folder.parent / "b", safe_serialization=True, max_shard_size="50GB", token=None)
    assert (folder.parent / "b/model.safetensors").is_file()


# --- followed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, "bfloat16"])
def test_dtype(saved: tuple[Any, Path], name: str, value: Any) -> None:
    """`torch_dtype`, under which every older script has it, had no effect."""
    model, folder = saved
    for owner in (type(model), AutoModel):
        again = owner.from_pretrained(folder, **{name: value})
        assert {b.dtype for b in again.backbones().values()} == {torch.bfloat16}
    for wrong in ("half precision", torch.int8, torch.float8_e4m3fn, 16):
        with pytest.raises(ValueError, match="is no floating-point dtype"):
            type(model).from_pretrained(folder, **{name: wrong})


def test_dtype_by_tower(tmp_path: Path) -> None:
    """As devices are. A recipe that goes on with a model says it so, too."""
    model = tiny_model(train={"speech": "full"})
    model.save_pretrained(tmp_path, bundle_towers=True, card=False)
    again = ZipperModel.from_pretrained(tmp_path, dtype={"speech": "bfloat16"})
    assert {n: b.dtype for n, b in again.backbones().items()} == {"speech": torch.bfloat16, "text": torch.float32}
    with pytest.raises(ValueError, match=r"dtype names \['image'\], but the towers are"):
        ZipperModel.from_pretrained(tmp_path, dtype={"image": "bfloat16"})
    with pytest.raises(ValueError, match="tower 'text': dtype=16"):
        ZipperModel.from_pretrained(tmp_path, dtype={"text": 16})
    with pytest.raises(ValueError, match="of 16 bits or more"):
        ZipperModel.from_pretrained(tmp_path, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("device_map", ["meta", {"": "meta"}, torch.device("meta")])
def test_one_device(saved: tuple[Any, Path], device_map: Any) -> None:
    model, folder = saved
    again = type(model).from_pretrained(folder, device_map=device_map)
    assert {p.device.type for p in again.parameters()} == {"meta"}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_that_is_there(saved: tuple[Any, Path], device_map: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = saved
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert type(model).from_pretrained(folder, device_map=device_map).device.type == "cpu"
    assert load(folder).device.type == "cpu"  # type: ignore[attr-defined]


def test_what_is_tried_is_tried_where_the_model_shall_be(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large tower was tried on the CPU and then moved to the GPU."""
    model, folder = saved
    first: list[tuple[str, str]] = []

    def note(function: Callable[..., Any], event: str) -> Callable[..., Any]:
        def noted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            first.append((event, type(module).__name__))
            return function(module, *args, **kwargs)

        return noted

    monkeypatch.setattr(torch.nn.Module, "to", note(torch.nn.Module.to, "to"))
    monkeypatch.setattr(type(model), "__init__", note(type(model).__init__, "made"))
    type(model).from_pretrained(folder, device_map="cpu")
    moved = first[: first.index(("made", type(model).__name__))]
    assert {("to", type(b).__name__) for b in model.backbones().values()} <= set(moved)


@pytest.mark.parametrize("device_map", ["balanced", {"": "abacus"}, 99, "cuda:99", True, ["cpu"]])
def test_devices_that_cannot_be(device_map: Any, tmp_path: Path) -> None:
    for kind in (ZipperModel, SingleDecoder):
        with pytest.raises(ValueError, match=r"from_pretrained: device_map="):
            kind.from_pretrained(tmp_path, device_map=device_map)


@pytest.mark.parametrize("way", ["from_pretrained", "AutoModel", "set_attn_implementation"])
def test_attention_reaches_every_tower_and_the_zips(saved: tuple[Any, Path], way: str) -> None:
    """`attn_implementation="eager"` left all towers and zips at sdpa."""
    model, folder = saved
    batch = collate([doc(("speech", [5, 6, 7]), ("text", [4, 9]), target=True), doc(("text", [4]))], model.specials)
    if way == "set_attn_implementation":
        other = type(model).from_pretrained(folder)
        other.set_attn_implementation("eager")
    else:
        owner = AutoModel if way == "AutoModel" else type(model)
        other = owner.from_pretrained(folder, attn_implementation="eager")
    assert {b.config._attn_implementation for b in other.backbones().values()} == {"eager"}
    assert {m.attention for m in other.modules() if hasattr(m, "memory_projection")} <= {"eager"}
    for name, logits in model(batch).logits.items():
        torch.testing.assert_close(other(batch).logits[name], logits, rtol=1e-4, atol=1e-4)
    other.save_pretrained(folder.parent / "again", card=False)
    again = type(model).from_pretrained(folder.parent / "again")  # as in transformers, it is not saved
    assert {b.config._attn_implementation for b in again.backbones().values()} == {"sdpa"}
    assert {m.attention for m in again.modules() if hasattr(m, "memory_projection")} <= {"sdpa"}


def test_attention_by_tower() -> None:
    model = tiny_model()
    model.set_attn_implementation({"text": "eager"})
    assert model.tower("text").backbone.config._attn_implementation == "eager"
    assert model.tower("speech").backbone.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="unknown tower 'smell'"):
        model.set_attn_implementation({"text": "sdpa", "smell": "eager"})
    assert model.tower("text").backbone.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    """Every rank wrote the checkpoint, as `is_main_process=False` was dropped."""
    for kind in MODELS:
        made(kind).save_pretrained(tmp_path / kind, is_main_process=False, state_dict={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bundle", [False, True])
def test_a_state_dict_is_what_is_saved(saved: tuple[Any, Path], bundle: bool, tmp_path: Path) -> None:
    """Where a trainer gathers the weights, the model's own are shards or stale; `state_dict=` was dropped."""
    model, _ = saved
    state = {k: torch.full_like(v, 0.25) for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", state_dict=state, bundle_towers=bundle, card=False)
    files = list((tmp_path / "other").rglob("*.safetensors"))
    tensors = [t for file in files for t in load_file(file).values()]
    assert tensors
    assert all(bool((t == 0.25).all()) for t in tensors)
    again = type(model).from_pretrained(tmp_path / "other")
    assert all(bool((v == 0.25).all()) for v in again.parameters())
    lacking = dict(list(state.items())[:-1])
    with pytest.raises(ValueError, match="state_dict lacks 1 tensors"):
        model.save_pretrained(tmp_path / "third", state_dict=lacking)
    name = next(n for n in state if n.endswith("weight") and not n.startswith("towers"))
    with pytest.raises(ValueError, match=rf"state_dict: {name} is \[3\]"):
        model.save_pretrained(tmp_path / "third", state_dict=state | {name: torch.zeros(3)})
    with pytest.raises(ValueError, match="state_dict with push_to_hub"):
        model.save_pretrained(tmp_path / "third", state_dict=state, push_to_hub=True)
    assert not (tmp_path / "third").exists()


def test_a_shard_size_that_is_large_enough(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = saved
    model.save_pretrained(tmp_path / "large", max_shard_size="1GB", card=False)
    with pytest.raises(ValueError, match=r"max_shard_size='1KB' is not followed"):
        model.save_pretrained(tmp_path / "small", max_shard_size="1KB")
    assert not (tmp_path / "small").exists()


def test_a_config_in_place_of_the_checkpoints(saved: tuple[Any, Path]) -> None:
    """`AutoModel.from_pretrained(folder, loss_weights=...)` changes the config that it hands on, which was dropped."""
    model, folder = saved
    again = AutoModel.from_pretrained(folder, loss_weights={"text": 0.5} if isinstance(model, ZipperModel) else {})
    assert again.config.loss_weights == ({"text": 0.5} if isinstance(model, ZipperModel) else {})
    assert again.config.architectures == [type(model).__name__]
    with pytest.raises(ValueError, match=r"config changes \['output_attentions'\]"):
        AutoModel.from_pretrained(folder, output_attentions=True)
    with pytest.raises(ValueError, match="nonsense=1"):
        AutoModel.from_pretrained(folder, nonsense=1)
    with pytest.raises(ValueError, match="config is a PreTrainedConfig"):
        type(model).from_pretrained(folder, config=PreTrainedConfig())
    if isinstance(model, ZipperModel):
        config = ZipperConfig.from_pretrained(folder)
        config.zips[0]["positions"] = "rotary"
        with pytest.raises(ValueError, match=r"tensors|changed since"):
            ZipperModel.from_pretrained(folder, config=config)


def test_auto_classes_know_both_models(saved: tuple[Any, Path]) -> None:
    """The single decoder was in no auto class."""
    model, folder = saved
    again = AutoModel.from_pretrained(folder)
    assert type(again) is type(model)
    documents, settings = [doc(("text", [4, 5]))], {"speech": {"max_new_tokens": 4}}
    expected = ids_of(model.generate(documents, ["speech"], settings=settings))
    assert ids_of(again.generate(documents, ["speech"], settings=settings)) == expected
    if model.processor is not None and (folder / "processor_config.json").is_file():
        assert type(AutoProcessor.from_pretrained(folder)) is ZipperProcessor
