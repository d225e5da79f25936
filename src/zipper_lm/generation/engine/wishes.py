"""Which settings of a segment an engine follows in its step, and what they come to there."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from transformers import GenerationConfig

from zipper_lm.fusion.limits import keep_within
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.generation.candidates import samples_of, wants_scores
from zipper_lm.generation.engine.choice import Wish
from zipper_lm.generation.logits import StopStrings
from zipper_lm.generation.sampling import Draw
from zipper_lm.generation.segment import unwritten_ids
from zipper_lm.generation.settings import BEST_BY, FOLLOWED, SEED, STOP_THRESHOLD

IN_THE_STEP = {
    *(BEST_BY, STOP_THRESHOLD, SEED, "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample"),
    *("num_return_sequences", "output_scores", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("suppress_tokens", "guidance_scale", "stop_strings", "disable_compile"),
}


def not_in_the_step(given: GenerationConfig) -> str | None:
    """A setting that only the plain path follows, as ``name=value``; `None` if there is none."""
    without = GenerationConfig._get_default_generation_params()
    for key in sorted(FOLLOWED - IN_THE_STEP):
        value = getattr(given, key, None)
        if value is not None and value != without.get(key) and not (key == "use_cache" and value is True):
            return f"{key}={value!r}"
    return None


@dataclass(frozen=True)
class Wanted:
    """What one segment asks of the step.

    Attributes:
        wishes: one for each sample. most: tokens of each at most. strings: that end it; `None`: there are none.
    """

    wishes: list[Wish]
    most: int
    strings: StopStrings | None

    @property
    def rows(self) -> int:
        """How many rows it takes."""
        return sum(wish.rows for wish in self.wishes)


def wanted_of(
    model: ZippedTowers, name: str, given: GenerationConfig, stream: Tensor, numbers: tuple[int, int], seed: int
) -> Wanted:
    """What settings come to.

    Args:
        given: written to. stream: int64, the tower's ids so far, the new segment's BOS included. numbers: of the
            document in its call, and of the segment in it. seed: where settings give none.

    Raises:
        ValueError: for what the tower cannot do, as on the plain path.
    """
    tower, special = model.tower(name), model.specials[name]
    threshold, size = getattr(given, STOP_THRESHOLD, None), len(stream)
    if threshold is not None and special.eos >= tower.head_size:
        raise ValueError(
            f"settings for {name!r}: {STOP_THRESHOLD} needs the probability of EOS (id {special.eos}); the tower "
            f"writes ids 0 to {tower.head_size - 1} only: its segments end after max_new_tokens"
        )
    if tower.position_limit is not None:
        keep_within(f"tower {name!r}", tower.position_limit, stream.new_ones(1, size), given)
    most = given.max_new_tokens if given.max_new_tokens is not None else (given.max_length or 0) - size
    if most < 1:
        raise ValueError(f"settings for {name!r}: max_length={given.max_length}, but {size} tokens are read already")
    codec = model.processor.codecs.get(name) if model.processor is not None else None
    strings, said = StopStrings.taken_from(given, name, codec, size), getattr(given, SEED, None)
    wish = Wish(
        suppressed=frozenset(unwritten_ids(model, name, given)),
        eos=special.eos,
        least=(given.min_length or 0) - size if given.min_new_tokens is None else given.min_new_tokens,
        draw=Draw.of(given) if given.do_sample else None,
        seed=seed if said is None else int(said),
        penalty=given.repetition_penalty or 1.0,
        threshold=threshold,
        guidance=1.0 if given.guidance_scale is None else given.guidance_scale,
        scored=wants_scores(given),
    )
    wishes = [replace(wish, numbers=(*numbers, sample)) for sample in range(samples_of(given))]
    return Wanted(wishes, most, strings[0] if strings else None)
