"""The captured step: every row's token in, every row's next token out, as one function of tensors at fixed addresses.

While one tower writes, the others are finished memory. So a step is that one decoder with cross-attention in it, which
a compiler can take whole. It runs on a *structural copy* of the backbone: its modules are new, its tensors are the
backbone's own. Hooks of the copy's layers add what zips bring; the family's own `forward` does all else, over a cache
of columns (`column_cache.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from zipper_lm.fusion.interface import plain_ids, say, trial
from zipper_lm.fusion.network import ZippedTowers
from zipper_lm.fusion.reading import State
from zipper_lm.fusion.tower import Tower, per_token, shaped, structural_copy
from zipper_lm.fusion.zip_spec import EMBEDDINGS
from zipper_lm.generation.engine.attention import NAME as ATTENTION
from zipper_lm.generation.engine.choice import Choice, Kinds, Wish
from zipper_lm.generation.engine.column_cache import ColumnLayer, column_cache, kept_layers
from zipper_lm.generation.engine.graph import Graph, graph_pool
from zipper_lm.generation.engine.rows import Rows
from zipper_lm.generation.engine.weights import weights_as

logger = logging.getLogger(__name__)

MOST = 8
"""Steps for kinds of work alone; some of them take a compiler longer than a segment."""


def copy_of(tower: Tower, attention: bool) -> PreTrainedModel:
    """A structural copy of a tower's backbone; `attention`: that attends as `attention.py` does."""
    copied = tower.structural_copy()
    if attention:
        copied.set_attn_implementation(ATTENTION)
    return copied


def empty_cache(tower: Tower) -> Cache:
    """A cache of the tower's own kind with nothing in it."""
    return DynamicCache(config=tower.backbone.config.get_text_config(decoder=True))


def like_cache(tower: Tower) -> Cache:
    """A cache of the tower's own with something in it."""
    with trial(tower.backbone):
        ids = plain_ids(tower.backbone, 1, 2)
        return tower(ids, torch.ones_like(ids), use_cache=True)[1]


@dataclass(frozen=True)
class Taken:
    """What a row has read of its segment, copied: the row may be another's while somebody chooses among samples.

    Attributes:
        count: of tokens. layers: of each layer that keeps anything. states: by depth, ``[1, count, D]``.
    """

    count: int
    layers: list[list[Tensor]]
    states: dict[int, Tensor]


