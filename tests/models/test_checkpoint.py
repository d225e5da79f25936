"""What contract 6 (tests/contracts/test_checkpoint_contract.py) does not say: ownership, warnings, adapters."""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import doc, tiny_backbone, tiny_model
from tiny_recipes import workshop
from tower_families import tiny_model as family_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from zipper_lm import TowerSpec, ZipperConfig, ZipperModel, ZipSpec
from zipper_lm.codecs.codec import load_codec
from zipper_lm.data.collation import collate
from zipper_lm.evaluation.preservation import changed_sources, verify
from zipper_lm.fusion import backbones, tower
from zipper_lm.fusion.backbones import from_config
from zipper_lm.models import checkpoint
from zipper_lm.models.baseline import single_decoder
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.utils import known_hashes
from zipper_lm.utils.tensors import weights_hash

FULL = {"text": "full"}


def test_split_is_by_ownership() -> None:
    """A tower called like a child of the model does not confuse it."""
    model = ZipperModel.fuse({"zips": tiny_backbone("llama", 31), "towers": tiny_backbone("gpt2", 53)})
    own = checkpoint.split(model)
    assert not any(k.startswith("towers.") for k in own)
    assert sum(v.numel() for v in own.values()) == model.num_parameters(only_trainable=True)


def saved(tmp_path: Path, train: str = "frozen") -> Path:
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "text")
    ZipperModel.fuse(
        {"text": tmp_path / "text", "speech": tiny_backbone("gpt2", 53, 2)}, train={"text": train}
    ).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- is it the same backbone? ------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["frozen", "lora"])
