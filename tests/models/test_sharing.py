"""What is uploaded: whole, loadable elsewhere, without a word about this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from tiny import doc, open_gates, tiny_backbone, tiny_model
from tiny_hub import Hub
from tiny_recipes import tiny_recipe, workshop

from zipper_lm import TowerSpec, ZipperModel
from zipper_lm.codecs.codec import load_codec
from zipper_lm.data.collation import collate
from zipper_lm.jobs.fuse import fuse
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.card import is_edited
from zipper_lm.models.sharing import push, staged


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    for name, kind in (("text", "llama"), ("speech", "gpt2-tied")):
        tiny_backbone(kind, 31, 2).save_pretrained(tmp_path / "here" / name)
    return {name: tmp_path / "here" / name for name in ("text", "speech")}


def logits_of(model: ZipperModel) -> torch.Tensor:
    batch = collate([doc(("speech", [5, 6, 7]), ("text", [4, 9, 3]))], model.specials)
    with torch.no_grad():
        return model(batch).logits["text"]


def texts_in(folder: Path) -> str:
    return "\n".join(p.read_text() for p in folder.rglob("*") if p.suffix in (".json", ".md"))


@pytest.mark.parametrize("train", ["frozen", "lora", "full"])
def test_it_loads_where_the_towers_are_not(train: str, sources: dict[str, Path], tmp_path: Path, hub: Hub) -> None:
    model = ZipperModel.fuse(sources, train={"speech": train})
    open_gates(model, 0.4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    push(model, "me/shared", token="t")
    shutil.rmtree(tmp_path / "here")
    assert (hub.root / "me/shared/towers/speech").exists() == (train != "full")
    assert torch.equal(logits_of(ZipperModel.from_pretrained(hub.root / "me/shared")), logits_of(model))
    assert str(tmp_path) not in texts_in(hub.root)
    card = (hub.root / "me/shared/README.md").read_text()
    assert 'from_pretrained("me/shared")' in card
    assert "All weights are here." in card
    assert "a folder, `speech` (its weights are here)" in card


def with_places(folder: Path) -> Path:
    """A checkpoint whose config names files of the machine that it was made on, also in a part of it."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"tokenizer_path": "/data/team/tok.model", "sound_config": {"codebook": "/data/team/codes.pt"}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("train", ["frozen", "lora", "full"])
def test_a_config_that_names_a_file_of_this_machine(train: str, sources: dict[str, Path], hub: Hub) -> None:
    """The path was cut in the model's config, where it counted in the fingerprint, and stayed in the tower's own: the
    path was uploaded, and nobody could load the model."""
    with_places(sources["speech"])
    model = ZipperModel.fuse(sources, train={"speech": train})
    open_gates(model, 0.4)
    push(model, "me/shared", token="t")
    assert "/data/team" not in texts_in(hub.root)
    shutil.rmtree(sources["speech"])
    again = ZipperModel.from_pretrained(hub.root / "me/shared")
    assert torch.equal(logits_of(again), logits_of(model))
    push(again, "me/again", token="t")
    assert torch.equal(logits_of(ZipperModel.from_pretrained(hub.root / "me/again")), logits_of(model))


