"""What a backbone takes and returns, learned by trying it on a few tokens.

Names in lists fail open: when transformers renamed `past_key_values` to `cache`, towers forgot what they had read, and
nobody was told. So a name comes from the backbone's own signature and from what it returns, and counts only if what it
promises holds: to go on from a prefix must give what reading everything at once gives, in rows of different length,
padded at the left. What does not hold is not used, and `Interface.faults` says why.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

PREFIX, REST = 4, 3  # tokens read first, and after them
PADDING = (0, 2, PREFIX)  # at the left of each row; the last row has read nothing when the rest comes
WRITTEN = 2  # tokens by `generate()`; the second goes on from what it keeps itself

# How far logits may be off, in units of what it changes to forget the prefix: in float32, and in 16 bits or where
# weights are quantized. A lost cache is off by about 1. Several tokens at once may be as far off as one by one, but for
# a factor: some recurrent families lose only what a short convolution held, which is little.
FINE, COARSE = 1e-3, 0.25
SEVERAL = 4

_QUIET = {"use_cache": False, "return_dict": True}

_WHOLE = "what reading everything at once gives"

Writing = Literal["handed", "cached", "uncached", "wrong"]


class OwnSettings(GenerationConfig):
    """Settings as they were given. `generate()` fills what is not given from the backbone's own generation config, such
    as beams or a repetition penalty, which nobody asked for here; of this one it takes the library's defaults."""

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        """As of its base, but whatever is offered for what is not given, it is the default."""
        if defaults_only:
            kwargs = self._get_default_generation_params()
        return super().update(defaults_only, allow_custom_entries, **kwargs)


@dataclass(frozen=True)
class CacheInterface:
    """How a backbone goes on from what it has read.

    Attributes:
        argument: under which its forward takes what it remembers.
        field: of its output, under which it returns that.
        several: whether several tokens can be added at once, rows that hold only padding included; else one by one.
        whole_mask: whether the mask that goes with it covers the past, too. A recurrent state has padding behind it.
    """

    argument: str
    field: str
    several: bool = False
    whole_mask: bool = True


@dataclass(frozen=True)
class Interface:
    """How a backbone is called.

    Attributes:
        takes: the arguments that its forward takes.
        positions: the one of them that takes positions counted from a mask; `None`: they are left to the family.
        cache: how it goes on from what it has read; `None` if it cannot.
        writing: what its `generate()` does rightly: go on from a cache that it is handed, from one of its own, or only
            read everything again for every token; "wrong" if not even that.
        faults: what it offers and does not do rightly.
    """

    takes: frozenset[str]
    positions: str | None = None
    cache: CacheInterface | None = None
    writing: Writing = "uncached"
    faults: tuple[str, ...] = ()

    @property
    def going_on(self) -> str:
        """In words."""
        if self.cache is None:
            return "without a cache"
        return "by several tokens" if self.cache.several else "token by token"

    def call(
        self,
        backbone: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, Any]:
        """Logits, and what the backbone remembers if it was asked for; arguments as of `Tower.forward`."""
        known = self.cache if use_cache or cache is not None else None
        options: dict[str, Any] = {**_QUIET, "use_cache": known is not None}
        if attention_mask is not None:
            new = input_ids.shape[1]
            recurrent = known is not None and cache is not None and not known.whole_mask
            options["attention_mask"] = attention_mask[:, -new:] if recurrent else attention_mask
            if self.positions is not None:
                options[self.positions] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        given = {name: value for name, value in options.items() if name in self.takes}
        if known is not None and cache is not None:
            given[known.argument] = cache
        output = backbone(input_ids=input_ids, **given)
        return output.logits, None if known is None else output.get(known.field)


