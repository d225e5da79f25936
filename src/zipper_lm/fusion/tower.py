"""Any Hugging Face decoder as a tower. With `interface.py` the only file that knows how families differ.

What is unusual here:

- The backbone's layer list becomes a `ModuleList` subclass that holds the same layers under the same names, so
  state-dict keys do not change. Outside a zip call it hands out the real layers: the backbone is exactly itself.
- Inside a zip call (`listening`: a context variable, nothing is parked on modules) it hands out stand-ins. A stand-in
  runs the real layer and then lets a *listener* look at the hidden state and replace it. The family's own `forward`
  does everything else: embeddings, masks, positions, caches, arithmetic between layers, final norm, head.
- `lockstep.py` runs several towers' forwards as coroutines that meet in such listeners.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from zipper_lm.fusion.decoders import check_decoder
from zipper_lm.fusion.interface import embedding_of, learn, logits_of, plain_ids, trial
from zipper_lm.fusion.limits import check_longest, check_positions, position_limit
from zipper_lm.utils.host import on_host
from zipper_lm.utils.known import plain

logger = logging.getLogger(__name__)

PROBE = (3, 5)  # batch and time of a forward that learns shapes: sizes that are unlike a number of streams


class Listener(Protocol):
    """What is told about one tower's forwards. Depth counts the layer calls of one forward, from 0."""

    def before(self, depth: int, hidden_states: Tensor) -> Tensor:
        """The hidden state about to enter a layer; returns what shall enter it."""

    def after(self, depth: int, hidden_states: Tensor) -> Tensor:
        """The hidden state that left a layer; returns what the backbone shall go on with."""


class _Listening:
    """One forward's listener, its count of layer calls, and the states that are known: by depth, what leaves a layer.
    Up to the last of them no layer is computed. `heard`: the only depths that are heard; `None`: all, as where a
    family's layers are not called in their order, so that a depth is found by counting alone."""

    __slots__ = ("axes", "depth", "heard", "known", "known_to", "listener", "members")

    def __init__(
        self, listener: Listener, layers: LayerList, known: Mapping[int, Tensor], heard: Collection[int] | None
    ) -> None:
        self.listener, self.axes, self.members, self.depth = listener, layers.axes, layers.members, 0
        self.known, self.known_to = known, max(known, default=-1)
        self.heard = heard if layers.in_order else None

    def hand_out(self, number: int, layer: nn.Module) -> Any:
        """A layer's stand-in, or itself where nobody listens."""
        return _StandIn(layer, self, number) if self.heard is None or number in self.heard else layer


_listening: ContextVar[Mapping[nn.Module, _Listening]] = ContextVar("zipper_listening", default={})  # noqa: B039


class _CountAnew:
    """Pre-forward hook of a backbone: inside `listening`, depth counts from 0 in every forward."""

    def __init__(self, layers: LayerList) -> None:
        self.layers = layers

    def __call__(self, backbone: nn.Module, args: Any) -> None:
        if (state := _listening.get().get(self.layers)) is not None:
            state.depth = 0