def test_a_tower_of_the_hub_whose_config_names_a_file(
    sources: dict[str, Path], hub_cache, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays there, path and all; the record of it that is uploaded has no path. The two must still be the same."""
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 31, 2)})
    for file in Path(cache["cache_dir"]).rglob("config.json"):
        with_places(file.parent)
    with monkeypatch.context() as alone:
        alone.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        model = ZipperModel.fuse({"text": "org/text", "speech": sources["speech"]}, **cache)
    push(model, "me/shared", token="t")
    assert "/data/team" not in texts_in(hub.root)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    again = ZipperModel.from_pretrained(hub.root / "me/shared", **cache)
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_single_decoder_whose_config_names_a_file(tmp_path: Path, hub: Hub) -> None:
    shutil.copytree(workshop() / "text", tmp_path / "text")
    codecs = {name: load_codec(workshop() / name) for name in ("text", "speech")}
    model = expand("text", with_places(tmp_path / "text"), codecs)
    model.push_to_hub("shared", token="t")
    assert "/data/team" not in texts_in(hub.root)
    again = SingleDecoder.from_pretrained(hub.root / "me/shared")
    batch = collate([doc(("speech", [3, 4]), ("text", [4, 5]), target=True)], model.specials)
    assert torch.equal(model(batch).logits["decoder"], again(batch).logits["decoder"])


def test_records_go_along_without_places(tmp_path: Path, hub: Hub) -> None:
    fuse(tiny_recipe(tmp_path / "m"))
    push(ZipperModel.from_pretrained(tmp_path / "m"), "me/shared", kept=tmp_path / "m", token="t")
    run = json.loads((hub.root / "me/shared/run.json").read_text())
    assert run["data"]["source"] == run["recipe"]["data"]["source"] == "data"
    assert (hub.root / "me/shared/generation.json").is_file()
    assert not (hub.root / "me/shared/logs").exists()
    assert "| Steps | 2" in (hub.root / "me/shared/README.md").read_text()
    for private in (tmp_path, workshop()):
        assert str(private) not in texts_in(hub.root)


@pytest.mark.parametrize("bundle", [False, True])
def test_a_tower_of_the_hub_is_bundled_only_if_asked(
    bundle: bool, sources: dict[str, Path], hub_cache, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 31, 2)})
    with monkeypatch.context() as alone:  # else it asks, and asks again, where nobody answers
        alone.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        model = ZipperModel.fuse({"text": "org/text", "speech": sources["speech"]}, **cache)
    push(model, "me/shared", token="t", bundle_towers=bundle)
    shared = hub.root / "me/shared"
    assert {p.name for p in (shared / "towers").iterdir()} == ({"text", "speech"} if bundle else {"speech"})
    config = json.loads((shared / "config.json").read_text())["towers"]["text"]
    assert (config["source"], config["revision"]) == (("towers/text", None) if bundle else ("org/text", "a" * 40))
    card = (shared / "README.md").read_text()
    assert "base_model:\n- org/text\n" in card
    assert f"`{'a' * 40}`" in card
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(ZipperModel.from_pretrained(shared, **cache)), logits_of(model))


def test_a_single_decoder(tmp_path: Path, hub: Hub) -> None:
    codecs = {name: load_codec(workshop() / name) for name in ("text", "speech")}
    model = expand("text", workshop() / "text", codecs)
    model.push_to_hub("shared", token="t")
    again = SingleDecoder.from_pretrained(hub.root / "me/shared")
    batch = collate([doc(("speech", [3, 4]), ("text", [4, 5]), target=True)], model.specials)
    assert torch.equal(model(batch).logits["decoder"], again(batch).logits["decoder"])
    assert str(workshop()) not in texts_in(hub.root)
    assert "a folder, `text` (its weights are here)" in (hub.root / "me/shared/README.md").read_text()


def test_what_is_gone_is_removed_there(sources: dict[str, Path], hub: Hub) -> None:
    push(ZipperModel.fuse(sources), "me/shared", token="t")
    push(ZipperModel.fuse(sources, train={"speech": "full"}), "me/shared", token="t")
    assert not (hub.root / "me/shared/towers/speech/model.safetensors").exists()
    ZipperModel.from_pretrained(hub.root / "me/shared")


def test_records_that_are_gone_are_removed_there(tmp_path: Path, hub: Hub) -> None:
    """Run and scores of an earlier upload stayed beside other weights, and told their readers the wrong thing."""
    for name in ("run.json", "results.json", "generation.json"):
        (tmp_path / name).write_text("{}")
    push(tiny_model(), "me/shared", kept=tmp_path, token="t")
    push(tiny_model(), "me/shared", token="t")
    assert not {"run.json", "results.json", "generation.json"} & {p.name for p in (hub.root / "me/shared").iterdir()}


def test_no_place_within_a_text_is_uploaded(tmp_path: Path, hub: Hub) -> None:
    """Only texts that were a path as a whole were cut: the reasons why items were left out told where they lie."""
    broken = [{"source": "row 3", "reason": "/home/me/secret/a.wav: no such file"}]
    (tmp_path / "run.json").write_text(json.dumps({"broken": broken, "signatures": ["see '/home/me/my own/x'"]}))
    (tmp_path / "results.json").write_text(json.dumps([{"where": ["file=/home/me/x", "speaker=a/b"]}]))
    push(tiny_model(), "me/shared", kept=tmp_path, token="t")
    assert json.loads((hub.root / "me/shared/run.json").read_text()) == {"broken": 1, "signatures": ["see 'x'"]}
    assert json.loads((hub.root / "me/shared/results.json").read_text()) == [{"where": ["file=x", "speaker=a/b"]}]


def test_of_a_relative_path_only_the_last_part_is_uploaded(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe's own words went along: only of absolute paths the folders were left out."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(workshop() / "data", "secret/client")
    recipe = tiny_recipe(Path("secret/out/m"), data={"source": "secret/client"})
    fuse(recipe)
    push(ZipperModel.from_pretrained("secret/out/m"), "me/shared", kept="secret/out/m", token="t")
    assert "secret" not in texts_in(hub.root)
    assert json.loads((hub.root / "me/shared/run.json").read_text())["recipe"]["data"]["source"] == "client"


def test_private_is_not_public(hub: Hub) -> None:
    """The Hub leaves a repository that is there as it is: what was to be private was uploaded to a public one."""
    push(tiny_model(), "me/public", token="t")
    hub.calls.clear()
    with pytest.raises(ValueError, match=r"'me/public': private was asked for.*public"):
        push(tiny_model(), "me/public", token="t", private=True)
    assert "upload_folder" not in hub.calls
    for _ in range(2):
        push(tiny_model(), "me/private", token="t", private=True)
    assert "upload_folder" in hub.calls


def test_saving_and_pushing_takes_what_lies_beside(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_pretrained(..., push_to_hub=True)` left the edited card and the records in the folder where they were, and
    had no name for the folder "."."""
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path / "shared")
    for name, content in (("README.md", "mine"), ("generation.json", '{"text": {}}')):
        Path(name).write_text(content)
    tiny_model().save_pretrained(".", push_to_hub=True, token="t")
    assert (hub.root / "me/shared/README.md").read_text() == "mine"
    assert (hub.root / "me/shared/generation.json").read_text() == '{"text": {}}'


