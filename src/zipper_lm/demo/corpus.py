"""The demo's sentences, speakers and splits: connected digits and short commands, all generated.

- Every split is half digits (one to five words), half commands (from the small grammar below).
- The judge knows more than all others: words, accents and speeds that are in no other split.
- Test, validation and judge each own sentences and speakers (espeak-ng variants) that no other split has.
  The unaligned splits and train share a pool of both, as unaligned and aligned data do in the world.
- Sound is rendered only when asked for, and is the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from zipper_lm.experiments.corpora.voices import VARIANTS, Voice, synthesise, voices

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_SLOTS: dict[str, tuple[str, ...]] = {
    "switch": ("on", "off"),
    "room": ("kitchen", "bedroom", "bathroom", "garage", "garden", "office"),
    "device": ("light", "lamp", "fan", "heater", "radio"),
    "some": ("some", "more"),
    "genre": ("jazz", "rock", "quiet", "happy", "piano"),
    "open": ("open", "close", "lock"),
    "door": ("door", "window", "gate"),
    "digit": DIGITS[2:],
    "count": (*DIGITS[2:], "ten", "twenty", "thirty", "forty"),
    "unit": ("seconds", "minutes", "hours"),
    "clock": ("timer", "alarm"),
    "new": ("new", "last"),
    "half": ("thirty", "fifteen"),
    "time": ("morning", "evening"),
    "person": ("anna", "peter", "maria", "my brother", "my sister", "the doctor"),
    "when": ("now", "again", "today", "tomorrow"),
    "city": ("london", "paris", "madrid", "boston"),
    "weather": ("weather", "time", "news"),
    "food": ("bread", "milk", "apples", "coffee", "butter", "rice"),
    "raise": ("raise", "lower"),
    "level": ("volume", "heater"),
    "warmer": ("warmer", "cooler", "brighter", "darker"),
}
_COMMANDS = (
    "turn {switch} the {room} {device}",
    "turn {switch} the {device} in the {room}",
    "play {some} {genre} music in the {room}",
    "play {genre} music {when}",
    "{open} the {room} {door}",
    "set the {clock} to {count} {unit}",
    "set the {clock} for {digit} {half} in the {time}",
    "wake me at {digit} {half} in the {time}",
    "call {person} {when}",
    "read the {new} message from {person}",
    "send a message to {person} at {digit} {half}",
    "what is the {weather} in {city} {when}",
    "add {food} and {food} to my list",
    "add {count} {food} to my list",
    "{raise} the {level} to {count}",
    "make the {room} {warmer}",
)
_NAMES = ("switch", "room", "device", "open", "door")
WORDS = frozenset(("please", "turn", "the", "in", *DIGITS, *(word for name in _NAMES for word in _SLOTS[name])))
"""Of all splits but the judge's."""
ACCENT, SPEEDS = "en-us", range(150, 176)
"""Of their speakers: espeak-ng's language, and words per minute."""
_POLITE = ("{}", "please {}", "{} please")

_LENGTH_WEIGHTS = (0.06, 0.16, 0.26, 0.28, 0.24)  # share of digit sentences of one to five words

# (share of the sentences, share of the speakers, voices) of each pool; train and unaligned data share "common".
_POOLS = {
    "test": (0.1, 0.12, 400),
    "validation": (0.1, 0.09, 320),
    "judge": (0.25, 0.3, 800),
    "common": (0.55, 0.49, 8000),
}


@dataclass(frozen=True)
class Utterance:
    """A sentence and who says it; `seed` is the small variation of this one time (see `synthesise`)."""

    text: str
    voice: Voice
    seed: int

    def render(self) -> np.ndarray:
        """Its sound: float32 ``[samples]`` at 16 kHz."""
        return synthesise(self.text, self.voice, self.seed)


@dataclass(frozen=True, kw_only=True)
class DemoCorpus:
    """The splits of the demo.

    Args:
        unaligned_text: sentences for the text tower.
        unaligned_speech: sound for codec and speech tower; its texts are not to be used.
        judge: pairs for the independent recogniser.
        train: aligned pairs for the zips.
        validation: aligned pairs for choosing a checkpoint.
        test: aligned pairs for the report.
    """

    unaligned_text: list[str]
    unaligned_speech: list[Utterance]
    judge: list[Utterance]
    train: list[Utterance]
    validation: list[Utterance]
    test: list[Utterance]


def commands() -> list[list[str]]:
    """Every command of the grammar once, in a fixed order, one list per template."""
    return [[polite.format(c) for c in _expand(template) for polite in _POLITE] for template in _COMMANDS]