class _StandIn:
    """Handed to the backbone in place of one layer, for the span of one call."""

    def __init__(self, layer: nn.Module, state: _Listening, number: int) -> None:
        self._layer, self._state, self._number = layer, state, number

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # families that ask isinstance(layer, ...) get the layer's answer
        return type(self._layer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state, named = self._state, not args
        args, kwargs = tuple(map(plain, args)), {name: plain(value) for name, value in kwargs.items()}
        depth = state.depth if state.heard is None else self._number
        state.depth = depth + 1
        hidden = kwargs["hidden_states"] if named else args[0]
        entering = shaped(state.listener.before(depth, per_token(hidden, state.axes)), hidden, state.axes)
        if named:
            kwargs["hidden_states"] = entering
        else:
            args = (entering, *args[1:])
        output = self._known(depth, hidden) if depth <= state.known_to else self._layer(*args, **kwargs)
        # Answer in kind: a family that unpacks a tuple would take a bare tensor's first batch row for the output.
        hidden = output if isinstance(output, Tensor) else output[0]
        told = per_token(hidden, state.axes)
        leaving = state.listener.after(depth, told)
        if leaving is told:
            return output
        leaving = shaped(leaving, hidden, state.axes)
        return leaving if isinstance(output, Tensor) else type(output)((leaving, *output[1:]))

    def _known(self, depth: int, hidden: Tensor) -> Any:
        """What the layer answers where nothing is computed: the state that is known, else the one that came."""
        state = self._state
        if (found := state.known.get(depth)) is not None:
            hidden = shaped(found, hidden, state.axes)
        members = state.members[depth]
        return hidden if members is None else (hidden, *[None] * (members - 1))


def per_token(hidden: Tensor, axes: tuple[int, int]) -> Tensor:
    """``[batch, time, hidden]`` of a hidden state that may be time-major, or in several streams, such as ``[streams,
    batch, time, d]`` or ``[batch, time, streams, d]``: a token's hidden state is all that is passed on for it. `axes`:
    where batch and time are."""
    if hidden.ndim == 3 and axes == (0, 1):  # as nearly all have it; every layer asks at every token
        return hidden
    return hidden.movedim(axes, (0, 1)).flatten(2)


def shaped(hidden: Tensor, like: Tensor, axes: tuple[int, int]) -> Tensor:
    """Undo `per_token`: ``[batch, time, hidden]`` in the axes of `like`."""
    if like.ndim == 3 and axes == (0, 1):
        return hidden
    return hidden.reshape(like.movedim(axes, (0, 1)).shape).movedim((0, 1), axes)


class LayerList(nn.ModuleList):
    """A backbone's layers, same names; inside `listening` it hands out stand-ins."""

    axes = (0, 1)  # batch and time of the hidden state between layers
    members: tuple[int | None, ...] = ()  # of what each layer call returns, the hidden state among them; None: it alone
    in_order = False  # whether a forward calls each layer once, one after the other

    def __iter__(self) -> Iterator[Any]:
        state = _listening.get().get(self)
        layers = super().__iter__()
        return layers if state is None else (state.hand_out(number, layer) for number, layer in enumerate(layers))

    def __getitem__(self, index: int | slice) -> Any:
        return super().__getitem__(index) if _listening.get().get(self) is None else list(self)[index]


@contextmanager
def listening(
    layers: LayerList,
    listener: Listener,
    known: Mapping[int, Tensor] | None = None,
    heard: Collection[int] | None = None,
) -> Iterator[_Listening]:
    """Let `listener` hear one tower in this context (thread, task or greenlet), and nowhere else; `known` as of
    `Tower.forward`. `heard`: the depths that it has something to say at, 0 among them if it counts forwards; it may be
    told of others, too. `None`: all."""
    state = _Listening(listener, layers, known or {}, heard)
    token = _listening.set({**_listening.get(), layers: state})
    try:
        yield state
    finally:
        _listening.reset(token)


@contextmanager
def alone(layers: LayerList) -> Iterator[None]:
    """Whoever listens to this tower does not hear what it does in this context: the backbone is itself."""
    token = _listening.set({k: v for k, v in _listening.get().items() if k is not layers})
    try:
        yield
    finally:
        _listening.reset(token)


def rest_in_forward(layer: nn.Module) -> None:
    """A layer that is in training mode for its caller's sake, who then checkpoints its activations, computes as in
    evaluation mode: some families drop out within it."""
    checkpoint: Any = layer._gradient_checkpointing_func
    if not isinstance(checkpoint, _AtRest):
        layer._gradient_checkpointing_func = _AtRest(layer, checkpoint)  # type: ignore[assignment]


class _AtRest:
    """In place of a layer's way of checkpointing: hooks would not do, for some versions of transformers ask for the
    layer's mode after them."""

    def __init__(self, layer: nn.Module, checkpoint: Any) -> None:
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, function: Any, *args: Any) -> Any:
        return self.checkpoint(partial(self._compute, function), *args)

    def _compute(self, function: Any, *args: Any) -> Any:
        mode, self.layer.training = self.layer.training, False
        try:
            return function(*args)
        finally:
            self.layer.training = mode


