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
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from zipper_lm.utils.known import answering
from zipper_lm.utils.shapes import has_values

PREFIX, REST = 4, 3  # tokens read first, and after them
PADDING = (0, 2, PREFIX)  # at the left of each row; the last row has read nothing when the rest comes
WRITTEN = 2  # tokens by `generate()`; the second goes on from what it keeps itself

# How far logits may be off, in units of what it changes to forget the prefix: in float32, and at most where rounding is
# coarser. A lost cache is off by about 1. In 16 bits, or where weights are quantized, rounding otherwise is measured:
# padded rows may be off by that, or by so many times what the row without padding is off; that row by so many times the
# rounding. Several tokens at once may be as far off as one by one, but for a factor: some recurrent families lose only
# what a short convolution held, which is little.
FINE, COARSE = 1e-3, 0.25
SPREAD = 4
SEVERAL = 4

FEW = "logits_to_keep"
"""The argument by which a family makes the logits of so many last tokens only."""

PADDING_FAULT = "padding changes what it computes: documents that are written together should be of one length"
"""What `Interface.faults` says of a backbone that does not read a row that is padded at the left as it does alone."""

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
        positions: Tensor | None = None,
        logits: bool = True,
    ) -> tuple[Tensor, Any]:
        """Logits, and what the backbone remembers if it was asked for; arguments as of `Tower.forward`."""
        known = self.cache if use_cache or cache is not None else None
        output = self.output(backbone, input_ids, attention_mask, cache, known is not None, positions, logits)
        return output.logits, None if known is None else output.get(known.field)

    def output(
        self,
        backbone: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        cache: Any,
        use_cache: bool,
        positions: Tensor | None = None,
        logits: bool = True,
    ) -> Any:
        """What its forward returns; arguments as of `Tower.forward`."""
        options: dict[str, Any] = {**_QUIET, "use_cache": use_cache}
        if attention_mask is not None:
            new = input_ids.shape[1]
            recurrent = self.cache is not None and cache is not None and not self.cache.whole_mask
            mask = answering(attention_mask)
            options["attention_mask"] = mask[:, -new:] if recurrent else mask
            if self.positions is not None:
                options[self.positions] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        if positions is not None:
            assert self.positions is not None, "check_packing was not asked"
            options[self.positions] = answering(positions)
        if attention_mask is None:
            input_ids = answering(input_ids)  # some families look for padding among them then
        if not logits:
            options[FEW] = 1
        given = {name: value for name, value in options.items() if name in self.takes}
        if self.cache is not None and cache is not None:
            given[self.cache.argument] = cache
        return backbone(input_ids=input_ids, **given)


def learn(backbone: nn.Module) -> Interface:
    """Try a backbone. Its weights, modes and the random states are afterwards what they were."""
    parameters = inspect.signature(backbone.forward).parameters
    interface = Interface(frozenset(parameters))
    with trial(backbone):
        interface = replace(interface, positions=_position_argument(backbone, interface))
        ids, mask = _ragged(backbone)
        start: Any = {}
        try:
            # On meta a mask cannot be looked at.
            start = interface.output(backbone, ids[:, :PREFIX], None if ids.is_meta else mask[:, :PREFIX], None, True)
        except Exception as error:  # of any kind: what the family says to a flag
            interface = replace(interface, faults=(f"reading with a cache fails, so it has none: {say(error)}",))
        fields = [name for name, value in start.items() if value is not None and not isinstance(value, Tensor)]
        if not has_values(embedding_of(backbone)):  # there is nothing to compare, so names must do
            cache = next((CacheInterface(f, f, several=True) for f in fields if f in parameters), None)
            return replace(interface, cache=cache, writing="cached" if cache else "uncached", faults=())
        try:
            judge = _Judge(backbone, interface, ids, mask, start)
            padding = judge.learn_padding() if judge.can_tell else ()
        except Exception as error:  # of any kind, as above
            fault = f"a padded mask fails: documents that are written together must be of one length: {say(error)}"
            return _learn_unpadded(backbone, replace(interface, faults=(fault,)), ids)
        if not judge.can_tell:
            fault = "its logits are not finite, or depend on no earlier token: without a cache, as it cannot be tried"
            return replace(interface, faults=(fault,) if fields else ())
        interface = replace(interface, faults=(*interface.faults, *padding))
        return judge.learn_writing(judge.learn_cache(interface, fields, _arguments(parameters)))