@pytest.mark.parametrize("way", ["object", "folder", "source"])
def test_one_other_weight_is_refused(tmp_path: Path, train: str, way: str) -> None:
    folder = saved(tmp_path, train)
    other = tiny_backbone("llama", 31, 2)
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 2] += 0.5  # type: ignore[operator]
    other.save_pretrained(tmp_path / ("text" if way == "source" else "other"))
    given = {"object": {"text": other}, "folder": {"text": tmp_path / "other"}}.get(way)
    with pytest.raises(ValueError, match="'text': same config but other weights"):
        ZipperModel.from_pretrained(folder, towers=given, dtype=torch.bfloat16)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Classes of the backbones whose hash was computed; no file is too new to be remembered."""
    monkeypatch.setattr(known_hashes, "FRESH", 0.0)
    calls: list[str] = []

    def counted(module: Any, *args: Any) -> str:
        calls.append(type(module).__name__)
        return weights_hash(module, *args)

    monkeypatch.setattr(backbones, "weights_hash", counted)
    return calls


@pytest.mark.parametrize("way", ["source", "bundle", "folder"])
def test_what_was_loaded_once_is_not_hashed_again(way: str, tmp_path: Path, hashed: list[str]) -> None:
    folder = saved(tmp_path)
    if way == "bundle":
        ZipperModel.from_pretrained(folder).save_pretrained(folder, bundle_towers=True, overwrite=True)
    given = {"text": tmp_path / "text"} if way == "folder" else None
    hashed.clear()
    ZipperModel.from_pretrained(folder, towers=given)
    assert sorted(hashed) == ["GPT2LMHeadModel", "LlamaForCausalLM"]
    hashed.clear()
    ZipperModel.from_pretrained(folder, towers=given)
    assert hashed == []
    ZipperModel.from_pretrained(folder, towers={"text": LlamaForCausalLM.from_pretrained(tmp_path / "text")})
    assert hashed == ["LlamaForCausalLM"], "files say nothing of a model that is given"
    hashed.clear()
    (folder / "towers" / "speech" / "model.safetensors").touch()
    ZipperModel.from_pretrained(folder, towers=given)
    assert hashed == ["GPT2LMHeadModel"]


@pytest.mark.parametrize("train", ["frozen", "lora"])
def test_verifying_computes_whatever_is_remembered(train: str, tmp_path: Path, hashed: list[str]) -> None:
    """Model and source are read from the same file, so that they are alike says little of what that holds."""
    folder = saved(tmp_path, train)
    model = ZipperModel.from_pretrained(folder)
    assert all(report.identical for report in verify(model, folder))
    other = tiny_backbone("llama", 31, 2)
    with torch.no_grad():
        other.get_input_embeddings().weight[3, 2] += 0.5  # type: ignore[operator]
    other.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="'text': same config but other weights"):
        ZipperModel.from_pretrained(folder)
    file = known_hashes.cache_folder() / "hashes.json"
    told, wrong = json.loads(file.read_text()), weights_hash(other)
    assert wrong in told["hashes"].values()
    right = weights_hash(tiny_backbone("llama", 31, 2))
    told["hashes"] = {key: right if value == wrong else value for key, value in told["hashes"].items()}
    file.write_text(json.dumps(told))
    believed = ZipperModel.from_pretrained(folder)
    assert [(report.name, report.identical) for report in verify(believed, folder)] == [
        ("speech", True),
        ("text", False),
    ]
    assert list(changed_sources(folder)) == ["text"]


def test_a_tampered_bundle_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    tiny_backbone("gpt2", 53, 2, seed=1).save_pretrained(folder / "towers" / "speech")
    with pytest.raises(ValueError, match="'speech': same config but other weights"):
        ZipperModel.from_pretrained(folder)


def test_a_given_model_in_another_dtype(tmp_path: Path) -> None:
    coarse = tiny_backbone("llama", 31, 2).to(torch.bfloat16)
    coarse.save_pretrained(tmp_path / "text")
    model = ZipperModel.fuse({"text": tmp_path / "text", "speech": tiny_backbone("gpt2", 53, 2)})
    model.save_pretrained(tmp_path / "model")
    widened = tiny_backbone("llama", 31, 2).to(torch.bfloat16).float()
    loaded = ZipperModel.from_pretrained(tmp_path / "model", towers={"text": widened})
    assert loaded.tower("text").backbone.dtype == torch.float32
    with torch.no_grad():
        widened.get_input_embeddings().weight[3, 2] += 0.5  # type: ignore[operator]
    with pytest.raises(ValueError, match="'text': same config but other weights"):
        ZipperModel.from_pretrained(tmp_path / "model", towers={"text": widened})
    with pytest.raises(ValueError, match=r"'text': given in float16, too coarse to be compared with the bfloat16"):
        ZipperModel.from_pretrained(tmp_path / "model", towers={"text": coarse.half()})
    fine = ZipperModel.from_pretrained(tmp_path / "model", towers={"text": tmp_path / "text"}, dtype=torch.float16)
    assert fine.tower("text").backbone.dtype == torch.float16


def test_a_model_given_for_a_trained_tower(tmp_path: Path) -> None:
    folder = saved(tmp_path, "full")
    mine = tiny_backbone("llama", 31, 2)
    with pytest.raises(ValueError, match="'text', which was trained: its weights would be overwritten"):
        ZipperModel.from_pretrained(folder, towers={"text": mine})


def test_a_trained_tower_needs_no_source(tmp_path: Path) -> None:
    folder = saved(tmp_path, "full")
    shutil.rmtree(tmp_path / "text")
    ZipperModel.from_pretrained(folder)


# --- the recorded revision ---------------------------------------------------------------------------------------


def test_a_revision_that_is_not_to_be_had(tmp_path: Path, hub_cache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 31, 2)})
    model = ZipperModel.fuse({"text": "org/text", "speech": tiny_backbone("gpt2", 53, 2)}, **cache)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "cache/models--org--text/refs/main").write_text("b" * 40)
    snapshots = tmp_path / "cache/models--org--text/snapshots"
    (snapshots / ("a" * 40)).rename(snapshots / ("b" * 40))
    message = rf"tower 'text': tower 'org/text': .*cache does not have it at revision '{'a' * 40}'.*towers=\{{'text'"
    with pytest.raises(ValueError, match=message):
        ZipperModel.from_pretrained(tmp_path / "model", **cache)
    # The same weights, wherever they are now.
    ZipperModel.from_pretrained(tmp_path / "model", towers={"text": "org/text"}, **cache)

    def vanished(source: str, real=AutoConfig.from_pretrained, **kwargs: object) -> object:  # type: ignore[no-untyped-def]
        if source != "org/text":
            return real(source, **kwargs)
        raise OSError("not a valid git identifier") from RevisionNotFoundError.__new__(RevisionNotFoundError)

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", vanished)
    with pytest.raises(ValueError, match=f"tower 'text': .*the Hub has no revision '{'a' * 40}' of it"):
        ZipperModel.from_pretrained(tmp_path / "model")


def test_code_of_a_checkpoint_from_the_hub_runs_only_when_asked(tmp_path: Path) -> None:
    """Whoever uploads a checkpoint writes its config, and must not thereby run code where it is loaded."""
    source = TowerSpec(source=str(tmp_path / "text"), trust_remote_code=True)
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "text")
    snapshot = tmp_path / "cache/models--org--zipped/snapshots" / ("c" * 40)
    ZipperModel.fuse({"text": source, "speech": tiny_backbone("gpt2", 53, 2)}).save_pretrained(snapshot)
    cache = {"cache_dir": tmp_path / "cache", "local_files_only": True, "revision": "c" * 40}
    with pytest.raises(ValueError, match=r"tower 'text' of org/zipped runs code of its own"):
        ZipperModel.from_pretrained("org/zipped", **cache)
    ZipperModel.from_pretrained("org/zipped", trust_remote_code=True, **cache)
    with pytest.raises(ValueError, match=r"says trust_remote_code: true, which only you can allow"):
        ZipperModel.from_pretrained(snapshot)
    ZipperModel.from_pretrained(snapshot, trust_remote_code=True)


EVIL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({mark!r}).touch()
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Path, Path]]:
    """Makes a folder that somebody sent, whose tower has code that leaves a mark when it runs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(train: str = "frozen", **tower: object) -> tuple[Path, Path]:
        folder, mark = tmp_path / "downloaded", tmp_path / "ran"
        tiny_model(train={"text": train}).save_pretrained(folder, card=False)
        bundled = folder / "towers/text"
        bundled.mkdir(parents=True, exist_ok=True)
        (bundled / "evil.py").write_text(EVIL.format(mark=str(mark)))
        names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        config = json.loads((folder / "config.json").read_text())
        mine = config["towers"]["text"]
        own = mine["backbone"] | {"model_type": "evil", "auto_map": names}
        (bundled / "config.json").write_text(json.dumps(own))
        mine |= {"source": "towers/text"} | tower
        (folder / "config.json").write_text(json.dumps(config))
        return folder, mark

    return make