class Step:
    """One tower's step over its rows.

    Args:
        model: the model. name: the tower that writes. backbone: from `copy_of`. rows: its buffers. like: a
            cache of one document, as the tower's own. compile: whether to compile it, where that can be done.
    """

    def __init__(
        self, model: ZippedTowers, name: str, backbone: PreTrainedModel, rows: Rows, like: Cache, compile: bool
    ) -> None:
        self.model, self.name, self.backbone, self.rows = model, name, backbone, rows
        self.tower = model.tower(name)
        known = self.tower.interface.cache
        assert known is not None
        self.argument, self.whole_mask = known.argument, known.whole_mask
        self.cache = column_cache(like, rows.count, rows.reach, rows.column)
        self.kept_layers = kept_layers(self.cache)
        self.choice = Choice(rows.count, self.tower.head_size, model.specials[name].eos, self.tower.device)
        held = partial(weights_as, form=None, rows=rows.count, compiled=compile)
        self.projections = {
            key: held(structural_copy(model.input_projections[key]).eval()) for key, _ in model.projection_keys[name]
        }
        self.zips: dict[int, list[tuple[str, int, Any]]] = {}
        for (reader, source), pairs in model.layer_pairs.items():
            if reader == name and source in rows.memories:
                for k, (layer, _) in enumerate(pairs):
                    zip_layer = structural_copy(model.zip_layer(reader, source, k)).eval()
                    if zip_layer.attention == "sdpa":
                        zip_layer.attention = ATTENTION
                    held(zip_layer)
                    self.zips.setdefault(layer, []).append((source, k, zip_layer))
        if compile and self._is_of_rows():
            rows.reach.choose_rows()
        self._listen()
        self.run_of: dict[Kinds, Callable[[], Tensor]] = {}
        self.pool = graph_pool(self.tower.device)
        self.beside: dict[int, int] = {}
        self.compile = compile
        forward = self._make_forward()
        self.logits_of = self._compiled(forward, lambda: rows.reach.read_all())
        for tensor in rows.tensors():
            torch._dynamo.mark_static_address(tensor)

    def _is_of_rows(self) -> bool:
        """Whether what a row comes to is its own, whichever rows are computed beside it: in float32 it is, but for the
        order of sums; and it keeps columns alone."""
        zips = [zip_layer for at_depth in self.zips.values() for _, _, zip_layer in at_depth]
        modules = [self.backbone, *self.projections.values(), *zips]
        tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        exact = {tensor.dtype for tensor in tensors} <= {torch.float32, torch.long, torch.bool}
        return exact and all(type(layer) is ColumnLayer for _, layer in self.kept_layers)

    # --- what a step computes ------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Hooks on the copy's layers: what `_Speaker` does in the plain path (`generation/segment.py`)."""
        axes, at = self.tower.layers.axes, self.model.projection_layer(self.name)
        layers = self.backbone.get_submodule(self.tower.layers_path)
        assert isinstance(layers, nn.ModuleList)

        def embed(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.rows.keep(EMBEDDINGS, per_token(args[0] if args else kwargs["hidden_states"], axes))

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            states = per_token(hidden, axes)
            involved = self.rows.reach.here(self.rows.involved)
            projected = self.model.project_input(self.name, at or 0, states, involved, self.projections)
            projected = shaped(projected, hidden, axes)
            return ((projected, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": projected})

        def leave(depth: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                hidden = output if isinstance(output, Tensor) else output[0]
                zipped = self._zipped(depth, per_token(hidden, axes))
                if zipped is None:
                    return None
                zipped = shaped(zipped, hidden, axes)
                return zipped if isinstance(output, Tensor) else type(output)((zipped, *output[1:]))

            return hook

        if EMBEDDINGS in self.rows.kept:
            layers[0].register_forward_pre_hook(embed, with_kwargs=True)
        if at is not None:
            layers[at].register_forward_pre_hook(enter, with_kwargs=True)
        for depth in {*self.zips, *self.rows.kept} - {EMBEDDINGS}:
            layers[depth].register_forward_hook(leave(depth), with_kwargs=True)

    def _zipped(self, depth: int, hidden: Tensor) -> Tensor | None:
        """Keep a layer's output ``[r, 1, D]`` where others read it; with what zips add, where there are any."""
        rows = self.rows
        if depth in rows.kept:
            rows.keep(depth, hidden)
        if depth not in self.zips:
            return None
        result, place = hidden, rows.reach.here(rows.place)[:, None]
        for source, k, zip_layer in self.zips[depth]:
            result = result + zip_layer(hidden, place, *rows.readable(source, k))
        return result

    def _make_forward(self) -> Any:
        rows, backbone, interface, cache = self.rows, self.backbone, self.tower.interface, self.cache
        options: dict[str, Any] = {"use_cache": True, "return_dict": True}
        options = {name: value for name, value in options.items() if name in interface.takes}
        masked, positions, argument = "attention_mask" in interface.takes, interface.positions, self.argument
        whole_mask = self.whole_mask

        def logits_of() -> Tensor:
            given, ids = {**options, argument: cache}, rows.reach.here(rows.ids)[:, None]
            if masked:
                given["attention_mask"] = rows.mask() if whole_mask else torch.ones_like(ids)
            if positions is not None:
                given[positions] = rows.positions()
            return backbone(input_ids=ids, **given).logits[:, -1]

        return logits_of

    def _compiled(self, plain: Any, simplify: Callable[[], None] | None = None) -> Any:
        """A function, compiled where that is wanted and can be done; else as it is. Which it is shows at its first
        call: nothing has been computed when compilation fails. `simplify`: makes it one of fixed sizes alone, which is
        tried then."""
        if not self.compile:
            return plain
        # Dtypes, addresses and all sizes but those of `reach` stay while this step lives, so nothing else need be asked
        # again at every token.
        options: dict[str, Any] = {"guard_filter_fn": lambda guards: [g.guard_type == "SHAPE_ENV" for g in guards]}
        settled: list[Any] = []

        def compiled_call(*args: Any) -> Any:
            made = torch.compile(_own_code(plain), fullgraph=True, dynamic=False, options=options)
            result = made(*args)
            settled.append(made)
            return result

        def call(*args: Any) -> Any:
            if settled:
                return settled[0](*args)
            said = ""
            for before in (None, simplify) if simplify is not None else (None,):
                if before is not None:
                    before()
                try:
                    if self.compile:
                        return compiled_call(*args)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:  # of any kind: what Dynamo, Inductor and a compiler say
                    said = say(error)
            if self.compile:
                logger.warning("tower %r: its step is not compiled: %s", self.name, said)
            self.compile = False
            settled.append(plain)
            return plain(*args)

        return call

    def _choosing(self, kinds: Kinds) -> Any:
        """The choice among logits for these kinds of work; rows are advanced by it."""
        rows, choice = self.rows, self.choice

        def choose(logits: Tensor) -> Tensor:
            chosen = choice.choose(logits, rows.reach.here(rows.place), kinds, rows.reach)
            rows.write(chosen)
            rows.advance()
            return chosen

        return self._compiled(choose)

    def _running(self, kinds: Kinds) -> Callable[[], Tensor]:
        """A whole step for these kinds of work: every row's next id."""
        choose = self._choosing(kinds)

        def run() -> Tensor:
            return choose(self.logits_of())

        if self.pool is None:
            return run
        state = [*self.rows.progress(), *self.choice.progress()]
        state += [tensor for _, layer in self.kept_layers for tensor in layer.progress()]
        try:
            return Graph(run, state, self.pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: what CUDA says of an operation that it cannot capture
            logger.warning("tower %r: its step is no CUDA graph: %s", self.name, say(error))
            self.pool = None
            return run

    def __call__(self) -> tuple[dict[int, int], list[float] | None]:
        """By row, the next id, and the log-probability of every row's where some row asked for it. Rows that are free
        may have some, too, of no meaning."""
        self.rows.reach_out()
        chosen = self._run_for(self.choice.kinds)()
        self.rows.at += 1
        numbers = range(self.rows.count) if self.rows.reach.rows is None else self.rows.reach.rows.tolist()
        return dict(zip(numbers, chosen.tolist())), self.choice.logprobs.tolist() if self.choice.kinds.scored else None

    def _run_for(self, kinds: Kinds) -> Callable[[], Tensor]:
        """A step that does these kinds of work. Each is compiled, so after `MOST` of them one is made that does all:
        kinds that no row asks for change nothing."""
        if kinds not in self.run_of and len(self.run_of) >= MOST:
            kinds = Kinds.all()
            self.choice.prepare(kinds)
        if kinds not in self.run_of:
            self.run_of[kinds] = self._running(kinds)
        return self.run_of[kinds]

    # --- who comes and goes --------------------------------------------------------------------------------------

    def sit(self, row: int, wish: Wish, bos: int, involved: Tensor, state: State, stream: Tensor) -> None:
        """Take a row for a segment of one document, beside it a second one where the tower alone has a say.

        Args:
            row: a free one. wish: how it is chosen. bos: its first id. involved: bool ``[T]``. state: what was read of
                the document. stream: int64, the ids of the tower's stream, `bos` included.
        """
        past = len(stream) - 1
        self._make_room(past)
        cache = state.caches.get(self.name) if past else None
        self._lay(row, cache)
        self.rows.sit(row, past, bos, involved, state)
        self.choice.sit(row, wish, stream)

    def sit_beside(self, row: int, bare: int, wish: Wish, bos: int, cache: Cache | None, stream: Tensor) -> None:
        """Take a second row beside one just taken, for the tower alone. `cache`: of what it alone has read."""
        self._lay(bare, cache)
        alone = torch.zeros(len(self.model.names), dtype=torch.bool)
        self.rows.sit(bare, len(stream) - 1, bos, alone, None)
        self.choice.sit(row, wish, stream, bare)
        self.beside[row] = bare

    def _lay(self, row: int, cache: Cache | None) -> None:
        for number, own in self.kept_layers:
            own.join(row, None if cache is None else cache.layers[number], self.rows.at)

    def _make_room(self, past: int) -> None:
        """See that there are `past` columns before the next one."""
        if self.rows.at < past:
            self.move(past - self.rows.at)

    def move(self, by: int) -> None:
        """Move everything by so many columns, to the right where positive."""
        for _, layer in self.kept_layers:
            layer.move(by)
        self.rows.move(by)

    def _both(self, row: int) -> list[int]:
        """A row, and the one beside it."""
        return [row, *([] if self.beside.get(row) is None else [self.beside[row]])]

    def rest(self, row: int) -> None:
        """A row writes no more, and keeps what it has read."""
        for each in self._both(row):
            self.rows.rest(each)
        for _, layer in self.kept_layers:
            layer.rest(row)
        self.choice.leave(row)

    def leave(self, row: int) -> None:
        """Free a row, and the one beside it."""
        for each in self._both(row):
            self.rows.leave(each)
        self.choice.leave(row)
        self.beside.pop(row, None)

    def take(self, row: int) -> Taken:
        """What a row has read of its segment; the row may be left then."""
        seat = self.rows.seats[row]
        begin, end = seat.first, self.rows.at if seat.end is None else seat.end
        layers = [layer.take(row, begin, end) for _, layer in self.kept_layers]
        return Taken(end - begin, layers, {d: self.rows.part(row, d, begin, end) for d in self.rows.kept})

    def extend(self, taken: Taken, state: State, segment: int) -> int:
        """Add to a state what a row had read of its segment; returns the number of tokens that is.

        Args:
            state: of the row's document alone; written to. segment: the number of the segment in the document.
        """
        count, device = taken.count, self.tower.device
        if not count:
            return 0
        cache = state.caches.get(self.name)
        if cache is None:
            cache = state.caches[self.name] = empty_cache(self.tower)
        for (number, own), layer in zip(self.kept_layers, taken.layers):
            own.add(cache.layers[number], layer)
        places = torch.arange(count, device=device)[None]
        for (reader, source), pairs in self.model.layer_pairs.items():
            if source == self.name:
                old = state.memories.get((reader, source), [None] * len(pairs))
                state.memories[reader, source] = [
                    self.model.zip_layer(reader, source, k).remember(taken.states[depth], places, past)
                    for k, ((_, depth), past) in enumerate(zip(pairs, old))
                ]
        numbers = torch.full_like(places, segment)
        for store, more in ((state.segments, numbers), (state.positions, places)):
            store[self.name] = torch.cat([store[self.name], more], 1) if self.name in store else more
        return count


def _own_code(function: Any) -> Any:
    """The same function with code of its own: the compiler counts how often a piece of code is compiled anew, and gives
    up after a few."""
    return FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
