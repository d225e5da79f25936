"""What one tower reads another through: projections, gated cross-attention, gated feed-forward.

Shapes: B batch, Q reader tokens, M source tokens, D reader width, S source width, H heads, C head width.

A zip layer never sees the document: `visible` says which source token each query may read. It is strict (a token reads
only what is finished before it), so cross-attention needs no causal order of its own, and is never given one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zipper_lm.fusion.zip_spec import ZipSpec

POSITION_SCALE = 2.0
"""Start of the learned scale of sinusoids, beside normed states of size 1."""


@dataclass(frozen=True)
class Memory:
    """Keys and values that a source tower's finished tokens offer to one zip layer.

    Attributes:
        keys, values: ``[B, H, M, C]``.
        states, positions: of a zip with `context`: ``[B, N, S]`` and int64 ``[B, N]``, of the last tokens, which some
            of these and of those to come are made of.
    """

    keys: Tensor
    values: Tensor
    states: Tensor | None = None
    positions: Tensor | None = None

    def contiguous(self) -> Memory:
        """The same, each head's tokens side by side: what reads it token by token reads it once for every one."""
        return replace(self, keys=self.keys.contiguous(), values=self.values.contiguous())

    def row(self, number: int, begin: int) -> Memory:
        """A row alone, from one of its tokens on, copied."""
        keys, values = (t[number : number + 1, :, begin:].clone() for t in (self.keys, self.values))
        if self.states is None or self.positions is None:
            return Memory(keys, values)
        skip = max(0, begin - (self.keys.shape[2] - self.states.shape[1]))
        return Memory(keys, values, *(t[number : number + 1, skip:].clone() for t in (self.states, self.positions)))


@dataclass(frozen=True)
class View:
    """Which source tokens each query may read, worked out once a pass for all layers of a directed pair.

    Attributes:
        allowed: bool ``[B, 1, Q or 1, M]``; rows that see nothing are all true here (softmax stays finite) ...
        seen: bool ``[B, Q or 1, 1]``: ... and false here, which makes their update exactly zero.
    """

    allowed: Tensor
    seen: Tensor

    @classmethod
    def of(cls, visible: Tensor) -> View:
        """From a bool ``[B, Q or 1, M]``."""
        seen = visible.any(-1, keepdim=True)
        return cls(allowed=(visible | ~seen)[:, None], seen=seen)

    def take(self, rows: Tensor) -> View:
        """The view of some rows."""
        return View(self.allowed[rows], self.seen[rows])


@lru_cache(maxsize=64)  # every zip layer asks at every token, with a tower's width
@torch.inference_mode(False)
def _frequencies(count: int, device: torch.device) -> Tensor:
    """From 2 down to 0.002 per token, geometrically: periods of 3 to 3000 tokens, the lengths of segments."""
    fall = -torch.log(torch.tensor(1e3, dtype=torch.float32, device="cpu")) / max(count, 1)
    return 2.0 * torch.exp(torch.arange(count, dtype=torch.float32, device=device) * fall)


def _angles(places: Tensor, count: int) -> Tensor:
    """Places ``[..., 1]`` times `count` frequencies, float32."""
    known = type(places) is Tensor and not torch.compiler.is_compiling()  # nothing that a tracer makes is kept
    make = _frequencies if known else _frequencies.__wrapped__
    return places.float() * make(count, places.device)