@pytest.mark.parametrize("train", ["frozen", "full"])
@pytest.mark.parametrize("trust", [True, False])
def test_code_of_a_folder_runs_only_when_asked(
    train: str, trust: bool, downloaded: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``trust_remote_code: true`` in the config.json of a folder was obeyed: whoever made the folder ran what code they
    liked where it was loaded, though nobody had asked for that."""
    folder, mark = downloaded(train, trust_remote_code=trust)
    monkeypatch.chdir(folder)
    for load in (
        lambda: ZipperModel.from_pretrained(folder),
        lambda: AutoModel.from_pretrained(folder),
        lambda: ZipperModel(ZipperConfig.from_pretrained(folder)),
        lambda: changed_sources(folder),
    ):
        with suppress(ValueError):
            load()
        assert not mark.exists()
    if trust:
        with pytest.raises(ValueError, match=r"runs code of its own, from 'towers/text': its config.json says trust_"):
            ZipperModel.from_pretrained(folder)
        with suppress(ValueError):
            ZipperModel.from_pretrained(folder, trust_remote_code=True)
        assert mark.exists()


@pytest.mark.parametrize("name", ["attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("where", ["config", "tower", "backbone"])
def test_a_kernel_of_the_hub_is_code(name: str, where: str, tmp_path: Path) -> None:
    """transformers fetches and runs an implementation of attention that a config names by a Hub id."""
    if where == "backbone":
        backbone = tiny_backbone("llama", 31, 2)
        backbone.save_pretrained(tmp_path / "text")
        file = tmp_path / "text/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: "somebody/kernel"}))
        with pytest.raises(ValueError, match=r"names 'somebody/kernel' as .*, which is code on the Hub"):
            ZipperModel.fuse({"text": tmp_path / "text", "speech": tiny_backbone("gpt2", 53, 2)})
        return
    tiny_model(train={"text": "full"}).save_pretrained(tmp_path, card=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (config if where == "config" else config["towers"]["text"]["backbone"])[name] = "somebody/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names 'somebody/kernel' as .*, which is code on the Hub"):
        ZipperModel.from_pretrained(tmp_path)


def test_a_folder_that_holds_something_else_is_named(tmp_path: Path) -> None:
    """A tower's folder given as a model ended in a complaint about the handover."""
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: holds no zipped model: its model_type is 'llama'"):
        ZipperModel.from_pretrained(tmp_path)


def test_where_a_single_decoders_base_came_from(tmp_path: Path, hub_cache) -> None:
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 32, 2)}, card="---\nlicense: mit\n---\n")
    codecs = {name: load_codec(workshop() / name) for name in ("text", "speech")}
    expand("text", "org/text", codecs, **cache).save_pretrained(tmp_path / "single")
    spec = SingleDecoder.from_pretrained(tmp_path / "single").config.spec
    assert (spec.source, spec.revision, spec.license) == ("org/text", "a" * 40, "mit")
    assert spec.weights_hash == weights_hash(tiny_backbone("llama", 32, 2))  # before it was expanded


