"""What a text decoder has forgotten: its perplexity on text, and its own answers to plain questions, beside those of
the checkpoint that it came from.

It is asked as itself, without zips. A single decoder, whose vocabulary was expanded, is held to the ids that it had
before: it is asked as what it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from zipper_lm.codecs.text import TextCodec
from zipper_lm.data.collation import IGNORED
from zipper_lm.evaluation.preservation import load_source
from zipper_lm.evaluation.word_error_rate import normalise
from zipper_lm.generation.bare import chat_prompt, has_chat_template, write_greedily
from zipper_lm.generation.writer import Writer
from zipper_lm.utils.json_files import parse_json
from zipper_lm.utils.processes import shared

FORGETTING = "forgetting"
"""What it is called among tasks."""

QUESTIONS = Path(__file__).with_name("questions.jsonl")
"""Two hundred plain ones, and what a right answer may hold."""

ANSWER_TOKENS = 24
BATCH = 20
TOLD = 20
"""Answers that changed which a summary shows."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something to ask. `answers`: words of which a right answer holds one; none if that is unknown."""

    text: str
    answers: tuple[str, ...] = ()

    def is_right(self, said: str) -> bool:
        """Whether what was said holds one of the answers, as whole words."""
        words = f" {normalise(said)} "
        return any(f" {normalise(answer)} " in words for answer in self.answers)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What one decoder knows.

    Attributes:
        nats: of all text, summed. tokens, characters: in it. answers: to the questions, in order.
    """

    nats: float
    tokens: int
    characters: int
    answers: list[str] = field(repr=False)

    def summary(self, questions: Sequence[Question]) -> dict[str, Any]:
        """For JSON; a perplexity beyond all numbers is `None`."""
        mean = self.nats / self.tokens
        return {
            "perplexity": round(math.exp(mean), 4) if mean < 700 else None,
            "nats_per_token": round(mean, 6),
            "bits_per_character": round(self.nats / math.log(2) / self.characters, 6),
            "right": sum(map(Question.is_right, questions, self.answers)),
        }


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """A decoder before and after.

    Attributes:
        before, after: what it came from, and what became of it. questions: that both were asked.
    """

    before: Knowledge
    after: Knowledge
    questions: list[Question] = field(repr=False)

    @property
    def same(self) -> int:
        """How many answers are the same, to the letter."""
        return sum(a == b for a, b in zip(self.before.answers, self.after.answers))

    def summary(self) -> dict[str, Any]:
        """For JSON, with the first `TOLD` answers that changed."""
        changed = [
            {"question": question.text, "before": before, "after": after}
            for question, before, after in zip(self.questions, self.before.answers, self.after.answers)
            if before != after
        ]
        return {
            "tokens": self.before.tokens,
            "characters": self.before.characters,
            "before": self.before.summary(self.questions),
            "after": self.after.summary(self.questions),
            "questions": len(self.questions),
            "same_answers": self.same,
            "changed": changed[:TOLD],
        }


def read_questions(file: str | Path = QUESTIONS) -> list[Question]:
    """Questions of a JSONL file: a line is ``{"text": ..., "answers": [...]}``; `answers` may be left out.

    Raises:
        ValueError: if it cannot be read, or a line is something else.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"questions: {file} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line, where := f"questions: {file}:{number}")
        text, answers = (row.get("text"), row.get("answers", [])) if isinstance(row, dict) else (None, None)
        if not isinstance(text, str) or not normalise(text):
            raise ValueError(f"{where}: expected an object with a text")
        if not isinstance(answers, list) or not all(isinstance(a, str) and normalise(a) for a in answers):
            raise ValueError(f"{where}: answers must be a list of texts, got {answers!r:.80}")
        found.append(Question(text=text, answers=tuple(answers)))
    if not found:
        raise ValueError(f"questions: {file} has none")
    return found