def learn(backbone: nn.Module) -> Interface:
    """Try a backbone. Its weights, modes and the random states are afterwards what they were."""
    parameters = inspect.signature(backbone.forward).parameters
    interface = Interface(frozenset(parameters))
    with trial(backbone):
        interface = replace(interface, positions=_position_argument(backbone, interface))
        ids, mask = _ragged(backbone)
        try:
            # On meta a mask cannot be looked at.
            fields = _offered(backbone, interface, ids[:, :PREFIX], None if ids.is_meta else mask[:, :PREFIX])
        except Exception as error:  # of any kind: what the family says to a flag
            fields, interface = (
                [],
                replace(interface, faults=(f"reading with a cache fails, so it has none: {_say(error)}",)),
            )
        if ids.is_meta:  # there is nothing to compare, so names must do
            cache = next((CacheInterface(f, f, several=True) for f in fields if f in parameters), None)
            return replace(interface, cache=cache, writing="cached" if cache else "uncached", faults=())
        judge = _Judge(backbone, interface, ids, mask)
        if not judge.can_tell:
            fault = "its logits are not finite, or depend on no earlier token: without a cache, as it cannot be tried"
            return replace(interface, faults=(fault,) if fields else ())
        interface = judge.learn_cache(judge.learn_padding(interface), fields, _arguments(parameters))
        return judge.learn_writing(interface)


@contextmanager
def trial(backbone: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, seeded; afterwards every module's mode and the random states are what they were."""
    device = embedding_of(backbone).device
    cuda = device.type == "cuda"
    modes = [(module, module.training) for module in backbone.modules()]
    backbone.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if cuda else []):
            # Not torch.manual_seed: it seeds every GPU, and what is not saved before is not put back.
            torch.default_generator.manual_seed(0)
            if cuda:
                torch.cuda.default_generators[embedding_of(backbone).get_device()].manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def embedding_of(backbone: nn.Module) -> Tensor:
    """A backbone's input embedding, ``[vocab, d]``; the first of them where a family keeps a list."""
    return next(backbone.get_input_embeddings().parameters())  # type: ignore[operator]


def plain_ids(backbone: nn.Module, rows: int, time: int) -> Tensor:
    """int64 ``[rows, time]``: different ids, none of them special, for some families look for those in their input."""
    embedding, configs = embedding_of(backbone), _configs(backbone)
    special: set[Any] = set()
    for key, value in (item for config in configs for item in config.to_dict().items()):
        if key.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    sizes = [size for config in configs if isinstance(size := getattr(config, "vocab_size", None), int)]
    size = min(int(embedding.shape[0]), *sizes, rows * time + len(special))
    usable = [i for i in range(size) if i not in special] or [0]
    ids = [usable[i % len(usable)] for i in range(rows * time)]
    return torch.tensor(ids, device=embedding.device).reshape(rows, time)


