"""The model card: facts from the files beside a model, code that runs, and respect for what a person wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from tiny import tiny_backbone, tiny_model
from tiny_recipes import say, tiny_recipe, workshop

from zipper_lm import ZipperModel, ZipSpec
from zipper_lm.codecs.audio import write_audio
from zipper_lm.codecs.codec import load_codec
from zipper_lm.codecs.text import TextCodec
from zipper_lm.jobs.fuse import fuse
from zipper_lm.models.baseline.expand import expand
from zipper_lm.models.baseline.single_decoder import SingleDecoder
from zipper_lm.models.card import is_edited, refresh_card
from zipper_lm.models.records import add_result, weights_digest
from zipper_lm.utils.hub import license_of


def with_codecs(towers: int) -> ZipperModel | SingleDecoder:
    """A fresh model over the workshop's towers; the third has no codec; one is the single decoder."""
    here = workshop()
    sources = {name: here / name for name in ("text", "speech")}
    if towers == 1:
        return expand("text", here / "text", {name: load_codec(path) for name, path in sources.items()})
    image = {"image": tiny_backbone("qwen3", 41, 2)} if towers == 3 else {}
    return ZipperModel.fuse({**sources, **image}, zips=ZipSpec(layers=2))


def body(folder: Path) -> str:
    return (folder / "README.md").read_text()


def head(folder: Path) -> dict:
    return ModelCard(body(folder)).data.to_dict()