# --- what is bundled ---------------------------------------------------------------------------------------------


def logits_of(model: ZipperModel) -> torch.Tensor:
    with torch.no_grad():
        return model(collate([doc(("speech", [5, 6, 7]), ("text", [4, 9, 3]))], model.specials)).logits["text"]


@pytest.mark.parametrize("train", ["frozen", "lora"])
def test_a_tower_that_is_nowhere_else_is_recorded_as_it_is_saved(train: str, tmp_path: Path) -> None:
    """Towers given as objects and turned to bfloat16 were saved beside the hash of their float32 weights. What was
    saved was refused on loading, and it was the only copy."""
    backbones = {"text": tiny_backbone("llama", 31, 2), "speech": tiny_backbone("gpt2-tied", 53, 2)}
    model = ZipperModel.fuse(backbones, train={"text": train}).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = ZipperModel.from_pretrained(tmp_path / "model")
    for name in model.names:
        assert loaded.tower(name).backbone.dtype == torch.bfloat16
        saved, kept = (m.tower(name).backbone.state_dict() for m in (model, loaded))
        assert all(torch.equal(saved[k], kept[k]) for k in saved)
    model.load_own(tmp_path / "model" / "model.safetensors")  # as training does with its best checkpoint


def test_a_bundle_that_was_loaded_coarsely_is_saved_so(tmp_path: Path) -> None:
    """As above: a model that has its towers with it, loaded in bfloat16 and saved again, could not be loaded."""
    tiny_model(gate=0.5).save_pretrained(tmp_path / "fine")
    coarse = ZipperModel.from_pretrained(tmp_path / "fine", dtype=torch.bfloat16)
    coarse.save_pretrained(tmp_path / "coarse")
    assert torch.equal(logits_of(ZipperModel.from_pretrained(tmp_path / "coarse")), logits_of(coarse))


def test_a_copy_of_a_source_is_a_copy(tmp_path: Path) -> None:
    """A model loaded in bfloat16 was bundled beside the float32 hash of its source, and nobody could load that."""
    folder = saved(tmp_path)
    with pytest.raises(ValueError, match=r"'text': its weights \(bfloat16\).*\(float32\).*without dtype="):
        ZipperModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "b", bundle_towers=True)
    assert not (tmp_path / "b").exists()
    wide = ZipperModel.from_pretrained(folder, dtype=torch.float64)  # nothing is lost in a wider dtype
    wide.save_pretrained(tmp_path / "wide", bundle_towers=True)
    again = ZipperModel.from_pretrained(tmp_path / "wide")
    assert torch.equal(logits_of(again), logits_of(ZipperModel.from_pretrained(folder)))


@pytest.mark.parametrize("changed", [False, True])
def test_an_object_that_is_no_longer_its_source(changed: bool, tmp_path: Path) -> None:
    """A loaded model kept the path it came from as its source, though its weights had been changed since: what was
    saved refused its own source, and the changed weights were lost."""
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "text")
    text = LlamaForCausalLM.from_pretrained(tmp_path / "text")
    if changed:
        with torch.no_grad():
            text.get_input_embeddings().weight[3, 2] += 0.5
    model = ZipperModel.fuse({"text": text, "speech": tiny_backbone("gpt2", 53, 2)})
    assert model.config.tower_specs["text"].source == ("" if changed else str(tmp_path / "text"))
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "towers" / "text").is_dir() == changed
    assert torch.equal(logits_of(ZipperModel.from_pretrained(tmp_path / "model")), logits_of(model))


# --- trained towers in another dtype, and what is in the way ------------------------------------------------------


