"""Joint CTC: what a zip remembers of a sound spells what is written from it, in training alone."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import tiny_model
from tiny_recipes import tiny_recipe
from tiny_steps import DOCUMENTS, Documents, check_same, lettered, letters, spelled_step, spoken
from transformers import TrainingArguments

from zipper_lm import Document, Segment, ZipSpec
from zipper_lm.data.collation import collate
from zipper_lm.jobs.fuse import fuse
from zipper_lm.jobs.recipes.checks import check_recipe
from zipper_lm.models.zipper import ZipperModel
from zipper_lm.training.ctc import CLASSES, Ctc, Spelled, ctc
from zipper_lm.training.trainer import ZipperTrainer

PAIR = ("text", "speech")
HEARD = spoken([4, 9, 9], [5, 6, 7, 8, 9], reads=True)
LONGER = spoken([12, 4, 7, 11], [9, 6, 7, 5, 4, 8, 10, 11], reads=True)


def made(decode: Any = letters, **more: Any) -> ZipperModel:
    return lettered(tiny_model(gate=0.5, kinds={"speech": "qwen3"}, **more), decode)


def cost(model: ZipperModel, loss: Ctc, documents: list[Document], **how: Any) -> torch.Tensor:
    batch = collate(documents, model.specials, **how)
    with loss.watch(model, batch, loss.counts(batch)) as costs:
        model(batch)
    return torch.stack(costs).sum()


def test_the_cost_is_the_sum_over_all_spellings() -> None:
    """By hand: every way to say a blank, a letter or another at each of four places that comes to the text."""
    torch.manual_seed(0)
    memory, head = torch.randn(2, 6, 3), torch.nn.Linear(3, 4)
    text = Spelled(row=1, read=torch.tensor([1, 2, 4, 5]), letters=[2, 1])
    said = head(memory[1, [1, 2, 4, 5]]).softmax(-1).tolist()
    total = 0.0
    for path in itertools.product(range(4), repeat=4):
        merged = [symbol for symbol, _ in itertools.groupby(path) if symbol]
        if merged == text.letters:
            total += math.prod(said[time][symbol] for time, symbol in enumerate(path))
    assert ctc(memory, head, [text]).item() == pytest.approx(-math.log(total), rel=1e-5)
    other = Spelled(row=0, read=torch.tensor([0, 1]), letters=[3])
    both = ctc(memory, head, [other, text])
    torch.testing.assert_close(both, ctc(memory, head, [other]) + ctc(memory, head, [text]))


def test_a_token_may_spell_at_several_places() -> None:
    """By hand, over the places of all tokens in order: two a token, where three letters stand beside two tokens."""
    torch.manual_seed(0)
    memory, head = torch.randn(1, 3, 3), torch.nn.Linear(3, 2 * 4)
    text = Spelled(row=0, read=torch.tensor([0, 2]), letters=[2, 1, 3], places=2)
    said = head(memory[0, [0, 2]]).unflatten(1, (2, 4)).flatten(0, 1).softmax(-1).tolist()
    total = 0.0
    for path in itertools.product(range(4), repeat=4):
        if [symbol for symbol, _ in itertools.groupby(path) if symbol] == text.letters:
            total += math.prod(said[place][symbol] for place, symbol in enumerate(path))
    assert ctc(memory, head, [text]).item() == pytest.approx(-math.log(total), rel=1e-5)


def test_a_token_has_no_more_places_than_most_texts_need() -> None:
    """Codecs of 12.5 tokens a second have fewer tokens than letters: joint CTC refused these."""
    model = made()
    dense = [spoken([4, 9, 12, 4, 9, 5, 4], [5, 6], reads=True)] * 3
    loss = Ctc(model, {PAIR: 1.0}, [*dense, HEARD])
    assert loss.places == {PAIR: 2}
    assert Ctc(model, {PAIR: 1.0}, [*dense, HEARD, LONGER, HEARD]).places == {PAIR: 1}
    batch = collate([*dense, HEARD], model.specials)
    assert loss.counts(batch) == {PAIR: 3 * 7 + 3}
    cost(model, loss, [*dense, HEARD]).backward()
    assert all(p.grad.abs().sum() > 0 for head in loss.heads[0] for p in head.parameters())  # type: ignore[union-attr]


def test_small_letters_of_the_target_are_spelled() -> None:
    model = made()
    found = Ctc(model, {PAIR: 1.0}).spelled(collate([HEARD, *DOCUMENTS[:1]], model.specials), PAIR)
    assert [each.letters for each in found] == [[1 + ord(letter) for letter in "ejj"]]
    assert found[0].read.tolist() == list(range(7)), "BOS and EOS of the sound are there to be used, too"


def test_each_text_is_spelled_by_the_sound_before_it() -> None:
    """In a document of several turns the second text is not looked for in the first sound."""
    model = made()
    batch = collate([Document([*HEARD, *LONGER])], model.specials)
    found = Ctc(model, {PAIR: 1.0}).spelled(batch, PAIR)
    assert [each.read.tolist() for each in found] == [list(range(7)), list(range(7, 17))]
    assert [len(each.letters) for each in found] == [3, 4]


def test_what_is_read_wrongly_is_spelled_rightly() -> None:
    """History dropout shows the tower wrong ids; the label is what was said."""
    model = made()
    wrong = Document([HEARD[0], Segment("text", ids=[3, 3, 3], labels=[4, 9, 9], target=True)])
    loss = Ctc(model, {PAIR: 1.0})
    spelled = [loss.spelled(collate([each], model.specials), PAIR)[0].letters for each in (HEARD, wrong)]
    assert spelled[0] == spelled[1]


def test_a_text_that_is_too_long_or_empty_is_not_counted() -> None:
    model = made()
    loss = Ctc(model, {PAIR: 1.0})
    short = spoken([4, 4, 4, 4], [5, 6, 7], reads=True)  # 5 tokens with BOS and EOS, but 3 repetitions need 7
    empty = spoken([], [5, 6, 7], reads=True)
    torch.testing.assert_close(cost(model, loss, [HEARD, short, empty]), cost(model, loss, [HEARD]))
    assert loss.counts(collate([short, empty], model.specials)) == {PAIR: 0}


def test_a_batch_costs_what_its_documents_do() -> None:
    """Padding, documents that share a row, and rows that are not read make no difference: letters count alike."""
    model = made()
    loss = Ctc(model, {PAIR: 1.0})
    alone = [cost(model, loss, [document]) for document in (HEARD, LONGER)]
    expected = (3 * alone[0] + 4 * alone[1]) / 7
    said = spoken([4, 9], [5, 6, 7], reads=False)
    long = spoken([12, 4, 7, 11, 4, 5, 6, 7, 8], [9, 6, 7] * 6, reads=True)
    for documents in ([HEARD, LONGER], [said, LONGER, HEARD]):
        torch.testing.assert_close(cost(model, loss, documents), expected)
    torch.testing.assert_close(cost(model, loss, [LONGER, HEARD], side="left"), expected)
    documents = [LONGER, long, said, HEARD]
    assert len(collate(documents, model.specials, packing=True)["text"]["input_ids"]) == 3
    torch.testing.assert_close(cost(model, loss, documents, packing=True), cost(model, loss, documents))


def test_gradients_reach_what_remembers_and_what_is_read() -> None:
    model = made(train={"speech": "full"})
    loss = Ctc(model, {PAIR: 1.0})
    cost(model, loss, [HEARD, LONGER]).backward()
    for k in range(3):
        assert model.zip_layer(*PAIR, k).memory_projection[1].weight.grad.abs().sum() > 0
    assert model.zip_layer(*PAIR, 2).q_proj.weight.grad is None, "who looks where does not matter"
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.tower("speech").backbone.parameters())
    assert not any(module._forward_hooks for module in model.modules()), "nobody watches afterwards"


@pytest.mark.parametrize(("batch", "accumulated"), [(2, 2), (1, 4)])
def test_accumulation_is_one_large_batch(batch: int, accumulated: int) -> None:
    documents = [*DOCUMENTS[:2], HEARD, LONGER]
    whole = spelled_step(4, 1, documents)
    assert whole[1]["loss_ctc"] > 1
    assert any("spelling" in name for name in whole[0])
    check_same(spelled_step(batch, accumulated, documents), whole)
    check_same(spelled_step(4, 1, documents, packing=True), whole)


def test_heads_learn_by_their_own_gradients_alone(tmp_path: Path) -> None:
    """Trainer clears the gradients of the model, of which they are no part."""
    model = made()
    arguments = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], disable_tqdm=True, save_strategy="no")
    trainer = ZipperTrainer(model, arguments, Documents([HEARD, LONGER]), ctc={PAIR: 1.0})
    assert trainer.spelling is not None
    before = [p.detach().clone() for p in trainer.spelling.parameters()]
    trainer.train()
    assert all(not torch.equal(p, old) for p, old in zip(trainer.spelling.parameters(), before))
    assert not any(p.grad is not None and p.grad.any() for p in trainer.spelling.parameters())


def test_it_is_part_of_the_loss_and_of_no_checkpoint(tmp_path: Path) -> None:
    runs = [
        fuse(tiny_recipe(tmp_path / name, training={"steps": 1, **more}))
        for name, more in (("plain", {}), ("spelled", {"ctc": {"speech->text": 0.5}}))
    ]
    before, after = (next(e for e in run["history"] if "loss" in e) for run in runs)
    assert 0 < after["loss_ctc"] < 0.5 * 20 * math.log(CLASSES)
    assert after["loss"] == pytest.approx(before["loss"] + after["loss_ctc"], abs=2e-3)
    kept = []
    for name in ("plain", "spelled"):
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            kept.append(set(file.keys()))
    assert kept[0] == kept[1]
    files = [{p.name for p in (tmp_path / n).rglob("*") if "events" not in p.name} for n in ("plain", "spelled")]
    assert files[0] == files[1]


def test_a_resumed_run_goes_on_with_its_heads(tmp_path: Path) -> None:
    def losses(resume: bool) -> list[float]:
        model = made(train={"speech": "full"})
        given = TrainingArguments(
            str(tmp_path),
            max_steps=4,
            save_steps=2,
            logging_steps=1,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        documents = Documents([HEARD, LONGER] * 8)
        trainer = ZipperTrainer(model, given, documents, ctc={PAIR: 1.0}, fade_out=1.0)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return [entry["loss_ctc"] for entry in trainer.state.log_history if "loss_ctc" in entry]

    torch.manual_seed(0)
    whole = losses(resume=False)
    torch.manual_seed(5)  # other heads, had they not been kept
    assert losses(resume=True) == whole


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ({"speech->image": 1.0}, {}, r"names 'speech->image', but the tasks are \['speech->text'"),
        ({"->text": 1.0}, {"tasks": {"->text": 1}}, "'->text' does not go from one modality to one other"),
        ({"speech->text": 1.0}, {"architecture": "single-decoder"}, "is for zips; architecture 'single-decoder'"),
        ({"speech->text": -1.0}, {}, r"speech->text must be at least 0, got -1"),
    ],
)
def test_refused(weights: dict[str, float], more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.ctc.*" + message):
        check_recipe(tiny_recipe(tmp_path / "m", training={"ctc": weights}, **more))


def test_what_cannot_be_spelled_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.ctc: 'text->speech' writes what is no text"):
        fuse(tiny_recipe(tmp_path / "m", training={"ctc": {"text->speech": 1.0}}))
    assert not (tmp_path / "m").exists()
    dense = [spoken([4, 9, 12] * 11, [5, 6], reads=True)] * 3 + [HEARD]  # 33 letters, 4 tokens with BOS and EOS
    with pytest.raises(ValueError, match=r"'speech->text': most of 4 texts have more than 8 letters for each token"):
        ZipperTrainer(made(), TrainingArguments(str(tmp_path)), Documents(dense), ctc={PAIR: 1.0})
    bare = tiny_model(gate=0.5)
    with pytest.raises(ValueError, match=r"training\.ctc spells what is written, but \['text'\] have no codecs"):
        ZipperTrainer(bare, TrainingArguments(str(tmp_path)), Documents([HEARD]), ctc={PAIR: 1.0})


@pytest.mark.parametrize("field", ["guided", "ctc", "forward_sum"])
def test_a_pair_without_zips_is_refused(field: str, tmp_path: Path) -> None:
    model = made(zips=[ZipSpec(reader="speech", source="text", layers=2)])
    with pytest.raises(ValueError, match=r"names 'speech->text', but no zip lets text read speech"):
        ZipperTrainer(model, TrainingArguments(str(tmp_path)), Documents([HEARD]), **{field: {PAIR: 1.0}})
