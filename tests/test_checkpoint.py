"""What contract 6 (tests/contracts/test_checkpoint_contract.py) does not say: ownership, warnings, adapters."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import RevisionNotFoundError
from tiny import tiny_backbone, tiny_model
from tiny_recipes import workshop
from transformers import AutoConfig

from zipper_lm import TowerSpec, ZipperModel, checkpoint
from zipper_lm.backbones import weights_hash
from zipper_lm.baselines.single_decoder import SingleDecoder, expand
from zipper_lm.modality.codec import load_codec


def test_split_is_by_ownership() -> None:
    """A tower called like a child of the model does not confuse it."""
    model = ZipperModel.fuse({"zips": tiny_backbone("llama", 31), "towers": tiny_backbone("gpt2", 53)})
    own = checkpoint.split(model)
    assert not any(k.startswith("towers.") for k in own)
    assert sum(v.numel() for v in own.values()) == model.num_parameters(only_trainable=True)


def test_an_argument_without_effect_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        ZipperModel.from_pretrained(tmp_path / "model", device_map="auto")
    assert "['device_map'] have no effect" in caplog.text


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
    ZipperModel.from_pretrained(snapshot)


def test_where_a_single_decoders_base_came_from(tmp_path: Path, hub_cache) -> None:
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 32, 2)}, card="---\nlicense: mit\n---\n")
    codecs = {name: load_codec(workshop() / name) for name in ("text", "speech")}
    expand("text", "org/text", codecs, **cache).save_pretrained(tmp_path / "single")
    spec = SingleDecoder.from_pretrained(tmp_path / "single").config.spec
    assert (spec.source, spec.revision, spec.license) == ("org/text", "a" * 40, "mit")
    assert spec.weights_hash == weights_hash(tiny_backbone("llama", 32, 2))  # before it was expanded