def logits_of(backbone: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    """Logits ``[rows, time, vocab]`` of ids and nothing else, within a `trial`.

    Raises:
        ValueError: for a backbone that returns none.
    """
    takes = inspect.signature(backbone.forward).parameters
    output = backbone(input_ids=ids, **{name: value for name, value in _QUIET.items() if name in takes}, **more)
    if not isinstance(logits := getattr(output, "logits", None), Tensor):
        raise ValueError(f"{type(backbone).__name__} returns a {type(output).__name__} without logits")
    return logits


def _ragged(backbone: nn.Module) -> tuple[Tensor, Tensor]:
    """ids and mask, int64 ``[rows, PREFIX + REST]``, padded at the left: once with the id that the family knows for it,
    once with others, as another id of a codec, or an input projection, makes padding visible to what forgets masks."""
    ids = plain_ids(backbone, len(PADDING), PREFIX + REST)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    for pad in (getattr(config, "pad_token_id", None) for config in _configs(backbone)):
        if isinstance(pad, int) and 0 <= pad < len(embedding_of(backbone)):
            ids[1, : PADDING[1]] = pad
    return ids, mask


def _configs(backbone: nn.Module) -> list[Any]:
    """The config of what reads text, and that of the whole backbone where it is another."""
    config: Any = getattr(backbone, "config", None)
    if config is None:
        return []
    text = config.get_text_config(decoder=True)
    return [text] if text is config else [text, config]


def _position_argument(backbone: nn.Module, interface: Interface) -> str | None:
    """The argument that takes a place for each token, where the first token's is 0. RoBERTa and its kin start after
    the padding id, so positions counted from a mask would be wrong; they are left to the family."""
    ids = plain_ids(backbone, 2, PREFIX + REST)
    counted = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    for name in sorted(n for n in interface.takes if "position" in n):
        if ids.is_meta:  # there is nothing to compare
            return name
        try:
            plain, same, other = (logits_of(backbone, ids, **{name: p}) for p in (None, counted, counted.flip(1)))
            # An argument that is not heeded does not say where tokens are.
            if torch.equal(same, plain) and not torch.equal(same, other):
                return name
        except Exception:  # positions of another shape (one for each of several axes), or out of range
            continue
    return None


def _offered(backbone: nn.Module, interface: Interface, ids: Tensor, mask: Tensor | None) -> list[str]:
    """Fields of an output that may be what the backbone remembers."""
    options = {"attention_mask": mask, **_QUIET, "use_cache": True}
    output = backbone(input_ids=ids, **{name: value for name, value in options.items() if name in interface.takes})
    return [name for name, value in output.items() if value is not None and not isinstance(value, Tensor)]


class _Judge:
    """Compares what goes on from a prefix with reading everything at once.

    Args:
        ids, mask: int64 ``[rows, PREFIX + REST]``, padded at the left.
    """

    def __init__(self, backbone: nn.Module, interface: Interface, ids: Tensor, mask: Tensor) -> None:
        self.backbone, self.interface, self.ids, self.mask = backbone, interface, ids, mask
        self.whole = self._read(ids, mask)[:, PREFIX:]
        self.lost = self._read(ids[:, PREFIX:], mask[:, PREFIX:])
        self.far = (self.lost - self.whole).norm(dim=-1)[:-1].median()  # the last row has no prefix to lose
        least = 100 * torch.finfo(torch.float32).eps * self.whole.norm(dim=-1).median()
        self.can_tell = bool(self.whole.isfinite().all() and self.far.isfinite() and self.far > least)
        exact = all(p.dtype in (torch.float32, torch.float64) for p in backbone.parameters())
        self.tolerance = FINE if exact and not getattr(backbone, "is_quantized", False) else COARSE

    def learn_padding(self, interface: Interface) -> Interface:
        """The interface, and whether a row that is padded at the left is read as it is alone."""
        row, padding = 1, PADDING[1]
        alone = self._read(self.ids[row : row + 1, padding:], self.mask[row : row + 1, padding:])
        if self._passes(self._distances(alone[:, -REST:], self.whole[row : row + 1])):
            return interface
        fault = "padding changes what it computes: documents that are written together should be of one length"
        return replace(interface, faults=(*interface.faults, fault))

    def learn_cache(self, interface: Interface, fields: list[str], arguments: list[str]) -> Interface:
        """The interface with the first way to go on that holds."""
        pairs = [(f, f) for f in fields if f in arguments] + [(a, f) for f in fields for a in arguments if a != f]
        faults: list[str] = []
        for argument, field in pairs:
            for whole_mask in (True, False):
                cache = CacheInterface(argument, field, whole_mask=whole_mask)
                try:
                    one = self._going_on(replace(interface, cache=cache), 1)
                except Exception as error:
                    faults.append(f"going on from {field!r} fails, so it is not used: {_say(error)}")
                    continue
                if self._passes(one):
                    cache = replace(cache, several=self._goes_on_by_several(replace(interface, cache=cache), one))
                    return replace(interface, cache=cache)
                faults.insert(0, f"going on from {field!r} does not give {_WHOLE}, so it is not used")
        if fields and not faults:
            faults = [f"its forward returns {', '.join(fields)}, but takes nothing of the kind: without a cache"]
        return replace(interface, faults=(*interface.faults, *faults[:1]))

    def learn_writing(self, interface: Interface) -> Interface:
        """The interface with the best that `generate()` does rightly."""
        if not hasattr(self.backbone, "generate"):
            return interface
        handed, cached = interface.cache is not None and interface.cache.several, interface.cache is not None
        ways: list[Writing] = [*(["handed"] * handed), *(["cached"] * cached), "uncached"]  # type: ignore[list-item]
        faults: list[str] = []
        for way in ways:
            try:
                if self._passes(self._writing(interface, way)):
                    said = (
                        f"generate() with a cache {faults[-1]}, so it writes without"
                        if way == "uncached" and faults
                        else ""
                    )
                    return replace(interface, writing=way, faults=(*interface.faults, *filter(None, [said])))
                faults.append(f"does not give {_WHOLE}")
            except Exception as error:
                faults.append(f"fails ({_say(error)})")
        return replace(interface, writing="wrong", faults=(*interface.faults, f"generate() {faults[-1]}"))

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.interface.call(self.backbone, ids, mask)[0].float()

    def _prefix(self, interface: Interface, absent: bool) -> Any:
        """What is remembered of the prefix. `absent`: as batches are made (`data/collation.py`), a row that has nothing
        yet attends to one of its padding tokens, which a recurrent state cannot forget."""
        mask = self.mask[:, :PREFIX].clone()
        mask[-1, -1] = int(absent)
        return interface.call(self.backbone, self.ids[:, :PREFIX], mask, use_cache=True)[1]

    def _going_on(self, interface: Interface, step: int) -> Tensor:
        """Distances ``[rows, REST]`` of the logits after a prefix that was read before."""
        cache, parts = self._prefix(interface, absent=step > 1), []
        for start in range(PREFIX, PREFIX + REST, step):
            end = start + step
            new = self.ids[:, start:end], self.mask[:, :end]
            logits, cache = interface.call(self.backbone, *new, cache=cache, use_cache=True)
            parts.append(logits.float())
        return self._distances(torch.cat(parts, 1), self.whole)

    def _goes_on_by_several(self, interface: Interface, one: Tensor) -> bool:
        try:
            several = self._going_on(interface, REST)
        except Exception:
            return False
        return self._passes(several) and bool(several.max() <= SEVERAL * one.max().clamp(min=FINE / 100))

    def _writing(self, interface: Interface, way: Writing) -> Tensor:
        """Distances ``[rows, WRITTEN]`` of the logits that `generate()` chooses by."""
        backbone: Any = self.backbone
        wanted: dict[str, Any] = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "use_cache": way != "uncached"}
        wanted |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
        wanted["pad_token_id"] = int(self.ids[0, 0])  # else it warns
        given = OwnSettings(**wanted)
        handed = {}
        if way == "handed" and interface.cache is not None:
            handed = {interface.cache.argument: self._prefix(interface, absent=True)}
        ids, mask = self.ids[:, : PREFIX + 1], self.mask[:, : PREFIX + 1]  # the last row begins here
        output = backbone.generate(input_ids=ids, attention_mask=mask, generation_config=given, **handed)
        ids, mask = output.sequences[:, :-1], nn.functional.pad(mask, (0, WRITTEN - 1), value=1)
        return self._distances(torch.stack(output.logits, 1).float(), self._read(ids, mask)[:, -WRITTEN:])

    def _distances(self, got: Tensor, whole: Tensor) -> Tensor:
        """Per token of ``[rows, time, vocab]``, in units of how far logits are that lack the prefix."""
        return (got - whole).norm(dim=-1) / self.far

    def _passes(self, distances: Tensor) -> bool:
        """Of each row's tokens the median, of rows the worst: in 16 bits rounding may choose another expert."""
        return bool(distances.median(1).values.max() <= self.tolerance)


def _arguments(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Those that may take a cache."""
    ours = {"input_ids", "attention_mask", "use_cache", "return_dict"}
    return [name for name, p in parameters.items() if p.default is None and name not in ours]


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