class _Probe:
    """Forward hooks that note the shape of what leaves each layer, and with how much beside it."""

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.shapes: list[tuple[int, ...]] = []
        self.members: list[int | None] = []

    def __call__(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.layers.append(layer)
        self.members.append(None if isinstance(output, Tensor) else len(output))
        self.shapes.append(tuple((output if isinstance(output, Tensor) else output[0]).shape))


class Tower(nn.Module):
    """A pre-trained decoder that can be zipped.

    Args:
        backbone: a decoder with a language-model head. It is used as it is; its layer list is replaced in place by a
            `LayerList`, which leaves its state-dict keys and its behaviour alone.
        name: the modality's name, for messages.
        layers: dotted name of the layer list, for a family where it is not found.

    Attributes:
        hidden_size: width of what passes between layers for one token (of all streams where a family has several).
        depth: number of layer calls in one forward.
        head_size: number of ids that it can write; a few families can read one more than they write.
        interface: how its backbone is called, learned by trying it; what it offers and does not do rightly is not used,
            and a warning says so.
        position_limit: how many tokens fit, where the backbone cannot go past its positions; else `None`.

    Raises:
        ValueError: if the layer list is not found, or what passes between layers is neither ``[batch, time,
            hidden]`` nor several such streams.
    """

    def __init__(self, backbone: PreTrainedModel, name: str = "tower", layers: str | None = None) -> None:
        super().__init__()
        check_decoder(f"tower {name!r}", backbone)
        self.backbone = backbone
        self.name = name
        self.layers_path = own_layers(backbone, name, layers)
        write_plainly(backbone)
        self.adapter_names: frozenset[str] = frozenset()
        self.position_limit = position_limit(backbone)
        self.depth, self.hidden_size, self.head_size = _probe(backbone, name, self.layers_path)
        self.interface = learn(backbone)
        for fault in self.interface.faults:
            logger.warning("tower %r: %s: %s", name, type(backbone).__name__, fault)

    @property
    def layers(self) -> LayerList:
        """The backbone's own layer list."""
        return self.backbone.get_submodule(self.layers_path)  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        """Where this tower's inputs must be."""
        return embedding_of(self.backbone).device

    @property
    def vocab_size(self) -> int:
        """Number of ids that the input embedding holds."""
        return int(embedding_of(self.backbone).shape[0])

    def structural_copy(self) -> PreTrainedModel:
        """The backbone with modules of its own over the same parameters and buffers, in evaluation mode. What is
        trained in one is trained in the other; its layers are a plain list, to which nobody can listen."""
        copied = structural_copy(self.backbone)
        parent, _, attribute = self.layers_path.rpartition(".")
        owner = copied.get_submodule(parent)
        setattr(owner, attribute, nn.ModuleList(nn.ModuleList.__iter__(getattr(owner, attribute))))
        for key, hook in list(copied._forward_pre_hooks.items()):
            if isinstance(hook, _CountAnew):
                del copied._forward_pre_hooks[key]
        return copied.eval()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
        listener: Listener | None = None,
        known: Mapping[int, Tensor] | None = None,
        logits: bool = True,
    ) -> tuple[Tensor, Any]:
        """One pass of the backbone's own forward.

        Args:
            input_ids: int64 ``[batch, time]``, the new tokens.
            attention_mask: ``[batch, past + time]``, 1 for tokens, 0 for padding (left or right).
            positions: int64 ``[batch, time]``, in place of a mask where documents share rows: each token's place in its
                document, from 0, where one begins anew; 0 for padding. See `check_packing`.
            cache: what an earlier call returned, or `None`.
            use_cache: whether to return a cache that a later call can go on from.
            listener: hears every layer of this one call; `None` leaves the backbone exactly itself.
            known: with a listener, by depth, states ``[batch, time, hidden]`` that leave layers: up to the last of them
                nothing is computed. Whether a family allows that is to be tried (`zipper_lm.fusion.prefix`).
            logits: false: those of the last token are enough. A family may make all of them for all that.

        Returns:
            logits ``[batch, time, vocab]`` and the cache (`None` if not asked for).

        Raises:
            ValueError: for more tokens than the backbone has positions, or than its cache can be gone on with.
        """
        if self.position_limit is not None:
            if positions is not None:
                check_longest(f"tower {self.name!r}", self.position_limit, int(on_host(positions).max()) + 1)
            else:
                whole = torch.ones(input_ids.shape) if attention_mask is None else attention_mask
                check_positions(f"tower {self.name!r}", self.position_limit, whole)
        new = input_ids.shape[1]
        if cache is None and attention_mask is not None and attention_mask.shape[1] != new:
            covered = attention_mask.shape[1]
            raise ValueError(f"tower {self.name!r}: a mask of {covered} tokens for {new}, and no cache of those before")
        caching = self.interface.cache
        if cache is not None and (caching is None or (new > 1 and not caching.several)):
            raise ValueError(
                f"tower {self.name!r}: {new} tokens at once, but {type(self.backbone).__name__} goes on "
                f"{self.interface.going_on}"
            )
        given = (input_ids, attention_mask, cache, use_cache, positions, logits)
        call = partial(self.interface.call, self.backbone, *given)
        if listener is None:
            return call()
        with listening(self.layers, listener, known) as state:
            result = call()
        if state.depth != self.depth:
            raise RuntimeError(
                f"tower {self.name!r}: {state.depth} of {self.depth} layers ran; a backbone that skips layers at "
                "random (layerdrop) cannot be zipped: set its config's layerdrop to 0"
            )
        return result


def structural_copy(module: nn.Module) -> Any:
    """New modules over the same parameters and buffers."""
    return deepcopy(module, {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]})


def own_layers(backbone: PreTrainedModel, name: str, layers: str | None = None) -> str:
    """Make a backbone's layer list a `LayerList`, if it is none yet; its dotted name. Arguments as of `Tower`."""
    path = layers or find_layers(backbone)
    parent_path, _, attribute = path.rpartition(".")
    parent = backbone.get_submodule(parent_path)
    found = getattr(parent, attribute, None)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"tower {name!r}: layers={path!r} is a {type(found).__name__}, not a ModuleList")
    if not isinstance(found, LayerList):
        setattr(parent, attribute, LayerList(found))
        backbone.register_forward_pre_hook(_CountAnew(getattr(parent, attribute)))
    return path