def test_a_trained_tower_in_bf16_is_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    """It was made in float32 and cast, which rounds the frequencies of rotary positions too: other logits, the more so
    the longer the stream."""
    tiny_backbone("llama", 31, 2).to(torch.bfloat16).save_pretrained(tmp_path / "text")
    towers = {"text": TowerSpec(source=str(tmp_path / "text"), train="full"), "speech": tiny_backbone("gpt2", 53, 2)}
    model = ZipperModel.fuse(towers, dtype=torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "model")
    again = ZipperModel.from_pretrained(tmp_path / "model")
    ids = torch.randint(3, 31, (2, 140))
    with torch.no_grad():
        logits = [m.tower("text").backbone(ids).logits for m in (model, again)]
    assert logits[0].dtype == torch.bfloat16
    assert torch.equal(*logits)


@pytest.mark.parametrize("family", ["codegen", "deepseek_v3", "dots1"])
def test_a_trained_tower_of_a_family_with_a_dtype_of_its_own_is_what_was_saved(family: str, tmp_path: Path) -> None:
    """It was made from its config, where a family keeps nothing in float32 and computes its tables in half precision:
    gates that were saved in float32 were rounded on loading, and CodeGen had other positions."""
    family_model(family).save_pretrained(tmp_path / "text", save_original_format=False)
    towers = {"text": TowerSpec(source=str(tmp_path / "text"), train="full"), "speech": tiny_backbone("gpt2", 53, 2)}
    model = ZipperModel.fuse(towers, zips=ZipSpec(layers=1), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.tower("text").backbone.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model", card=False)
    ours, theirs = (m.tower("text").backbone for m in (model, ZipperModel.from_pretrained(tmp_path / "model")))
    for there, here in zip(chain(ours.parameters(), ours.buffers()), chain(theirs.parameters(), theirs.buffers())):
        assert there.dtype == here.dtype
        assert torch.equal(there, here)


@pytest.mark.parametrize("kind", ["llama", "gpt2-tied"])
@pytest.mark.parametrize("single", [False, True])
def test_what_was_trained_in_full_is_not_drawn_first(
    single: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor tried before its own tensors are there, as every tower is when it is made."""
    if single:
        codecs = {name: load_codec(workshop() / name) for name in ("text", "speech")}
        model: ZipperModel | SingleDecoder = expand("text", tiny_backbone(kind, 32, 2), codecs)
        backbone = model.backbone
    else:
        model = ZipperModel.fuse({"text": tiny_backbone(kind, 31), "speech": tiny_backbone("gpt2", 53, 2)}, train=FULL)
        backbone = model.tower("text").backbone
    model.save_pretrained(tmp_path / "model", card=False)
    own, tried = weights_hash(backbone), []

    def learn_of(real: Any) -> Any:
        return lambda each, *args: tried.append(weights_hash(each)) or real(each, *args)

    def only_on_meta(*args: Any, **kwargs: Any) -> Any:
        assert torch.empty(0).is_meta
        return from_config(*args, **kwargs)

    for module in (backbones, single_decoder):
        monkeypatch.setattr(module, "from_config", only_on_meta)
    for module in (tower, single_decoder):
        monkeypatch.setattr(module, "learn", learn_of(module.learn))
    again = type(model).from_pretrained(tmp_path / "model")
    assert own in tried  # of two towers, in the order of the checkpoint
    assert weights_hash(again.backbone if isinstance(again, SingleDecoder) else again.tower("text").backbone) == own


@pytest.mark.parametrize("name", ["towers.text.backbone.lm_head.weight", "handover_start", "towers.text.backbone.odd"])
def test_a_tensor_too_few_or_too_many_is_named(name: str, tmp_path: Path) -> None:
    file = saved(tmp_path, "full") / "model.safetensors"
    with safe_open(file, framework="pt") as stored:
        tensors, told = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()  # noqa: SIM118
    if tensors.pop(name, None) is None:
        tensors[name] = torch.zeros(1)
    save_file(tensors, file, metadata=told)
    with pytest.raises(ValueError, match=rf"(missing tensors|unknown) \['{name}'\]"):
        ZipperModel.from_pretrained(tmp_path / "model")


def test_a_dtype_is_for_trained_towers_too(tmp_path: Path) -> None:
    folder = saved(tmp_path, "full")
    model = ZipperModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert {name: model.tower(name).backbone.dtype for name in model.names} == dict.fromkeys(
        ["text", "speech"], torch.bfloat16
    )


def test_files_that_are_no_checkpoint_are_kept(tmp_path: Path) -> None:
    """Without a config.json beside them, a user's weights or picture of the same name were replaced."""
    for name in ("model.safetensors", "architecture.png"):
        (tmp_path / name).write_text("mine")
    model = tiny_model()
    with pytest.raises(ValueError, match=r"already holds \['architecture.png', 'model.safetensors'\]"):
        model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["architecture.png", "model.safetensors"]
    model.save_pretrained(tmp_path, overwrite=True)
    ZipperModel.from_pretrained(tmp_path)


def test_a_tower_that_was_moved_is_recorded_where_it_is(tmp_path: Path) -> None:
    """Saved again, a model named the old place of a tower that was loaded from a new one; and as the new one was not
    known to be read, it could be written over."""
    folder = saved(tmp_path)
    (tmp_path / "text").rename(tmp_path / "moved")
    model = ZipperModel.from_pretrained(folder, towers={"text": tmp_path / "moved"})
    with pytest.raises(ValueError, match="would replace tower 'text'"):
        model.save_pretrained(tmp_path / "moved", overwrite=True)
    model.save_pretrained(tmp_path / "again")
    again = ZipperModel.from_pretrained(tmp_path / "again")
    assert again.config.tower_specs["text"].source == str(tmp_path / "moved")
    assert again.config.fingerprint == ZipperModel.from_pretrained(tmp_path / "again").config.fingerprint


def test_a_tower_that_moved_to_the_hub_is_recorded_at_its_commit(tmp_path: Path, hub_cache) -> None:
    """It was recorded without one: saved again, the model would have followed whatever is pushed there next."""
    folder = saved(tmp_path)
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 31, 2)})
    model = ZipperModel.from_pretrained(folder, towers={"text": "org/text"}, **cache)
    spec = model.config.tower_specs["text"]
    assert (spec.source, spec.revision) == ("org/text", "a" * 40)
    model.save_pretrained(tmp_path / "again")
    ZipperModel.from_pretrained(tmp_path / "again", **cache)


