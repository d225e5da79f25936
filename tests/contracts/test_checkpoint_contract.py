"""Contract 6: a checkpoint is a folder of known files; nothing is loaded onto what it was not made for."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import doc, open_gates, tiny_backbone, tiny_model
from tiny_hub import Hub
from transformers import AutoConfig, AutoModel, AutoProcessor

from zipper_lm import TowerSpec, ZipperConfig, ZipperModel, ZipperProcessor, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.models import checkpoint

FILES = {"config.json", "model.safetensors", "processor_config.json", "README.md", "architecture.png"}
DOCUMENTS = [doc(("speech", [5, 6, 7, 8]), ("text", [4, 9, 3])), doc(("text", [4, 9]), ("speech", [9, 8, 7]))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    for name, kind, vocab in (("text", "llama", 31), ("speech", "gpt2-tied", 53)):
        tiny_backbone(kind, vocab).save_pretrained(folder / name)
    return {n: folder / n for n in ("text", "speech")}


def fused(sources: dict[str, Path], **kwargs: object) -> ZipperModel:
    torch.manual_seed(0)
    model = ZipperModel.fuse(sources, zips=ZipSpec(layers=2), **kwargs)  # type: ignore[arg-type]
    open_gates(model, 0.4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def files_in(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def logits_of(model: ZipperModel) -> torch.Tensor:
    with torch.no_grad():
        return model(collate(DOCUMENTS, model.specials)).logits["text"]


@pytest.fixture
def saved(sources: dict[str, Path], tmp_path: Path) -> Path:
    fused(sources).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- what is in it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "more"),
    # llama of 4 layers: 9 tensors each, embedding, norm, head; LoRA: two matrices on 7 linears of 4 layers
    [({}, 0), ({"text": "full"}, 4 * 9 + 3), ({"text": "lora"}, 2 * 7 * 4)],
    ids=str,
)
def test_files_tensors_and_round_trip(
    sources: dict[str, Path], tmp_path: Path, choice: dict[str, str], more: int
) -> None:
    model = fused(sources, train=choice)
    model.save_pretrained(tmp_path / "model")
    assert files_in(tmp_path / "model") == FILES
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    zips = 2 * 2 * (4 + 2 + 4 + 2 + 1)  # 2 directions, 2 layers: projection, norm, q k v o, position scales, gate
    assert len(tensors) == zips + 2 * 6 + 2 * 4 + 1 + more  # input projections, handover heads, handover_start
    loaded = ZipperModel.from_pretrained(tmp_path / "model")
    own, again = checkpoint.split(model), checkpoint.split(loaded)
    assert own.keys() == again.keys() == tensors.keys()
    assert all(torch.equal(own[k], again[k]) and own[k].dtype == again[k].dtype for k in own)
    assert torch.equal(logits_of(model), logits_of(loaded))
    assert not loaded.training
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == trainable == set(own)


def test_a_trained_bfloat16_tower_with_tied_weights(sources: dict[str, Path], tmp_path: Path) -> None:
    model = fused(sources, train={"speech": "full"}, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    loaded = ZipperModel.from_pretrained(tmp_path / "model")
    for name in ("text", "speech"):
        assert loaded.tower(name).backbone.dtype == torch.bfloat16
    assert {p.dtype for p in loaded.zips.parameters()} == {torch.float32}
    assert torch.equal(logits_of(model), logits_of(loaded))
    backbone = loaded.tower("speech").backbone
    assert backbone.get_input_embeddings().weight is backbone.get_output_embeddings().weight


def test_what_the_config_records(saved: Path, sources: dict[str, Path]) -> None:
    towers = json.loads((saved / "config.json").read_text())["towers"]
    for name, path in sources.items():
        assert towers[name]["source"] == str(path)
        assert len(towers[name]["weights_hash"]) == 64
        assert towers[name]["backbone"]["dtype"] == "float32"
    spec = ZipperConfig.from_pretrained(saved).tower_specs["text"]
    assert len(spec.config_hash) == 64
    with safe_open(saved / "model.safetensors", "pt") as stored:
        assert stored.metadata()["config"] == ZipperConfig.from_pretrained(saved).fingerprint


def test_saving_is_deterministic(sources: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a", "b"):
        fused(sources).save_pretrained(tmp_path / name / "model")
    for file in files_in(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_auto_classes(saved: Path) -> None:
    assert type(AutoConfig.from_pretrained(saved)) is ZipperConfig
    model = AutoModel.from_pretrained(saved)
    assert type(model) is ZipperModel
    assert torch.equal(logits_of(model), logits_of(ZipperModel.from_pretrained(saved)))
    assert type(AutoProcessor.from_pretrained(saved)) is ZipperProcessor


def test_towers_without_a_source_go_along(tmp_path: Path) -> None:
    model = tiny_model(gate=0.5)
    model.save_pretrained(tmp_path / "a")
    assert {"towers/text/model.safetensors", "towers/speech/config.json"} <= files_in(tmp_path / "a")
    loaded = ZipperModel.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")  # and on, to where the first folder is not
    shutil.rmtree(tmp_path / "a")
    assert torch.equal(logits_of(ZipperModel.from_pretrained(tmp_path / "b")), logits_of(model))


# --- what is refused ---------------------------------------------------------------------------------------------


def test_another_backbone_is_refused_by_name(saved: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    other, wider = tiny_backbone("llama", 31, seed=7), tiny_backbone("llama", 33)
    with pytest.raises(ValueError, match="'text': same config but other weights"):
        ZipperModel.from_pretrained(saved, towers={"text": other})
    with pytest.raises(ValueError, match=r"'text': the backbone's config differs.*vocab_size.*31, 33"):
        ZipperModel.from_pretrained(saved, towers={"text": wider})
    with pytest.raises(ValueError, match=r"'text': .*config differs"):
        ZipperModel.from_pretrained(saved, towers={"text": sources["speech"]})
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="'text': same config but other weights"):
        ZipperModel.from_pretrained(saved, towers={"text": tmp_path / "other"}, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"towers= names \['image'\]"):
        ZipperModel.from_pretrained(saved, towers={"image": other})
    same = ZipperModel.from_pretrained(saved, towers={"text": tiny_backbone("llama", 31)})
    assert torch.equal(logits_of(same), logits_of(ZipperModel.from_pretrained(saved)))


def test_a_moved_source(saved: Path, sources: dict[str, Path], tmp_path: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["towers"]["text"]["source"] = str(tmp_path / "gone")
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gone.*no such folder"):
        ZipperModel.from_pretrained(saved)
    ZipperModel.from_pretrained(saved, towers={"text": sources["text"]})


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "file", "garbage"])
def test_tensors_that_do_not_fit(saved: Path, damage: str) -> None:
    file = saved / "model.safetensors"
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    name = "zips.text.speech.0.gate.weight"
    if damage == "missing":
        del tensors[name]
    elif damage == "extra":
        tensors["zips.text.speech.0.gate.bias"] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(2)
    save_file(tensors, file, metadata)
    if damage == "file":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(b"not tensors")
    message = {
        "missing": rf"missing tensors \['{name}'\]",
        "extra": r"unknown \['zips.text.speech.0.gate.bias'\]",
        "shape": rf"{name} is \[2\], the model needs \[1\]",
    }.get(damage, r"model.safetensors: cannot be read")
    with pytest.raises(ValueError, match=message):
        ZipperModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("zips", 0, "source_layers"), [0, 1], "config.json was changed"),
        (("towers", "text", "bos_token_id"), 5, "config.json was changed"),
        (("towers", "text", "bos_token_id"), 99, "bos_token_id=99"),
        (("towers", "text", "backbone", "rms_norm_eps"), 0.5, "'text'.*config differs.*rms_norm_eps"),
        (("towers", "text", "backbone", "model_type"), "gpt2", "config.json was changed"),
        (("towers", "text", "colour"), "red", r"unknown fields \['colour'\]"),
        (("zips", 0, "positions"), "sideways", "zip.positions must be one of"),
        (("zips", 0, "layers"), 3, "explicit layers"),
    ],
    ids=str,
)
def test_a_changed_config(saved: Path, path: tuple, value: object, message: str) -> None:
    config = json.loads((saved / "config.json").read_text())
    at = config
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        ZipperModel.from_pretrained(saved)


def test_fields_of_a_later_transformers(saved: Path) -> None:
    """A recorded config that lacks a field this version has is still the same backbone."""
    config = json.loads((saved / "config.json").read_text())
    assert config["towers"]["text"]["backbone"].pop("attention_bias") is False
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="changed"):  # the fingerprint, not the backbone
        ZipperModel.from_pretrained(saved)
    spec = ZipperConfig.from_pretrained(saved).tower_specs["text"]
    checkpoint.check_same_backbone("text", spec, tiny_backbone("llama", 31))


def test_no_folder() -> None:
    with pytest.raises(ValueError, match="no such folder"):
        ZipperModel.from_pretrained("nowhere/at-all")


# --- saving goes wrong -------------------------------------------------------------------------------------------


def test_an_existing_checkpoint_is_not_replaced_unasked(saved: Path, sources: dict[str, Path]) -> None:
    other = fused(sources)
    with torch.no_grad():
        other.handover_start.fill_(3.0)
    with pytest.raises(ValueError, match="overwrite=True"):
        other.save_pretrained(saved)
    (saved / "notes.txt").write_text("mine")
    other.save_pretrained(saved, overwrite=True)
    assert (ZipperModel.from_pretrained(saved).handover_start == 3.0).all()
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("where", ["weights", "config", "first rename", "last rename"])
def test_a_full_disk(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, existing: bool
) -> None:
    folder = tmp_path / "deep" / "model"
    model = fused(sources)
    if existing:
        model.save_pretrained(folder)
        before = {f: (folder / f).read_bytes() for f in files_in(folder)}
    with torch.no_grad():
        model.handover_start.fill_(3.0)
    full = OSError(errno.ENOSPC, "No space left on device")
    renames: list[object] = []

    def partial_save(_tensors: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise full

    def failing_replace(source: object, target: object, real=os.replace) -> None:  # type: ignore[no-untyped-def]
        renames.append(target)
        # The card's two files are renamed as they are written. Of five the config comes last.
        if len(renames) > 2 + (0 if where == "first rename" else 4):
            raise full
        real(source, target)  # type: ignore[arg-type]

    def failing_config(*_: object, **__: object) -> None:
        raise full

    if where == "weights":
        monkeypatch.setattr(checkpoint, "save_file", partial_save)
    elif where == "config":
        monkeypatch.setattr(ZipperConfig, "save_pretrained", failing_config)
    else:
        monkeypatch.setattr(os, "replace", failing_replace)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(folder, overwrite=True)
    monkeypatch.undo()
    if existing:
        assert {f: (folder / f).read_bytes() for f in files_in(folder)} == before
        assert {p.name for p in folder.iterdir()} == set(before)
        ZipperModel.from_pretrained(folder)
    else:
        assert not (tmp_path / "deep").exists()


def test_an_unwritable_output(sources: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(ValueError, match="cannot write to"):
            fused(sources).save_pretrained(path)


# --- the Hub -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_push_to_hub(sources: dict[str, Path], tmp_path: Path, hub: Hub, way: str) -> None:
    model = fused(sources)
    if way == "push_to_hub":
        commit = model.push_to_hub("zipped", private=True, token="t", commit_message="first")
        assert commit.oid == "0" * 40
    else:
        model.save_pretrained(tmp_path / "zipped", push_to_hub=True, private=True, token="t", commit_message="first")
    assert hub.calls["create_repo"] == {"repo_id": "me/zipped", "token": "t", "private": True, "exist_ok": True}
    assert hub.calls["upload_folder"]["commit_message"] == "first"
    # Towers that live in a folder of this machine go along: nobody else has that folder.
    bundles = {f"towers/{n}/{f}" for n in sources for f in files_in(sources[n])}
    assert files_in(hub.root / "me/zipped") == {*FILES, *bundles}
    assert torch.equal(logits_of(ZipperModel.from_pretrained(hub.root / "me/zipped")), logits_of(model))


def test_hub_id_from_the_cache(sources: dict[str, Path], tmp_path: Path) -> None:
    """Offline, a Hub id is found in the cache; the commit is recorded, and asked for when loading again."""
    commits = {"a" * 40: 0, "b" * 40: 5}
    root = tmp_path / "cache" / "models--org--text"
    for commit, seed in commits.items():
        tiny_backbone("llama", 31, seed=seed).save_pretrained(root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("a" * 40)
    cache = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    model = ZipperModel.fuse({"text": "org/text", "speech": sources["speech"]}, **cache)
    assert model.config.tower_specs["text"].source == "org/text"
    assert model.config.tower_specs["text"].revision == "a" * 40
    model.save_pretrained(tmp_path / "model")
    (root / "refs" / "main").write_text("b" * 40)  # the Hub moves on
    loaded = ZipperModel.from_pretrained(tmp_path / "model", **cache)
    assert torch.equal(logits_of(loaded), logits_of(model))
    with pytest.raises(ValueError, match=r"org/absent.*the cache does not have it"):
        ZipperModel.fuse({"text": "org/absent", "speech": sources["speech"]}, **cache)


REMOTE_CODE = """
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput

class OddConfig(PreTrainedConfig):
    model_type = "odd"
    def __init__(self, vocab_size=31, hidden_size=12, num_hidden_layers=3, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)

class OddLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(2 * width, width)
    def forward(self, x):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return x + self.mix(torch.cat([x, past], -1)).tanh()

class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    _no_split_modules = ["OddLayer"]
    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(OddLayer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()
    def get_input_embeddings(self):
        return self.embed
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}
    def forward(self, input_ids, attention_mask=None, **kwargs):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return CausalLMOutput(logits=self.head(x))
"""


def test_remote_code_only_when_asked(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    source = tmp_path / "odd_model"
    source.mkdir()
    (source / "modeling_odd.py").write_text(REMOTE_CODE)
    names = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = {"model_type": "odd", "auto_map": names, "architectures": ["OddForCausalLM"], **special}
    (source / "config.json").write_text(json.dumps(config))
    shapes = {"embed.weight": (31, 12), "head.weight": (31, 12), "head.bias": (31,)}
    for k in range(3):
        shapes |= {f"blocks.{k}.mix.weight": (12, 24), f"blocks.{k}.mix.bias": (12,)}
    save_file({n: torch.randn(s) for n, s in shapes.items()}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="trust_remote_code"):
        ZipperModel.fuse({"text": source, "speech": sources["speech"]})
    for train in ("frozen", "full"):
        spec = TowerSpec(source=str(source), trust_remote_code=True, train=train)  # type: ignore[arg-type]
        model = ZipperModel.fuse({"text": spec, "speech": sources["speech"]}, zips=ZipSpec(layers=2, gate_start=0.5))
        assert model.tower("text").depth == 3
        model.save_pretrained(tmp_path / train)
        with pytest.raises(ValueError, match="trust_remote_code"):  # also in a folder: anybody may have written it
            ZipperModel.from_pretrained(tmp_path / train)
        loaded = ZipperModel.from_pretrained(tmp_path / train, trust_remote_code=True)
        assert torch.equal(logits_of(loaded), logits_of(model))
        settings = {"text": {"max_new_tokens": 4}}
        assert len(model.generate([doc(("speech", [5, 6]))], ["text"], settings=settings)[0]) == 2