def depth_of(backbone: PreTrainedModel, name: str, layers: str | None = None) -> int:
    """The number of layer calls in one forward, of a backbone that is to be a tower. Arguments as of `Tower`."""
    return _probe(backbone, name, own_layers(backbone, name, layers))[0]


def _probe(backbone: PreTrainedModel, name: str, path: str) -> tuple[int, int, int]:
    """Count the layer calls, and learn the sizes of hidden states and logits, from one small forward."""
    layers: LayerList = backbone.get_submodule(path)  # type: ignore[assignment]
    probe, sizes = _Probe(), tuple(PROBE)
    hooks = [layer.register_forward_hook(probe) for layer in layers]
    try:
        logits = _small_forward(backbone)
    finally:
        for hook in hooks:
            hook.remove()
    shapes = set(probe.shapes)
    shape = shapes.pop() if len(shapes) == 1 else ()
    if len(shape) < 3 or any(shape[:-1].count(n) != 1 for n in sizes):
        raise ValueError(
            f"tower {name!r}: {type(backbone).__name__} passes {sorted(set(probe.shapes)) or 'nothing'} "
            f"between the layers in {path!r}; a tower needs [batch, time, hidden], here "
            f"({sizes[0]}, {sizes[1]}, hidden)"
        )
    layers.members = tuple(probe.members)
    layers.in_order = [*map(id, probe.layers)] == [*map(id, layers)]
    layers.axes = (shape.index(sizes[0]), shape.index(sizes[1]))
    return len(probe.shapes), math.prod(shape) // math.prod(sizes), logits.shape[-1]


def write_plainly(backbone: PreTrainedModel) -> None:
    """MusicGen's own `generate()` weaves several codebooks into each other (and drops padding ids, wherever they are).
    With one codebook there is nothing to weave, and transformers' common `generate()` is right.

    Raises:
        ValueError: if it has several codebooks.
    """
    if not hasattr(backbone, "build_delay_pattern_mask"):
        return
    if (several := getattr(backbone.config, "num_codebooks", 1)) > 1:
        raise ValueError(
            f"{type(backbone).__name__} reads {several} codebooks at once, a tower one id at a time; "
            "set num_codebooks to 1 in its config"
        )
    for name in ("generate", "prepare_inputs_for_generation"):
        setattr(backbone, name, MethodType(getattr(GenerationMixin, name), backbone))


def _small_forward(backbone: nn.Module) -> Tensor:
    """Logits of a few tokens."""
    with trial(backbone):
        return logits_of(backbone, plain_ids(backbone, *PROBE))


def find_layers(backbone: nn.Module) -> str:
    """Dotted name of the decoder's layer list.

    It is the `ModuleList` whose members' class the family names in `_no_split_modules`, else the one that has as many
    members as the config has layers, else the only one. Of several (a vision tower's, a text tower's), it is the one
    that text runs through.

    Raises:
        ValueError: listing the module lists that were looked at.
    """
    lists = {n: m for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    whole = set(getattr(backbone, "_no_split_modules", None) or ())
    config = getattr(backbone, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    tests: list[Callable[[str, nn.ModuleList], bool]] = [
        lambda n, m: {type(x).__name__ for x in m} <= whole,
        lambda n, m: any(type(x).__name__ in whole for x in m),
        lambda n, m: len(m) == count,
        lambda n, m: True,
    ]
    for test in tests:
        fitting = [n for n, m in lists.items() if test(n, m)]
        # An outer list wins over lists inside its members (experts, sub-blocks).
        outer = [n for n in fitting if not any(n.startswith(f"{o}.") for o in fitting if o != n)]
        if len(outer) > 1:
            outer = _text_runs_through(backbone, {n: lists[n] for n in outer})
        if len(outer) == 1:
            return outer[0]
    raise ValueError(
        f"{type(backbone).__name__}: no single list of decoder layers; module lists: "
        f"{ {n: f'{len(m)} x {type(m[0]).__name__}' for n, m in lists.items()} or 'none' }, "
        f"_no_split_modules: {sorted(whole) or 'none'}. Name it with layers="
    )


def _text_runs_through(backbone: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """Those of the lists whose layers are called when the backbone is given ids and nothing else."""
    ran = dict.fromkeys(lists, False)

    def note(name: str) -> Callable[..., None]:
        return lambda *_: ran.update({name: True})

    hooks = [layer.register_forward_pre_hook(note(n)) for n, m in lists.items() for layer in m]
    try:
        _small_forward(backbone)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name, called in ran.items() if called]