def measure_forgetting(
    model: Writer,
    texts: Sequence[str],
    questions: Sequence[Question] | None = None,
    *,
    name: str = "text",
    folder: str | Path | None = None,
    **hub: Any,
) -> Forgetting:
    """Ask the text decoder of a model, and the checkpoint that it came from, the same. Several processes share it.

    Questions are put by the tokenizer's chat template, if it has one, else as ``Question: ... Answer:``, if it can
    spell that, else as they are; answers are greedy, of at most `ANSWER_TOKENS` tokens. Each text is read from BOS (EOS
    where there is none) on, and all of its tokens count. Where a tokenizer lacks punctuation, the words alone are read.

    Args:
        model: with a processor. texts: that it was not trained on. questions: `None` is `QUESTIONS`.
        name: the modality. folder: where the model was loaded from, for towers stored beside it. hub: see `fuse`.

    Raises:
        ValueError: if the model has no such decoder, or nothing is recorded of where it came from; without a text; for
            a text or question whose words the tokenizer cannot spell.
    """
    decoder, codec = model.backbones().get(name), model.processor.codecs.get(name) if model.processor else None
    if decoder is None or not isinstance(codec, TextCodec):
        raise ValueError(f"forgetting: the model has no pre-trained decoder {name!r} with a tokenizer")
    codec = codec.plain  # as itself
    asked = list(questions) if questions is not None else read_questions()
    read = [[codec.bos_id, *ids] for ids in (_spelled(codec, text) for text in texts) if ids]
    if not read or not asked:
        raise ValueError(f"forgetting: {'no text' if not read else 'no questions'}")
    characters = sum(len(codec.decode([row[1:]])[0]) for row in read)
    prompts = [_prompt(codec, question.text) for question in asked]
    source: Any = load_source(model, name, folder, **hub)
    source.to(decoder.device)
    size = int(source.get_input_embeddings().weight.shape[0])
    known = [_knowledge(each, codec, size, read, prompts, characters) for each in (source, decoder)]
    return Forgetting(before=known[0], after=known[1], questions=asked)


def _spelled(codec: TextCodec, text: str) -> list[int]:
    """Ids of a text, or of its words alone, where the tokenizer has no punctuation."""
    try:
        return codec.encode([text])[0]
    except ValueError:
        return codec.encode([normalise(text)])[0]


def _prompt(codec: TextCodec, question: str) -> list[int]:
    if has_chat_template(codec):
        return chat_prompt(codec, [{"role": "user", "content": question}])
    try:
        return [codec.bos_id, *codec.encode([f"Question: {question} Answer:"])[0]]
    except ValueError:
        return [codec.bos_id, *_spelled(codec, question)]


@torch.no_grad()
def _knowledge(
    decoder: PreTrainedModel,
    codec: TextCodec,
    size: int,
    read: Sequence[list[int]],
    prompts: Sequence[list[int]],
    characters: int,
) -> Knowledge:
    """Args: `size`: ids that count. `read`, `prompts`: rows of ids."""
    with _at_rest(decoder):
        lost = [x for part in shared(_parts(read), partial(_nats, decoder, codec, size)) for x in part]
        said = [x for part in shared(_parts(prompts), partial(_answers, decoder, codec, size)) for x in part]
    tokens = sum(len(row) - 1 for row in read)
    by_length = [i for part in _parts(prompts) for i in part[0]]
    answers = [text for _, text in sorted(zip(by_length, said))]
    return Knowledge(nats=math.fsum(lost), tokens=tokens, characters=characters, answers=answers)


@contextmanager
def _at_rest(decoder: PreTrainedModel) -> Iterator[None]:
    was_training = decoder.training
    decoder.eval()
    try:
        yield
    finally:
        decoder.train(was_training)


Part = tuple[list[int], list[list[int]]]
"""The numbers of some rows, and they themselves."""


def _parts(rows: Sequence[list[int]]) -> list[Part]:
    """Rows of like lengths together."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    cuts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [(cut, [rows[i] for i in cut]) for cut in cuts]


def _nats(decoder: PreTrainedModel, codec: TextCodec, size: int, part: Part) -> list[float]:
    """Summed next-token loss of each row."""
    rows = part[1]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [codec.pad_id] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = decoder(input_ids=ids.to(decoder.device), attention_mask=mask.to(decoder.device), use_cache=False).logits
    wanted = ids.where(mask.bool(), IGNORED)[:, 1:].to(decoder.device)
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1, :size].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    )
    return [float(nats) for nats in each.double().sum(1)]


def _answers(decoder: PreTrainedModel, codec: TextCodec, size: int, part: Part) -> list[str]:
    """What is written after each prompt."""
    return write_greedily(decoder, codec, part[1], ANSWER_TOKENS, size)
