"""Whether a tower's step can be captured, learned by trying it on a few tokens.

Three rows that begin at different times, one of them with a longer past than there are columns, must say what the
backbone says of each stream alone, also after everything has moved, and wherever another row is. What does not hold is
written on the plain path.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zipper_lm.fusion.interface import COARSE, FINE, PADDING_FAULT, is_quantized, plain_ids, say, trial
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import State
from zipper_lm.fusion.tower import Tower
from zipper_lm.generation.engine.choice import Wish
from zipper_lm.generation.engine.column_cache import NotInColumns
from zipper_lm.generation.engine.rows import Rows
from zipper_lm.generation.engine.step import Step, copy_of, empty_cache
from zipper_lm.utils.shapes import has_values

TIME, COLUMNS = 8, 10
PASTS = (0, 4, 2)  # tokens of each row's past
JOINS = (0, 1, 3)  # the step at which it begins


@dataclass(frozen=True)
class Capture:
    """How a tower can be captured.

    Attributes:
        fault: why it cannot; `None` if it can. attention: whether its copy may attend as `attention.py` does.
    """

    fault: str | None = None
    attention: bool = False


def learn_capture(model: ZippedTowers, name: str) -> Capture:
    """Try a tower; its weights, modes and the random states are afterwards what they were."""
    chosen = getattr(model.tower(name).backbone.config.get_text_config(decoder=True), "_attn_implementation", None)
    if chosen == "sdpa" and _fault(model, name, attention=True) is None:
        return Capture(attention=True)
    return Capture(_fault(model, name, attention=False))


def _fault(model: ZippedTowers, name: str, attention: bool) -> str | None:
    tower = model.tower(name)
    known = tower.interface.cache
    if tower.interface.writing == "wrong":
        return tower.interface.faults[-1]
    if known is None:
        return "it goes on from no cache"
    if PADDING_FAULT in tower.interface.faults:  # its rows' columns before they begin are padding
        return PADDING_FAULT.partition(":")[0]
    if tower.depth != len(tower.layers):
        return f"its {len(tower.layers)} layers are called {tower.depth} times"
    if not has_values(next(tower.backbone.parameters())):
        return "it has no weights"
    try:
        with trial(tower.backbone):
            return _tried(model, name, attention)
    except NotInColumns as error:
        return str(error)
    except Exception as error:  # of any kind: what a family says to a cache of columns
        return say(error)


def _tried(model: ZippedTowers, name: str, attention: bool) -> str | None:
    tower, special = model.tower(name), model.specials[name]
    ids = plain_ids(tower.backbone, len(PASTS), TIME)
    like = tower(ids[:1, :2], torch.ones_like(ids[:1, :2]), use_cache=True)[1]
    if not isinstance(getattr(like, "layers", None), list):
        return f"its {type(like).__name__} is not made of layers"
    if [type(layer) for layer in empty_cache(tower).layers] != [type(layer) for layer in like.layers]:
        return "its cache is of another kind than its config says"
    rows = Rows(model, name, len(PASTS), COLUMNS, {}, special.pad)
    step = Step(model, name, copy_of(tower, attention), rows, like, compile=False)
    wish, alone = Wish(suppressed=frozenset(), eos=special.eos), torch.zeros(len(model.names), dtype=torch.bool)
    far: list[float] = []
    read = [0] * len(PASTS)
    for turn in range(TIME - max(PASTS)):
        if turn == TIME - max(PASTS) - 1:
            step.move(-rows.room())
        for row, (past, begin) in enumerate(zip(PASTS, JOINS)):
            if turn == begin:
                state = _state_of(tower, ids[row : row + 1, :past], name)
                step.sit(row, wish, 0, alone, state, torch.cat([ids[row, :past], ids[row, :1]]))
        for row in rows.seats:
            rows.ids[row] = ids[row, PASTS[row] + read[row]]
        logits = step.logits_of().float()
        rows.advance()
        rows.at += 1
        for row in rows.seats:
            read[row] += 1
            end = PASTS[row] + read[row]
            if end > 1:
                far.append(_distance(tower, logits[row], ids[row : row + 1, :end]))
    exact = all(p.dtype in (torch.float32, torch.float64) for p in tower.backbone.parameters())
    half = torch.is_autocast_enabled(ids.device.type)  # whose products round by what processor there is
    limit = FINE if exact and not half and not is_quantized(tower.backbone) else COARSE
    worst = max(far)
    if not worst <= limit:  # NaN, too
        return f"its step is off by {worst:.2g} of what it changes to forget the past (limit {limit:g})"
    if not (stretch := _from_afar(step)) <= limit:
        return f"a row's logits change by {stretch:.2g} with how far another row is (limit {limit:g})"
    return None


def _from_afar(step: Step) -> float:
    """How far a row's logits change where another row's token stands beyond the positions that the family was made for:
    some stretch the rotation of a whole batch by its furthest position. In units of what they are."""
    tower, rows = step.tower, step.rows
    config = tower.backbone.config.get_text_config(decoder=True)
    made_for = getattr(config, "max_position_embeddings", None)
    if (
        tower.position_limit is not None
        or not getattr(config, "rope_parameters", None)
        or not isinstance(made_for, int)
    ):
        return 0.0  # no token may stand there, or there is no rotation to stretch
    states = [tensor for _, layer in step.kept_layers for tensor in layer.progress()]
    before, begin = [state.clone() for state in states], rows.begin.clone()
    near, *_ = step.logits_of().float()
    for state, old in zip(states, before):
        state.copy_(old)
    rows.begin[1] = rows.at - 2 * made_for
    beside, *_ = step.logits_of().float()
    rows.begin.copy_(begin)
    return float((beside - near).norm() / near.norm().clamp(min=1e-30))


def _state_of(tower: Tower, past: Tensor, name: str) -> State:
    state = State()
    if past.shape[1]:
        state.caches[name] = tower(past, torch.ones_like(past), use_cache=True)[1]
    return state


def _distance(tower: Tower, logits: Tensor, stream: Tensor) -> float:
    """How far logits ``[V]`` are from a stream's own, in units of how far those of its last token alone are."""
    whole, lost = (tower(part, torch.ones_like(part))[0][0, -1].float() for part in (stream, stream[:, -1:]))
    return float((logits - whole).norm() / (lost - whole).norm().clamp(min=1e-30))
