"""Does this backbone behave as a tower, bit for bit? Asked of any model, on random ids, in about a second.

The same calls are made twice: on the bare model, and through `Tower` with a listener that replaces every hidden state
by an equal one. All results must be `torch.equal`. Then the listener is shown to be heard: a change at one depth
reaches what is computed later and nothing else, neither other rows nor earlier positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zipper_lm.fusion.interface import Interface, learn
from zipper_lm.fusion.tower import Listener, Tower, listening, write_plainly

BATCH = 2
PROMPT = 6
CACHED_STEPS = 5
TIME = PROMPT + CACHED_STEPS
PADDED = 3
NEW_TOKENS = 4
TOLERANCE = 1e-3  # where two orders of arithmetic are compared; logits here are of the order of 1

Call = Callable[..., tuple[Tensor, Any]]  # (input_ids, attention_mask=None, cache=None, use_cache=False)
Measurement = Callable[[], Tensor]


@dataclass
class Parity:
    """What was found out about one backbone.

    Attributes:
        name: class name of the backbone.
        checked: the checks that were made, in order.
        problems: check -> what is wrong; empty if the backbone is a tower bit for bit.
        lacks: what the bare model itself raised an error at, so that there was nothing to compare.
        notes: what else holds of the bare model and is worth knowing, such as "no cache".
        depth: layer calls in one forward (0 if no tower could be made).
        hidden_size: width between layers.
        interface: how the bare model is called, as it was learned.
    """

    name: str
    checked: list[str] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    lacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    depth: int = 0
    hidden_size: int = 0
    interface: Interface | None = None

    @property
    def passed(self) -> bool:
        """Whether everything could be compared and nothing is wrong."""
        return not self.problems and not self.lacks


class _Same:
    """Replaces every hidden state by an equal one, so that the way a replacement takes is really taken."""

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.0

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        return hidden_states + 0.0


class _Nudge:
    """Adds `change` ``[batch, time, hidden]`` to what leaves one depth; keeps what every layer was given."""

    def __init__(self, depth: int, change: Tensor) -> None:
        self.depth, self.change = depth, change
        self.entered: list[Tensor] = []

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        self.entered.append(hidden_states.clone())
        return hidden_states

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.change if depth == self.depth else hidden_states


@torch.no_grad()
def check_parity(backbone: PreTrainedModel, *, layers: str | None = None, seed: int = 0) -> Parity:
    """Compare a decoder with itself as a tower: forward, padding, cache, generation, state-dict keys.

    Args:
        backbone: a model with a language-model head. Afterwards it is a tower's backbone in eval mode (same weights,
            keys and behaviour; only the class of its layer list differs).
        layers: as for `Tower`.
        seed: of the ids, and of the changes that the listener makes.

    Returns:
        What was found. Errors raised by the backbone or by `Tower` are reported as problems, not raised.
    """
    found = Parity(type(backbone).__name__)
    backbone.eval()
    bare: Call
    logits = ids = torch.empty(0)
    with _check(found, "bare model runs"):
        write_plainly(backbone)  # a `generate()` of its own, for several codebooks, is not what a tower writes with
        found.interface = learn(backbone)
        bare, ids = partial(found.interface.call, backbone), _random_ids(backbone, seed)
        logits = _seeded(lambda: bare(ids)[0])
        _require(logits.shape[:2] == ids.shape, f"logits {list(logits.shape)} for ids {list(ids.shape)}")
        _require(bool(logits.isfinite().all()), "logits are not finite")
    if not found.passed:
        return found
    with _check(found, "causal"):
        other = ids.clone()
        other[:, -1] = ids[:, 0]
        changed = _seeded(lambda: bare(other)[0])
        _require(_close(changed[:, :-1], logits[:, :-1]), "the last token changes logits before it")
    if not found.passed:
        return found
    keys = list(backbone.state_dict())
    expected = _expected(found, _measurements(backbone, bare, ids))
    tower: Tower | None = None
    with _check(found, "makes a tower"):
        tower = Tower(backbone, layers=layers)
        found.depth, found.hidden_size = tower.depth, tower.hidden_size
    if tower is None:
        return found
    with _check(found, "state-dict keys"):
        _require(list(backbone.state_dict()) == keys, "they changed")
    silent = _measurements(backbone, _tower_call(tower, None), ids)
    with _check(found, "not listened to"):
        _require_equal(_seeded(silent["forward"]), expected["forward"])
    heard = _measurements(backbone, _tower_call(tower, _Same()), ids, tower, _Same())
    for name, value in expected.items():
        with _check(found, name):
            _require_equal(_seeded(heard[name]), value)
    with _check(found, "listener is heard"):
        _require_heard(tower, ids, logits, seed)
    return found


def _measurements(
    backbone: PreTrainedModel,
    call: Call,
    ids: Tensor,
    tower: Tower | None = None,
    listener: Listener | None = None,
) -> dict[str, Measurement]:
    """Name -> a call that gives logits ``[batch, time, vocab]``, or ids ``[batch, time]`` for "generate".

    The same for a bare model and a tower, so that whatever is measured of one is measured of the other.
    """
    whole, left, right = torch.ones(3, BATCH, TIME, dtype=torch.long, device=ids.device)
    left[-1, :PADDED] = 0
    right[-1, -PADDED:] = 0

    def cached(mask: Tensor, start: int) -> Tensor:
        logits, cache = call(ids[:, :start], attention_mask=mask[:, :start], use_cache=True)
        steps = [logits]
        for t in range(start, TIME):
            _require(cache is not None, "no cache")
            logits, cache = call(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache, use_cache=True)
            steps.append(logits)
        return torch.cat(steps, dim=1)

    def generated() -> Tensor:
        with listening(tower.layers, listener) if tower and listener else nullcontext():
            return backbone.generate(  # type: ignore[operator]
                input_ids=ids[:, :PROMPT],
                attention_mask=whole[:, :PROMPT],
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )

    return {
        "forward": lambda: call(ids)[0],
        "left padding": lambda: call(ids, attention_mask=left)[0],
        "right padding": lambda: call(ids, attention_mask=right)[0],
        "cached steps": lambda: cached(whole, PROMPT),
        "cached steps, left padding": lambda: cached(left, TIME - 2),
        "generate": generated,
    }


def _expected(found: Parity, measurements: dict[str, Measurement]) -> dict[str, Tensor]:
    """What the bare model gives. What it cannot do itself is not asked of the tower, but said."""
    expected: dict[str, Tensor] = {}
    for name, measure in measurements.items():
        try:
            expected[name] = _seeded(measure)
        except Exception as error:  # the family's own limits, of any kind
            without = isinstance(error, _Failed) or name == "generate"
            (found.notes.append if without else found.lacks.append)(f"bare model, {name}: {_say(error)}")
    cached = expected.get("cached steps")
    if cached is not None and not _close(cached, expected["forward"]):
        found.notes.append("bare model: cached logits differ from uncached ones")
    return expected


def _require_heard(tower: Tower, ids: Tensor, logits: Tensor, seed: int) -> None:
    """A change made at one depth reaches all that is computed later, and nothing else."""
    # Random along the width: a constant would be invisible to a LayerNorm.
    noise = torch.randn(tower.hidden_size, generator=torch.Generator().manual_seed(seed)).to(logits)
    nothing = torch.zeros(*ids.shape, tower.hidden_size).to(logits)
    change = nothing.clone()
    change[0, -1] = noise  # one row, one token: all others must stay as they are
    # Rows share the experts' matrix products, whose shapes decide the rounding.
    rounds = _has_experts(tower.backbone.config.get_text_config(decoder=True).to_dict())
    calm = _Nudge(0, nothing)
    _seeded(partial(_logits, tower, ids, calm))
    for depth in range(tower.depth):
        nudge = _Nudge(depth, change)
        changed = _seeded(partial(_logits, tower, ids, nudge))
        where = f"a change after depth {depth}"
        _require(not _close(changed[0, -1], logits[0, -1]), f"{where} does not reach the logits")
        _require(_close(changed[1:], logits[1:]), f"{where} in row 0 reaches row 1")
        _require(rounds or torch.equal(changed[1:], logits[1:]), f"{where} in row 0 changes row 1's rounding")
        _require(_close(changed[0, :-1], logits[0, :-1]), f"{where} in the last token reaches earlier ones")
        for before in range(depth + 1):
            same = torch.equal(nudge.entered[before], calm.entered[before])
            _require(same, f"{where} reaches what entered depth {before}")


def _has_experts(fields: Mapping[str, Any]) -> bool:
    """Whether a config, or one inside it such as Dbrx's of its feed-forward, names experts."""
    inner = [value for value in fields.values() if isinstance(value, Mapping)]
    return any("expert" in str(key) for key in fields) or any(map(_has_experts, inner))