def sinusoid(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Sinusoids of positions ``[..., T]`` as ``[..., T, width]`` (after Vaswani et al. 2017, section 3.5)."""
    angle = _angles(positions[..., None], (width + 1) // 2)
    return torch.cat([angle.sin(), angle.cos()], -1)[..., :width].to(dtype)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on ``[B, H, T, C]`` with C even, at positions ``[B, T]``."""
    half = x.shape[-1] // 2
    angle = _angles(positions[:, None, :, None], half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class Gate(nn.Module):
    """tanh of one learned number (Flamingo, arXiv 2204.14198). At 0 the gated branch adds exactly nothing.

    A gate that starts at 0 starves the branch behind it of gradient, and a small one is soon closed by the noise of a
    random branch; so the default is an open gate before an output that starts at zero (see `ZipLayer`).
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([float(start)]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.weight) * x


class InputProjection(nn.Module):
    """What a tower's embeddings pass through when it is zipped (never in a unimodal call).

    ``residual``: ``h + W2 relu(W1 norm(h))`` with W2 zero at the start, so that a frozen tower starts out as itself.
    ``paper``: ``relu(W2 relu(W1 h))`` (arXiv 2405.18669, section 3): replaces the embeddings, so it is not the
    identity at the start.

    Args:
        width: D. form: one of these. scale: what the first adds is multiplied by.
    """

    def __init__(self, width: int, form: str, scale: float = 1.0) -> None:
        super().__init__()
        self.residual, self.scale = form == "residual", scale
        self.norm = nn.LayerNorm(width) if self.residual else nn.Identity()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        if self.residual:
            nn.init.zeros_(self.down.weight)
            nn.init.zeros_(self.down.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[B, Q, D]`` to the same, computed in this module's dtype, returned in the input's."""
        x = hidden_states.to(self.up.weight.dtype)
        y = self.down(F.relu(self.up(self.norm(x))))
        y = scaled(y, self.scale)
        return hidden_states + y.to(hidden_states.dtype) if self.residual else F.relu(y).to(hidden_states.dtype)


def scaled(update: Tensor, scale: float) -> Tensor:
    """What is added to a stream, in its size."""
    return update if scale == 1.0 else scale * update


class MemoryProjection(nn.Sequential):
    """Source states in the reader's width: one matrix, the paper's relu(linear), or its "3-layer MLP".

    With `context`, a convolution over the segment comes first: what a token offers is made of its neighbours' states,
    too. A causal tower's state tells what was said up to its token. A reader looks for the place up to which it has
    read, and wants what is said behind it: a query that finds the one finds the other with it.

    Args:
        form: one of these. source: S. width: D. context: how many neighbours on each side.
    """

    def __init__(self, form: str, source: int, width: int, context: int = 0) -> None:
        steps: list[nn.Module] = [nn.LayerNorm(source), nn.Linear((2 * context + 1) * source, width)]
        if form == "relu":
            steps.append(nn.ReLU())
        elif form == "mlp":
            steps += [nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)]
        super().__init__(*steps)
        self.context = context

    def forward(self, states: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        """``[B, M, S]`` at positions ``[B, M]`` in their segments to ``[B, M, D]``."""
        norm, *others = self
        states = norm(states)
        if self.context:
            states = with_neighbours(states, positions.to(states.device), self.context)
        for module in others:
            states = module(states)
        return states


def with_neighbours(states: Tensor, positions: Tensor, count: int) -> Tensor:
    """Each token's state between those of its neighbours in its segment, ``[B, M, (2 * count + 1) * S]``; zero in the
    place of one that is not there.

    Args:
        states: ``[B, M, S]``. positions: int ``[B, M]``, of segments one behind the other, with padding (0) before or
            after all of them. count: of neighbours on each side.
    """
    found = []
    for step in range(-count, count + 1):
        # What comes round from the other end, or from another segment, never stands where a neighbour would.
        there = positions.roll(-step, 1) == positions + step
        found.append(torch.where(there[..., None], states.roll(-step, 1), 0.0))
    return torch.cat(found, -1)


def can_attend(name: str) -> bool:
    """Whether zips can attend by a name of transformers' attention interface: its function must obey a bool mask."""
    return name in _attentions()


def _attentions() -> list[str]:
    named = [n for n in ALL_ATTENTION_FUNCTIONS if not any(part in n for part in ("flash", "flex", "paged"))]
    return ["eager", *named]


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, **how: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain steps, under the face of transformers' interface, where each family has an eager one of its
    own. ``[B, H, Q, C]`` to ``[B, Q, H, C]``, and the probabilities."""
    scores = (query @ key.transpose(-1, -2) * how["scaling"]).masked_fill(~allowed, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (F.dropout(weights, how["dropout"]) @ value).transpose(1, 2), weights


def _check_attention(name: str) -> None:
    if not can_attend(name):
        raise ValueError(
            f"zip.attention {name!r} cannot be used: a zip needs a function of transformers' attention interface that "
            f"obeys a bool mask (flash and flex do not); there are {sorted(_attentions())}"
        )


class ZipLayer(nn.Module):
    """One directed zip at one layer: the reader's hidden state + gated cross-attention + gated feed-forward.

    Args:
        spec: the zip's settings.
        width: D. source_width: S. scale: what it adds is multiplied by.
    """

    def __init__(self, spec: ZipSpec, width: int, source_width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.heads = spec.heads or max(4, width // 64)
        self.head_width = 2 * -(-width // (2 * self.heads))  # rounded up to even, for rotary positions
        inner = self.heads * self.head_width
        self.positions, self.dropout, self.attention = spec.positions, spec.dropout, spec.attention
        # Places of both streams are counted in tokens of the coarser one. Counted in the finer one, the fast sinusoids
        # would turn several times between two coarse tokens, and match at random.
        self.stretch = 1.0 if spec.stretch is None else spec.stretch
        _check_attention(spec.attention)
        self.memory_projection = MemoryProjection(spec.projection, source_width, width, spec.context)
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.k_proj = nn.Linear(width, inner, bias=False)
        self.v_proj = nn.Linear(width, inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        if self.positions == "sinusoid":
            self.query_position_scale = nn.Parameter(torch.full((1,), POSITION_SCALE))
            self.memory_position_scale = nn.Parameter(torch.full((1,), POSITION_SCALE))
        if self.positions != "none":
            # Query and key of one position start out alike, so that attention starts near the diagonal.
            self.k_proj.weight.data.copy_(self.q_proj.weight.data)
        self.gate = Gate(spec.gate_start)
        if spec.gate_start:  # an open gate before a silent output: exactly no update yet, but a full gradient
            nn.init.zeros_(self.o_proj.weight)
        self.feed_forward: nn.Module | None = None
        if spec.feed_forward:
            out = nn.Linear(4 * width, width)
            self.feed_forward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), out)
            self.feed_forward_gate = Gate(spec.gate_start)
            if spec.gate_start:
                nn.init.zeros_(out.weight)
                nn.init.zeros_(out.bias)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the zip computes in; towers may have another."""
        return self.q_proj.weight.dtype

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)

    def remember(self, source_states: Tensor, positions: Tensor, past: Memory | None = None) -> Memory:
        """Project source states once; everything that later reads them reads this.

        Args:
            source_states: ``[B, M, S]``, the source tower's state after its paired layer.
            positions: int64 ``[B, M]``, each token's place in its segment.
            past: what was remembered of tokens before them, which comes first in what is returned. The last segment of
                those may go on, if no padding stands between.
        """
        again, context = 0, self.memory_projection.context
        if past is not None and past.states is not None and past.positions is not None:
            again = min(context, past.states.shape[1])  # these have new neighbours
            source_states = torch.cat([past.states, source_states], 1)
            positions = torch.cat([past.positions, positions.to(past.positions.device)], 1)
        keys, values = map(self._heads, self(source_states, positions))
        if self.positions == "rotary":
            keys = rotate(keys, self._places(positions.to(keys.device)))
        if past is not None:
            old, known = past.keys.shape[2] - again, 0 if past.states is None else past.states.shape[1] - again
            keys, values = (
                torch.cat([before[:, :, :old], new[:, :, known:]], 2)
                for before, new in ((past.keys, keys), (past.values, values))
            )
        if not context:
            return Memory(keys, values)
        return Memory(keys, values, source_states[:, -2 * context :], positions[:, -2 * context :])

    def _places(self, positions: Tensor) -> Tensor:
        """Of a source's tokens, as they are counted."""
        return positions * min(1.0, self.stretch)

    def _remember(self, source_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        states = source_states.to(device=self.q_proj.weight.device, dtype=self.dtype)
        memory = self.memory_projection(states, positions)
        placed = memory
        if self.positions == "sinusoid":
            places = self._places(positions.to(memory.device))
            placed = memory + self.memory_position_scale * sinusoid(places, memory.shape[-1], memory.dtype)
        return self.k_proj(placed), self.v_proj(memory)

    def _query(self, x: Tensor, positions: Tensor) -> Tensor:
        x, positions = self.norm(x), positions / max(1.0, self.stretch)
        if self.positions == "sinusoid":
            x = x + self.query_position_scale * sinusoid(positions, x.shape[-1], x.dtype)
        query = self._heads(self.q_proj(x))
        return rotate(query, positions) if self.positions == "rotary" else query

    def scores(self, hidden_states: Tensor, positions: Tensor, memory: Memory) -> Tensor:
        """How well each query fits each token of the source, seen or not, ``[B, H, Q, M]``: attention before softmax.
        Arguments are as of `forward`."""
        query = self._query(hidden_states.to(self.dtype), positions)
        return query @ memory.keys.transpose(-1, -2) * self.head_width**-0.5

    def attention_map(self, hidden_states: Tensor, positions: Tensor, memory: Memory, view: View) -> Tensor:
        """Attention probabilities ``[B, H, Q, M]`` (zero for queries that see nothing), for pictures and diagnosis."""
        scores = self.scores(hidden_states, positions, memory)
        return scores.masked_fill(~view.allowed, float("-inf")).softmax(-1) * view.seen[:, None]

    def forward(
        self, states: Tensor, positions: Tensor, memory: Memory | None = None, view: View | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The update to add to the reader's hidden state, ``[B, Q, D]``; exactly zero where nothing is seen. Without
        `memory`: keys and values, ``[B, M, H * C]``, of a source's states, for `remember`. Both are calls of this
        module, as FSDP gathers its parameters for the span of a call, and both return bare tensors, which it watches.

        Args:
            states: ``[B, Q, D]``, the reader's state after its layer, or ``[B, M, S]`` of the source.
            positions: int64 ``[B, Q]`` or ``[B, M]``, each token's place in its segment.
            memory: what `remember` returned for the source.
            view: who may read what.
        """
        if memory is None:
            return self._remember(states, positions)
        assert view is not None
        return self._update(states, positions, memory, view)

    def _update(self, hidden_states: Tensor, positions: Tensor, memory: Memory, view: View) -> Tensor:
        x = hidden_states.to(self.dtype)
        query = self._query(x, positions)
        allowed = view.allowed.expand(-1, -1, query.shape[2], -1)
        attend = _eager if self.attention == "eager" else ALL_ATTENTION_FUNCTIONS[self.attention]
        attended, _ = attend(
            self,
            query,
            memory.keys.to(query.dtype),
            memory.values.to(query.dtype),
            allowed,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.head_width**-0.5,
            is_causal=False,  # the interface's default is causal
        )
        update = scaled(self.gate(self.o_proj(attended.flatten(2))), self.scale)
        if self.feed_forward is not None:
            update = update + scaled(self.feed_forward_gate(self.feed_forward(x + update)), self.scale)
        return torch.where(view.seen, update, 0.0).to(hidden_states.dtype)