@pytest.mark.parametrize("towers", [1, 2, 3])
def test_the_snippet_runs(towers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with_codecs(towers).save_pretrained(tmp_path / "shared")
    write_audio(tmp_path / "input.wav", say("one two"))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", body(tmp_path / "shared"), re.M | re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["written"]) == 2
    assert names["written"][-1].ids is not None
    assert capsys.readouterr().out


def test_the_snippet_gives_only_what_the_tokenizer_knows(tmp_path: Path) -> None:
    towers = {name: workshop() / name for name in ("text", "speech")}
    one_way = ZipSpec(reader="speech", source="text", layers=1)
    model = ZipperModel.fuse(towers, codecs={"text": TextCodec.train(["abc"], vocab_size=8)}, zips=one_way)
    model.save_pretrained(tmp_path / "abc")
    assert 'Segment("text", ids=[' in body(tmp_path / "abc")
    ZipperModel.fuse(towers, zips=one_way).save_pretrained(tmp_path / "words")
    assert 'Document([("text", "one two")])' in body(tmp_path / "words")


@pytest.mark.parametrize("schedule", ["speech->text", "text->speech"])
def test_the_snippet_is_of_the_weightiest_task(schedule: str, tmp_path: Path) -> None:
    model = with_codecs(2)
    model.save_pretrained(tmp_path, card=False)
    recipe = {"tasks": {"text->speech": 1.0, "speech->text": 1.0, schedule: 2.0, "->text": 3.0}}
    run = {"recipe": recipe, "weights": weights_digest(tmp_path), "parameters": {"all": 2, "trained": 1}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "generation.json").write_text(json.dumps({"text": {"max_new_tokens": 7}}))
    refresh_card(tmp_path, model)
    given, target = schedule.split("->")
    assert f'Document([("{given}", ' in body(tmp_path)
    assert ("'max_new_tokens': 7" in body(tmp_path)) == (target == "text")


def test_what_a_run_and_an_evaluation_leave(tmp_path: Path) -> None:
    folder = tmp_path / "spoken"
    fuse(tiny_recipe(folder))
    text = body(folder)
    assert "12 rows of split `train` and 4 rows of split `validation`" in text
    assert "| Steps | 2, kept:" in text
    assert "all tensors of `text` were still bit-identical" in text
    assert "No evaluation of these weights is recorded" in text
    assert head(folder)["pipeline_tag"] == "any-to-any"
    scores = {"wer": 12.5, "cer": 6.0, "wer_95": [1.0, 20.0], "utterances": 4}
    entry = {"template": "speech->text", "data": "org/digits", "split": "test", "weights": weights_digest(folder)}
    add_result(folder, {**entry, **scores})
    add_result(folder, {**entry, **scores, "limit": 1, "wer": 77.0})
    refresh_card(folder, ZipperModel.from_pretrained(folder))
    assert "| `speech->text` | `org/digits`, split `test` | 4 | 12.5 (1.0 to 20.0) | 6.0 |" in body(folder)
    assert "split `test`, first 1 |" in body(folder)
    (index,) = head(folder)["model-index"]
    assert index["name"] == "spoken"
    (result,) = index["results"]  # a score on one row is no score on the split
    assert result["task"]["type"] == "automatic-speech-recognition"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {"wer": 12.5, "cer": 6.0}
    for private in (tmp_path, workshop()):
        assert str(private) not in body(folder)


def with_run(folder: Path, **fields: object) -> ZipperModel:
    """A saved model with a record of its training."""
    model = with_codecs(2)
    model.save_pretrained(folder, card=False)
    run = {"recipe": {"tasks": {"speech->text": 1.0}}, "parameters": {"all": 2, "trained": 1}, **fields}
    (folder / "run.json").write_text(json.dumps({**run, "weights": weights_digest(folder)}))
    return model


@pytest.mark.parametrize(
    ("source", "named"),
    [("org/digits:clean", ["org/digits"]), ("data/shards-*.tar", None), ("/home/me/data", None), ("digits", None)],
)
def test_only_data_of_the_hub_is_named_in_the_head(source: str, named: list[str] | None, tmp_path: Path) -> None:
    """A relative pattern of tars was taken for a data set's id on the Hub."""
    refresh_card(tmp_path, with_run(tmp_path, data={"source": source}))
    assert head(tmp_path).get("datasets") == named


def test_a_folder_that_is_gone_is_no_base_model(tmp_path: Path) -> None:
    """A relative folder looks like an id on the Hub: the head named it as base model, and the card linked to it."""
    model = tiny_model()
    model.config.towers["text"]["source"] = "outputs/text"
    model.save_pretrained(tmp_path)
    assert "base_model" not in head(tmp_path)
    assert "huggingface.co/outputs" not in body(tmp_path)
    assert "say where `text` (a folder named `outputs/text`) is" in body(tmp_path)


def test_no_place_within_a_text_gets_in(tmp_path: Path) -> None:
    """Only texts that were a path as a whole were cut: messages and conditions told the folders of this machine."""
    model = with_run(tmp_path, signatures=["tower from /home/me/secret: drifted"])
    entry = {"template": "speech->text", "data": "a/b", "split": "test", "weights": weights_digest(tmp_path)}
    scores = {"wer": 12.5, "cer": 6.0, "utterances": 4}
    add_result(tmp_path, {**entry, **scores, "where": ["file=/home/me/secret/x.wav"]})
    refresh_card(tmp_path, model)
    assert "split `test`, file=x.wav" in body(tmp_path)
    assert "tower from secret: drifted" in body(tmp_path)
    assert "/home" not in body(tmp_path)


def test_the_snippet_prints_ids_where_there_is_no_way_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a codec without a way back, such as units without a vocoder, the snippet printed None."""
    model = with_codecs(2)
    monkeypatch.setattr("zipper_lm.models.card.body.can_decode", lambda codec: codec.kind == "text")
    for reader, shown in (("speech", "ids"), ("text", "value")):
        monkeypatch.setattr(model, "layer_pairs", {(reader, "text" if reader == "speech" else "speech"): [(1, 1)]})
        model.save_pretrained(tmp_path / reader)
        assert f"print(written[-1].{shown})" in body(tmp_path / reader)


def test_a_score_in_another_dtype_says_so(tmp_path: Path) -> None:
    """With `--dtype` there were two entries that nothing told apart, and both stood in the head."""
    model = with_run(tmp_path)
    entry = {"data": "a/b", "split": "test", "weights": weights_digest(tmp_path)}
    scored = {**entry, "template": "speech->text", "cer": 6.0, "utterances": 4}
    for wer, dtype in ((12.5, None), (12.5, "float32"), (40.0, "bfloat16")):
        add_result(tmp_path, {**scored, "wer": wer, **({"dtype": dtype} if dtype else {})})
    told = {"same_answers": 3, "questions": 4, "before": {"perplexity": 2.0}, "after": {"perplexity": 2.5}}
    add_result(tmp_path, {**entry, "template": "forgetting", "dtype": "bfloat16", **told})
    refresh_card(tmp_path, model)
    assert "split `test`, in bfloat16 | 4 | 40.0" in body(tmp_path)
    assert body(tmp_path).count(", in ") == 1, "float32 is as it is stored"
    assert "Asked as itself (in bfloat16), the text decoder gives 3 of 4" in body(tmp_path)
    values = {m["value"] for result in head(tmp_path)["model-index"][0]["results"] for m in result["metrics"]}
    assert values == {12.5, 6.0}


def test_what_a_model_was_started_from(tmp_path: Path) -> None:
    """It stood nowhere that a model had been trained before."""
    before = {"source": "/home/me/secret/one", "steps": 2000, "data": "org/pairs:en"}
    model = with_run(tmp_path, started_from={"source": "me/two", "started_from": before})
    refresh_card(tmp_path, model)
    assert "| Started from | `me/two`; that from `one`, of 2000 steps on `org/pairs:en` |" in body(tmp_path)
    assert "secret" not in body(tmp_path)


def test_records_of_other_weights_do_not_count(tmp_path: Path) -> None:
    fuse(tiny_recipe(tmp_path / "m"))
    model = ZipperModel.from_pretrained(tmp_path / "m")
    scores = {"wer": 12.5, "cer": 6.0, "utterances": 4, "template": "speech->text", "data": "a/b", "split": "test"}
    add_result(tmp_path / "m", {**scores, "weights": weights_digest(tmp_path / "m")})
    model.save_pretrained(tmp_path / "m", overwrite=True)
    assert "| Steps | 2" in body(tmp_path / "m")
    assert "12.5" in body(tmp_path / "m")
    with torch.no_grad():
        model.handover_start.add_(1.0)
    model.save_pretrained(tmp_path / "m", overwrite=True)
    assert "No record of the training" in body(tmp_path / "m")
    assert "12.5" not in body(tmp_path / "m")


@pytest.mark.parametrize("content", ["{", "[1]", '{"wer": 1}', "[]"])
def test_files_of_another_origin_do_not_keep_a_model_from_being_saved(content: str, tmp_path: Path) -> None:
    for name in ("run.json", "results.json", "generation.json"):
        (tmp_path / name).write_text(content)
    tiny_model().save_pretrained(tmp_path)
    assert "No evaluation of these weights is recorded" in body(tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_an_edited_card_stays(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert not is_edited(tmp_path / "README.md")
    mine = body(tmp_path).replace("# ", "# My ", 1)
    (tmp_path / "README.md").write_text(mine)
    model.save_pretrained(tmp_path, overwrite=True)
    assert refresh_card(tmp_path, model) is False
    assert body(tmp_path) == mine
    (tmp_path / "README.md").unlink()
    model.save_pretrained(tmp_path, overwrite=True)
    assert not is_edited(tmp_path / "README.md")


def test_a_card_that_was_there_first_stays(tmp_path: Path) -> None:
    """As in a clone of a new repository."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    tiny_model().save_pretrained(tmp_path)
    assert body(tmp_path) == "---\nlicense: mit\n---\n"
    ZipperModel.from_pretrained(tmp_path)


def test_licences_are_the_towers_own(tmp_path: Path) -> None:
    for name, license in (("text", "license: mit"), ("speech", "license: other\nlicense_name: units-1.0")):
        tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\n{license}\n---\n# A tower\n")
    towers = {name: tmp_path / name for name in ("text", "speech")}
    ZipperModel.fuse(towers).save_pretrained(tmp_path / "two")
    assert "| Tower `text` | mit |" in body(tmp_path / "two")
    assert "| Tower `speech` | other (units-1.0) |" in body(tmp_path / "two")
    assert "| New weights | unknown" in body(tmp_path / "two")
    assert "license" not in head(tmp_path / "two")
    (tmp_path / "speech" / "README.md").write_text("---\nlicense: mit\n---\n")
    ZipperModel.fuse(towers).save_pretrained(tmp_path / "same")
    assert head(tmp_path / "same")["license"] == "mit"
    loaded = ZipperModel.from_pretrained(tmp_path / "same")
    assert loaded.config.tower_specs["text"].license == "mit"


@pytest.mark.parametrize(
    ("stated", "license", "name"),
    [
        ("license: other\nlicense_name: units, 1.0", "other", "units, 1.0"),
        ("license: other", "other", None),
        ("license: [mit, apache-2.0]", None, None),
        ("license: [mit]", "mit", None),
    ],
)
def test_the_head_names_a_licence_as_the_hub_does(
    stated: str, license: str | None, name: str | None, tmp_path: Path
) -> None:
    """A licence's own name, and several with commas between, stood in the head as if they were the Hub's names."""
    (tmp_path / "README.md").write_text(f"---\n{stated}\n---\n")
    model = tiny_model()
    for spec in model.config.towers.values():
        spec["license"] = license_of(tmp_path)
    model.save_pretrained(tmp_path / "m")
    assert (head(tmp_path / "m").get("license"), head(tmp_path / "m").get("license_name")) == (license, name)


@pytest.mark.parametrize("card", [None, "no head", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense:\n---\n"])
def test_a_card_that_says_no_licence(card: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert license_of(tmp_path) is None


def test_towers_by_id_and_commit(tmp_path: Path, hub_cache) -> None:
    cache = hub_cache("org/text", {"a" * 40: tiny_backbone("llama", 31, 2)}, card="---\nlicense: apache-2.0\n---\n")
    tiny_backbone("llama", 31, 2).save_pretrained(tmp_path / "speech-tower")
    model = ZipperModel.fuse({"text": "org/text", "speech": tmp_path / "speech-tower"}, **cache)
    model.save_pretrained(tmp_path / "m")
    assert head(tmp_path / "m")["base_model"] == ["org/text"]
    text = body(tmp_path / "m")
    digest = model.config.tower_specs["text"].weights_hash
    assert f"[org/text](https://huggingface.co/org/text) | `{'a' * 40}` | " in text
    assert f"`{digest}`" in text
    assert "| a folder, `speech-tower` | - |" in text
    assert "The weights of `speech` and `text` are not here" in text
    assert "say where `speech` (a folder named `speech-tower`) is" in text
    assert "| Tower `text` | apache-2.0 |" in text
    assert str(tmp_path) not in text


def test_codecs_around_models_name_them(tmp_path: Path) -> None:
    model = with_codecs(2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "codecs" / "speech" / "codec.json"
    models = {"model": {"source": "org/units", "revision": "c" * 40}, "vocoder": {"source": "model", "revision": None}}
    file.write_text(json.dumps(json.loads(file.read_text()) | models))
    refresh_card(tmp_path, model)
    assert f"`org/units` at `{'c' * 40}` and one kept beside it |" in body(tmp_path)


def test_the_picture_shows_the_zips(tmp_path: Path) -> None:
    pictures = {}
    for name, layers, read in (("few", 1, None), ("many", 3, None), ("again", 3, None), ("below", 3, "embeddings")):
        tiny_model(3, zips=ZipSpec(layers=layers, source_layers=read)).save_pretrained(tmp_path / name)
        pictures[name] = np.asarray(Image.open(tmp_path / name / "architecture.png").convert("RGB")).astype(int)
    few, many = ((p.max(-1) - p.min(-1) > 40).sum() for p in (pictures["few"], pictures["many"]))
    assert many > 1.5 * few > 0  # what is coloured are towers' names, layers with zips, and arrows
    assert (pictures["many"] == pictures["again"]).all()
    changed = (pictures["below"] != pictures["many"]).any(-1)
    beneath = int(0.92 * len(changed))  # where no layer is: arrows begin there, and none did
    assert changed[beneath:].any()
    assert "| `text` | `speech` | 0 <- embeddings, 2 <- embeddings, 3 <- embeddings |" in body(tmp_path / "below")