def _learn_unpadded(backbone: nn.Module, interface: Interface, ids: Tensor) -> Interface:
    """The interface of a backbone that fails on padding: without a cache, and how it writes where several rows of one
    length do not fail, too. What fails on one row without padding cannot be read at all: that error is raised."""
    interface.call(backbone, ids[:1], torch.ones_like(ids[:1]))
    try:
        judge = _Judge(backbone, interface, ids, torch.ones_like(ids))
    except Exception:  # it is said already
        return interface
    return judge.learn_writing(interface) if judge.can_tell else interface


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


def is_quantized(backbone: nn.Module) -> bool:
    """Whether its weights are. Its other parameters may be float32 all the same."""
    return bool(getattr(backbone, "is_quantized", False))


def plain_ids(backbone: nn.Module, rows: int, time: int) -> Tensor:
    """int64 ``[rows, time]``: different ids, none of them special, for some families look for those in their input.

    They are spread over the vocabulary: where it begins many have ids that were never trained, after which nothing that
    came before makes a difference.
    """
    embedding, configs = embedding_of(backbone), _configs(backbone)
    special: set[Any] = set()
    for key, value in (item for config in configs for item in config.to_dict().items()):
        if key.endswith(("token_id", "token_index")):
            special.update(value if isinstance(value, list) else [value])
    sizes = [size for config in configs if isinstance(size := getattr(config, "vocab_size", None), int)]
    usable = [i for i in range(min(int(embedding.shape[0]), *sizes)) if i not in special] or [0]
    step = max(1, len(usable) // (rows * time))
    ids = [usable[i * step % len(usable)] for i in range(rows * time)]
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
        if not has_values(embedding_of(backbone)):  # there is nothing to compare
            return name
        try:
            plain, same = (logits_of(backbone, ids, **{name: p}) for p in (None, counted))
            # An argument that is not heeded does not say where tokens are.
            if torch.equal(same, plain) and not torch.equal(same, logits_of(backbone, ids, **{name: counted.flip(1)})):
                return name
        except Exception:  # positions of another shape (one for each of several axes), or out of range
            continue
    return None


@contextmanager
def _rounded_otherwise(backbone: nn.Module) -> Iterator[None]:
    """Let every module that has parameters round what it returns at random, up or down to the next number of the
    coarsest dtype among them; of quantized weights, to 8 bits."""
    dtypes = {p.dtype for p in backbone.parameters() if p.is_floating_point()}
    dtypes |= {torch.bfloat16} if is_quantized(backbone) else set()
    eps, generator = max(torch.finfo(dtype).eps for dtype in dtypes), torch.Generator().manual_seed(0)

    def stir(module: nn.Module, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        at_random = torch.rand(output.shape, generator=generator).to(output.device) - 0.5
        return (output.float() * (1 + eps * at_random)).to(output.dtype)

    owners = [m for m in backbone.modules() if next(m.parameters(recurse=False), None) is not None]
    hooks = [owner.register_forward_hook(stir) for owner in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Dictated(LogitsProcessor):
    """Lets `generate()` write what is given, so that it is known what it reads."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.ids[:, input_ids.shape[1], None]
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


class _Judge:
    """Compares what goes on from a prefix with reading everything at once.

    Args:
        ids, mask: int64 ``[rows, PREFIX + REST]``, padded at the left; the first row is not.
        start: what the backbone returned for the prefix, as it is padded.
    """

    def __init__(self, backbone: nn.Module, interface: Interface, ids: Tensor, mask: Tensor, start: Any = None) -> None:
        self.backbone, self.interface, self.ids, self.mask = backbone, interface, ids, mask
        self.start, self.absent = start, None
        self.whole = self._read(ids, mask)[:, PREFIX:]
        self.lost = self._read(ids[:, PREFIX:], mask[:, PREFIX:])
        self.far = (self.lost - self.whole).norm(dim=-1)[:-1].median()  # the last row has no prefix to lose
        least = 100 * torch.finfo(torch.float32).eps * self.whole.norm(dim=-1).median()
        self.can_tell = bool(self.whole.isfinite().all() and self.far.isfinite() and self.far > least)
        self.exact = all(p.dtype in (torch.float32, torch.float64) for p in backbone.parameters())
        self.exact &= not is_quantized(backbone)
        self.noise = FINE if self.exact or not self.can_tell else self._measure_noise()

    def _measure_noise(self) -> float:
        """How far logits are off if they are rounded otherwise."""
        with _rounded_otherwise(self.backbone):
            stirred = self._read(self.ids, self.mask)
        noise = float(self._distances(stirred[:, PREFIX:], self.whole).median(1).values.max())
        return min(COARSE, max(FINE, noise)) if noise > 0 else COARSE  # 0 and NaN: it could not be measured

    def learn_padding(self) -> tuple[str, ...]:
        """The fault of a backbone that does not read a row that is padded at the left as it does alone."""
        rows = [1] if self.exact else [0, 1]
        alone = [self._read(self.ids[i : i + 1, PADDING[i] :], self.mask[i : i + 1, PADDING[i] :]) for i in rows]
        off = self._distances(torch.cat([each[:, -REST:] for each in alone]), self.whole[rows])
        if self._passes(off):
            return ()
        return (PADDING_FAULT,)

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
                    faults.append(f"going on from {field!r} fails, so it is not used: {say(error)}")
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
                faults.append(f"fails ({say(error)})")
        return replace(interface, writing="wrong", faults=(*interface.faults, f"generate() {faults[-1]}"))

    def _read(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.interface.call(self.backbone, ids, mask)[0].float()

    def _prefix(self, interface: Interface, absent: bool) -> Any:
        """What is remembered of the prefix. `absent`: as batches are made (`data/collation.py`), a row that has nothing
        yet attends to one of its padding tokens, which a recurrent state cannot forget."""
        if absent and self.absent is not None:
            return deepcopy(self.absent)  # as `generation/segment.py` does
        if not absent and self.start and interface.cache is not None:
            start, self.start = self.start, None  # it is written into
            return start.get(interface.cache.field)
        mask = self.mask[:, :PREFIX].clone()
        mask[-1, -1] = int(absent)
        read = interface.call(self.backbone, self.ids[:, :PREFIX], mask, use_cache=True)[1]
        if absent:
            self.absent = deepcopy(read)
        return read

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
        output = backbone.generate(
            input_ids=self.ids[:, : PREFIX + 1],  # the last row begins here
            attention_mask=self.mask[:, : PREFIX + 1],
            generation_config=given,
            logits_processor=LogitsProcessorList([_Dictated(self.ids)]),
            synced_gpus=False,  # nobody else may be at it
            **handed,
        )
        logits, end = torch.stack(output.logits, 1).float(), PREFIX + WRITTEN
        if self._passes(off := self._distances(logits, self.whole[:, :WRITTEN])):
            return off
        # It may be otherwise in rows of another length.
        return self._distances(logits, self._read(self.ids[:, :end], self.mask[:, :end])[:, -WRITTEN:])

    def _distances(self, got: Tensor, whole: Tensor) -> Tensor:
        """Per token of ``[rows, time, vocab]``, in units of how far logits are that lack the prefix."""
        return (got - whole).norm(dim=-1) / self.far

    def _passes(self, distances: Tensor) -> bool:
        """Of each row's tokens the median counts, for in 16 bits rounding may choose another expert; the first row is
        not padded."""
        first, *others = distances.median(1).values.tolist()
        spread = 1 if self.exact else SPREAD
        usual = min(COARSE, max(self.noise, spread * first))
        return first <= min(COARSE, spread * self.noise) and all(off <= usual for off in others)


def _arguments(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Those that may take a cache."""
    ours = {"input_ids", "attention_mask", "use_cache", "return_dict"}
    return [name for name, p in parameters.items() if p.default is None and name not in ours]


def say(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