def _logits(tower: Tower, ids: Tensor, listener: Listener) -> Tensor:
    return tower(ids, listener=listener)[0]


def _tower_call(tower: Tower, listener: Listener | None) -> Call:
    def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return tower(*args, listener=listener, **kwargs)

    return call


def _random_ids(backbone: PreTrainedModel, seed: int) -> Tensor:
    """int64 ``[BATCH, TIME]``, none of them a special id (some families look for those in their input)."""
    embedding = next(backbone.get_input_embeddings().parameters())
    config = backbone.config.get_text_config(decoder=True)
    size = min(int(embedding.shape[0]), config.vocab_size)
    special = {v for k, v in config.to_dict().items() if k.endswith("token_id") and isinstance(v, int)}
    usable = torch.tensor([i for i in range(size) if i not in special])
    picks = torch.randint(len(usable), (BATCH, TIME), generator=torch.Generator().manual_seed(seed))
    return usable[picks].to(embedding.device)


def _seeded(measure: Measurement) -> Tensor:
    """Some families draw random numbers in eval mode (hashing)."""
    torch.manual_seed(0)
    return measure()


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def _say(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, _Failed) else f"{type(error).__name__}: {text}"


class _Failed(Exception):
    """A check came out false."""


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Failed(otherwise)


def _require_equal(a: Tensor, b: Tensor) -> None:
    _require(a.shape == b.shape, f"shape {list(a.shape)} instead of {list(b.shape)}")
    if not torch.equal(a, b):
        raise _Failed(f"not equal bit for bit; largest difference {(a - b).abs().max().item():.3g}")


@contextmanager
def _check(found: Parity, name: str) -> Iterator[None]:
    found.checked.append(name)
    try:
        yield
    except Exception as error:  # whatever a family raises is its result
        found.problems[name] = _say(error)