def test_an_edited_card_wins(tmp_path: Path, hub: Hub) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path / "m")
    there, here = hub.root / "me/shared/README.md", tmp_path / "m/README.md"
    push(model, "me/shared", kept=tmp_path / "m", token="t")
    assert not is_edited(there)
    assert 'from_pretrained("me/shared")' in there.read_text()
    there.write_text("edited there")
    push(model, "me/shared", kept=tmp_path / "m", token="t")
    assert there.read_text() == "edited there"
    here.write_text("edited here")
    push(model, "me/shared", kept=tmp_path / "m", token="t")
    assert there.read_text() == "edited here"


def test_branches_and_pull_requests(hub: Hub) -> None:
    push(tiny_model(), "me/shared", token="t", revision="v1", create_pr=True, private=True)
    assert hub.calls["create_repo"]["private"] is True
    assert hub.calls["create_branch"]["branch"] == "v1"
    assert (hub.calls["upload_folder"]["revision"], hub.calls["upload_folder"]["create_pr"]) == ("v1", True)
    hub.calls.clear()
    push(tiny_model(), "me/shared", token="t", revision="refs/pr/3")
    assert "create_branch" not in hub.calls


@pytest.mark.parametrize(
    ("repo_id", "message"), [("a/b/c", "a/b/c"), ("me/no spaces", "alphanumeric"), ("me/x--y", "--"), ("", "Repo id")]
)
def test_ids_that_cannot_be(repo_id: str, message: str, hub: Hub) -> None:
    with pytest.raises(ValueError, match=message):
        push(tiny_model(), repo_id, token="t")
    assert not hub.calls


def test_no_token_and_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zipper_lm.models.sharing.get_token", lambda: None)
    with pytest.raises(ValueError, match=r"me/shared.*no token here.*hf auth login"):
        push(tiny_model(), "me/shared")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"me/shared.*offline mode is on"):
        push(tiny_model(), "me/shared", token="t")
    assert not hub.calls


def test_the_hubs_refusal_is_one_clear_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("403 Forbidden\nsee the log")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"^push to 'me/shared': 403 Forbidden$"):
        push(tiny_model(), "me/shared", token="t")


def test_code_that_nobody_else_has(sources: dict[str, Path], hub: Hub) -> None:
    model = ZipperModel.fuse({**sources, "text": TowerSpec(source=str(sources["text"]), trust_remote_code=True)})
    with pytest.raises(ValueError, match=r"'text' runs code of its own from a folder"):
        push(model, "me/shared", token="t")
    assert not hub.calls


def test_a_record_that_cannot_be_read(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json beside the model is not readable"):
        push(tiny_model(), "me/shared", kept=tmp_path, token="t")
    assert not hub.calls


def test_staging_leaves_nothing_behind() -> None:
    with staged(tiny_model(), "me/shared") as folder:
        assert (folder / "model.safetensors").is_file()
    assert not folder.parent.exists()
