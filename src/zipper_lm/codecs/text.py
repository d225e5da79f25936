"""Text codec: any tokenizer of transformers, or a small one trained on the user's text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zipper_lm.codecs.codec import CODEC_FILE
from zipper_lm.utils.files import files_into, write_json
from zipper_lm.utils.hub import HUB_ARGUMENTS
from zipper_lm.utils.json_files import read_mapping

_SPACE = "▁"  # how tokenizers without bytes spell a space
_NAMED = ("eos_token", "bos_token", "pad_token")  # what a tokenizer may be told of its own tokens
_SPECIALS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class TextCodec:
    """Strings <-> ids of a tokenizer, without special tokens.

    Text is only text: ``"</s>"`` inside a string is spelled out like any other word, never read as the special
    token. Who wants special ids inside a segment passes the ids.

    A tokenizer of a large LLM has many tokens, most of them rare: of few pairs they are not learned. With `merges`,
    text is spelled by the first merges of a BPE tokenizer alone, in smaller pieces that are all frequent. Ids mean what
    they always did, and any id is decoded.

    Args:
        tokenizer: any tokenizer of transformers that has an EOS token.
        merges: how many of its merges are used; `None` is all.

    Raises:
        ValueError: if the tokenizer has no EOS token, or not so many merges.
    """

    kind: ClassVar[str] = "text"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, merges: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer has no eos_token, so a segment could never end; name one of its tokens, in a recipe by "
                'codec: {kind: text, source: ..., options: {eos_token: "[SEP]"}}'
            )
        self.tokenizer, self.merges = tokenizer, merges
        self._pieces = tokenizer if merges is None else _with_merges(tokenizer, merges)
        self._vocab_size = max(tokenizer.get_vocab().values()) + 1  # len() is less where ids have gaps
        self._known: set[str] = set()  # characters seen to survive, so that each is checked once

    @classmethod
    def make(
        cls,
        values: Sequence[str] = (),
        *,
        source: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        **options: Any,
    ) -> TextCodec:
        """As a recipe asks for it: the tokenizer at `source` (folder or Hub id), or a small one of the `values`.

        Raises:
            ValueError: as `from_pretrained` or `train`.
        """
        if source is not None:
            if unused := sorted(set(options) - {*_NAMED, "merges", "trust_remote_code", *HUB_ARGUMENTS}):
                raise ValueError(f"codec.options {unused} have no effect: the tokenizer of {source} is taken as it is")
            return cls.from_pretrained(source, revision=revision, **options)
        return cls.train(values, **options)

    @property
    def plain(self) -> TextCodec:
        """The tokenizer with all of its merges: how a pre-trained tower was taught to read."""
        return self if self.merges is None else TextCodec(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        """Largest id of the tokenizer, plus one."""
        return self._vocab_size

    @property
    def bos_id(self) -> int:
        """Id of BOS, or of EOS where the tokenizer has no BOS."""
        bos = self.tokenizer.bos_token_id
        return int(self.eos_id if bos is None else bos)

    @property
    def eos_id(self) -> int:
        """Id of EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Id of PAD, or of EOS where the tokenizer has no PAD."""
        pad = self.tokenizer.pad_token_id
        return int(self.eos_id if pad is None else pad)

    @property
    def rate(self) -> None:
        """`None`: text has no time."""
        return None

    def encode(self, values: Sequence[str]) -> list[list[int]]:
        """Strings to ids; an empty string has none.

        Raises:
            ValueError: if a value is no string, or has characters that the tokenizer lacks (they are named).
        """
        return [self._encode_one(number, text) for number, text in enumerate(_as_list(values, "values"))]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Ids to strings, special tokens left out.

        Raises:
            ValueError: if an id is not in ``[0, vocab_size)``.
        """
        texts = []
        for number, row in enumerate(ids):
            row = [int(i) for i in row]
            for i in row:
                if not 0 <= i < self.vocab_size:
                    raise ValueError(f"text ids, row {number}: id {i} is not in [0, {self.vocab_size})")
            texts.append(self._decode_one(row))
        return texts

    def save_pretrained(self, path: str | Path) -> None:
        """Write `codec.json` and the tokenizer's own files into the folder `path`."""
        with files_into(path, last=CODEC_FILE) as folder:
            self.tokenizer.save_pretrained(folder)
            fewer = {} if self.merges is None else {"merges": self.merges}
            write_json(folder / CODEC_FILE, {"kind": self.kind, **fewer})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, trust_remote_code: bool = False, merges: int | None = None, **kwargs: Any
    ) -> TextCodec:
        """Read what `save_pretrained` wrote, or any tokenizer folder or Hub id.

        Args:
            path: folder or Hub id.
            merges: see `TextCodec`; `None` is as it was saved.
            trust_remote_code: let a tokenizer that has code of its own run it.
            kwargs: passed on to `AutoTokenizer.from_pretrained`, such as ``revision``; but ``eos_token``, ``bos_token``
                and ``pad_token`` name tokens that the tokenizer has, where it does not say which of them these are.

        Raises:
            ValueError: if the folder holds another kind of codec, or no tokenizer, or one that lacks a token so named.
        """
        file = Path(path) / CODEC_FILE
        if file.is_file():
            fields = read_mapping(file)
            if (kind := fields.get("kind")) != cls.kind:
                raise ValueError(f"{file}: kind is {kind!r}, not {cls.kind!r}")
            merges = fields.get("merges") if merges is None else merges
        named = {name: kwargs.pop(name) for name in _NAMED if name in kwargs}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code, **kwargs)
        except Exception as error:  # transformers, tokenizers and sentencepiece each have their own kinds
            raise ValueError(f"text codec: no tokenizer at {path} can be used: {_first_line(error)}") from error
        own = tokenizer.get_vocab()
        if strange := {name: token for name, token in named.items() if token not in own}:
            raise ValueError(f"text codec: the tokenizer at {path} has no such tokens: {strange}")
        tokenizer.add_special_tokens(named)
        try:
            codec = cls(tokenizer, merges)
        except ValueError as error:
            raise ValueError(f"text codec: the {error} ({path})") from error
        try:  # whatever is wrong in its files shows when it is used, in ways of its own
            codec._missing("a", codec._ids("a"))
            codec._decode_one(codec._ids("a"))
            special = (codec.bos_id, codec.eos_id, codec.pad_id)
            assert all(0 <= i < codec.vocab_size for i in special), f"special ids {special} of {codec.vocab_size}"
        except Exception as error:
            raise ValueError(f"text codec: the tokenizer at {path} cannot be used: {_first_line(error)}") from error
        return codec

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int = 512, lower: bool = True) -> TextCodec:
        """Train a small BPE tokenizer over characters (Sennrich et al. 2016, arXiv 1508.07909).

        Text is brought to Unicode NFC, runs of white space become one space, and, with `lower`, letters become
        small; such text comes back unchanged from ``decode(encode(text))``. Characters absent from `texts` are
        refused by `encode`.

        Args:
            texts: strings to learn from.
            vocab_size: number of ids, the four special ones included; less where the texts offer fewer merges.
            lower: whether to fold letters to lower case.

        Raises:
            ValueError: if there is no text, or `vocab_size` is too small for its characters.
        """
        lines = [_checked(number, text) for number, text in enumerate(_as_list(texts, "texts"))]
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
        tokenizer = Tokenizer(models.BPE(unk_token=_SPECIALS["unk_token"]))
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Lowercase()] if lower else steps)
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
        tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
        alphabet = set().union(*(tokenizer.normalizer.normalize_str(line) for line in lines)) - {" "}
        if not alphabet:
            raise ValueError("texts hold no characters to train a tokenizer on")
        least = len(alphabet) + len(_SPECIALS) + 1  # one for the space
        if vocab_size < least:
            raise ValueError(
                f"vocab_size={vocab_size} is too small: the texts have {len(alphabet)} different characters, "
                f"so at least {least} are needed"
            )
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(_SPECIALS.values()), show_progress=False
        )
        tokenizer.train_from_iterator(lines, trainer)
        return cls(PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **_SPECIALS))

    def _encode_one(self, number: int, text: str) -> list[int]:
        _checked(number, text)
        if not text:
            return []
        ids: list[int] = self._ids(text)
        missing = self._missing(text, ids)
        if missing:
            raise ValueError(f"text {number}: the tokenizer lacks {missing} in {_shortened(text)!r}")
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self._pieces(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def _decode_one(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _missing(self, text: str, ids: list[int]) -> list[str]:
        """Characters (or words, for tokenizers of whole words) of `text` that `ids` do not carry."""
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in ids:
            return sorted(self._unknown_pieces(text, unknown)) or ["some characters"]
        characters = set(self._normalised(text))
        if characters <= self._known:
            return []
        # Tokenizers with neither bytes nor an unknown token drop what they lack without a word.
        lost = {c for c in characters - set(self._decode_one(ids)) if not c.isspace() and c.isprintable()}
        if _SPACE not in text:
            lost.discard(_SPACE)
        self._known |= characters - lost
        return sorted(lost)

    def _normalised(self, text: str) -> str:
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def _unknown_pieces(self, text: str, unknown: int) -> set[str]:
        single = {c for c in set(self._normalised(text)) if not c.isspace() and unknown in self._ids(c)}
        if single or not self.tokenizer.is_fast:
            return single
        encoded = self._pieces(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        spans = zip(encoded["input_ids"], encoded["offset_mapping"])
        return {text[start:end] for i, (start, end) in spans if i == unknown}


def _with_merges(tokenizer: PreTrainedTokenizerBase, merges: int) -> PreTrainedTokenizerBase:
    """A tokenizer that spells by its first merges alone, the frequent ones: they are kept in the order in which they
    were learned (Sennrich et al. 2016, arXiv 1508.07909)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    model = state.get("model") or {}
    if model.get("type") != "BPE":
        made = model.get("type") or type(tokenizer).__name__
        raise ValueError(f"tokenizer has no merges, which merges={merges!r} counts: it is no BPE, but {made}")
    if isinstance(merges, bool) or not isinstance(merges, int) or not 0 <= merges <= len(model["merges"]):
        most = len(model["merges"])
        raise ValueError(f"tokenizer has {most} merges: merges must be a whole number from 0 to {most}, got {merges!r}")
    # some families look whole words up first, which no merge makes then
    model |= {"merges": model["merges"][:merges], "ignore_merges": False}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def _first_line(error: Exception) -> str:
    """What an error says, which may be pages; its kind, if it says nothing or only a name."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if " " in first else f"{type(error).__name__} {first}".strip()


def _as_list(values: Iterable[str], name: str) -> list[str]:
    if isinstance(values, str):
        raise ValueError(f"{name} must be a list of strings, got one string")
    return list(values)


def _checked(number: int, text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text {number} must be a string, got {type(text).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"text {number} holds half of a UTF-16 pair, which is no character: {_shortened(text)!r}")
    return text


def _shortened(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