@pytest.mark.parametrize("way", ["object", "in place of a bundle"])
def test_where_a_given_tower_came_from_is_not_overwritten(way: str, tmp_path: Path) -> None:
    """The record goes on naming another place, so that a checkpoint could be saved over the very files of the tower."""
    folder = saved(tmp_path)
    if way != "object":
        ZipperModel.from_pretrained(folder).save_pretrained(tmp_path / "whole", bundle_towers=True)
        folder = tmp_path / "whole"
    shutil.copytree(tmp_path / "text", tmp_path / "copy")
    given = tmp_path / "copy" if way != "object" else AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    model = ZipperModel.from_pretrained(folder, towers={"text": given})
    with pytest.raises(ValueError, match=r"would replace tower 'text', which is at .*copy"):
        model.save_pretrained(tmp_path / "copy", overwrite=True)
    model.save_pretrained(folder, overwrite=True)  # a checkpoint's own folder stays its own, bundles and all
    again = ZipperModel.from_pretrained(folder)
    again.save_pretrained(folder, overwrite=True)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-tied"])
def test_adapters_of_tied_layers_are_stored(kind: str, tmp_path: Path) -> None:
    """Of an adapter that a tied embedding and head share, the name under which it trains was dropped as an alias of the
    other, and the other as no adapter's."""
    lora = {"target_modules": ["c_attn"], "trainable_token_indices": [3, 4]}
    tiny_backbone(kind, 53, 2).save_pretrained(tmp_path / "speech")
    speech = TowerSpec(source=str(tmp_path / "speech"), train="lora", lora=lora)
    model = ZipperModel.fuse({"text": tiny_backbone("llama", 31, 2), "speech": speech})
    trained = {id(p) for p in model.tower("speech").backbone.parameters() if p.requires_grad}
    own = checkpoint.split(model).values()
    assert trained <= {id(p) for p in model.parameters() if any(p.data_ptr() == t.data_ptr() for t in own)}


def test_what_a_tower_is_loaded_from_is_not_overwritten(tmp_path: Path) -> None:
    """The only copy of a frozen backbone became a checkpoint that names itself as that backbone's place."""
    model = ZipperModel.from_pretrained(saved(tmp_path))
    before = (tmp_path / "text" / "config.json").read_bytes()
    for folder in (tmp_path / "text", tmp_path):
        with pytest.raises(ValueError, match="would replace tower 'text'"):
            model.save_pretrained(folder, overwrite=True)
    assert (tmp_path / "text" / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"unknown argument bundle_tower"):
        model.save_pretrained(tmp_path / "more", bundle_tower=True)