def demo_corpus(
    seed: int = 0,
    *,
    unaligned_text: int = 20_000,
    unaligned_speech: int = 4_000,
    judge: int = 4_000,
    train: int = 1_200,
    validation: int = 60,
    test: int = 100,
    train_readings: int = 1,
) -> DemoCorpus:
    """Draw all splits. The numbers are sizes; the same seed gives the same corpus.

    With `train_readings` above 1, every train sentence is spoken so many times, each time by another draw of the
    voices: ``train * train_readings`` utterances.

    A split that does not exceed its pool holds no sentence twice; changing the size of one split changes no
    other.

    Raises:
        ValueError: a size is below 2, or `train_readings` below 1.
    """
    sizes = {
        "unaligned_text": unaligned_text,
        "unaligned_speech": unaligned_speech,
        "judge": judge,
        "train": train,
        "validation": validation,
        "test": test,
    }
    for name, size in sizes.items():
        if size < 2:
            raise ValueError(f"{name} must be at least 2, got {size}")
    if train_readings < 1:
        raise ValueError(f"train_readings must be at least 1, got {train_readings}")
    rng = np.random.default_rng([seed, 0])
    digits, spoken_commands, speakers = _pools(seed, rng)

    def draw(number: int, split: str) -> tuple[list[str], list[Utterance]]:
        pool = split if split in _POOLS else "common"
        split_rng = np.random.default_rng([seed, 1, number])
        half = sizes[split] // 2
        offered, chosen = spoken_commands[pool], speakers[pool]
        if split != "judge":
            offered = [[text for text in group if set(text.split()) <= WORDS] for group in offered]
            chosen = [voice for voice in chosen if voice.language == ACCENT and voice.speed in SPEEDS]
        sentences = _draw(digits[pool], _LENGTH_WEIGHTS, half, split_rng)
        sentences += _draw([group for group in offered if group], None, sizes[split] - half, split_rng)
        sentences = [sentences[i] for i in split_rng.permutation(len(sentences))]
        spoken = []
        for _ in range(train_readings if split == "train" else 1):
            turns = split_rng.permutation(len(sentences)) % len(chosen)
            seeds = split_rng.integers(2**31, size=len(sentences))
            spoken += [Utterance(text, chosen[turn], int(s)) for text, turn, s in zip(sentences, turns, seeds)]
        return sentences, spoken

    drawn = {split: draw(number, split) for number, split in enumerate(sizes)}
    return DemoCorpus(
        unaligned_text=drawn["unaligned_text"][0],
        unaligned_speech=drawn["unaligned_speech"][1],
        judge=drawn["judge"][1],
        train=drawn["train"][1],
        validation=drawn["validation"][1],
        test=drawn["test"][1],
    )


def render(utterances: Sequence[Utterance], progress: Callable[[int, int], None] | None = None) -> Iterator[np.ndarray]:
    """The sound of each utterance, in order, made when asked for.

    Args:
        utterances: what to speak.
        progress: called with (done, total) after each.

    Yields:
        float32 ``[samples]`` at 16 kHz.
    """
    for done, utterance in enumerate(utterances, start=1):
        yield utterance.render()
        if progress is not None:
            progress(done, len(utterances))


def _expand(template: str) -> list[str]:
    """All sentences of one template; a slot named twice takes two different words."""
    pieces = template.split()
    choices = [_SLOTS[p[1:-1]] if p.startswith("{") else (p,) for p in pieces]
    twice = len(set(pieces)) < len(pieces)
    expanded = []
    for words in product(*choices):
        slots = [w for w, p in zip(words, pieces) if p.startswith("{")]
        if not twice or len(set(slots)) == len(slots):
            expanded.append(" ".join(words))
    return expanded


_Pools = dict[str, list[list[str]]]


def _pools(seed: int, rng: np.random.Generator) -> tuple[_Pools, _Pools, dict[str, list[Voice]]]:
    """Per pool of `_POOLS`: digit sentences by length, commands by template, and voices; all disjoint."""
    digits: _Pools = {name: [] for name in _POOLS}
    spoken_commands: _Pools = {name: [] for name in _POOLS}
    sentence_shares = [share for share, _, _ in _POOLS.values()]
    for length in range(1, len(_LENGTH_WEIGHTS) + 1):
        strings = [" ".join(words) for words in product(DIGITS, repeat=length)]
        for name, part in zip(_POOLS, _partition(strings, sentence_shares, rng)):
            digits[name].append(part)
    for sentences in commands():
        for name, part in zip(_POOLS, _partition(sentences, sentence_shares, rng)):
            spoken_commands[name].append(part)
    variants = _partition(list(VARIANTS), [share for _, share, _ in _POOLS.values()], rng)
    speakers = {name: voices(count, seed, tuple(part)) for (name, (_, _, count)), part in zip(_POOLS.items(), variants)}
    return digits, spoken_commands, speakers


def _partition(items: list[str], shares: Sequence[float], rng: np.random.Generator) -> list[list[str]]:
    """Shuffle and cut into disjoint parts of the given shares."""
    order = rng.permutation(len(items))
    ends = np.round(np.cumsum(shares) * len(items)).astype(int)
    return [[items[i] for i in part] for part in np.split(order, ends[:-1])]


def _draw(
    groups: Sequence[list[str]], weights: Sequence[float] | None, count: int, rng: np.random.Generator
) -> list[str]:
    """`count` sentences, from the groups by weight; none again before all have been drawn."""
    share = np.ones(len(groups)) if weights is None else np.array(weights)
    drawn: list[str] = []
    stacks: list[list[str]] = [[] for _ in groups]
    while len(drawn) < count:
        if not any(stacks):
            stacks = [[group[i] for i in rng.permutation(len(group))] for group in groups]
        left = share * [bool(stack) for stack in stacks]
        drawn.append(stacks[rng.choice(len(groups), p=left / left.sum())].pop())
    return drawn
