"""How many positions a backbone has, where it cannot go past them, and what that leaves to be written."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from zipper_lm.utils.host import on_host

SAID = ("max_position_embeddings", "max_target_positions")  # the latter of decoders of speech recognisers


def position_limit(backbone: nn.Module) -> int | None:
    """The tokens that fit a backbone that keeps a vector for each position, as GPT-2 and OPT do; `None` for others, as
    rotary ones, which run past what their config says."""
    config = getattr(backbone, "config", None)
    if any(hasattr(module, "build_mpt_alibi_tensor") for module in backbone.modules()):
        return int(config.max_seq_len)  # type: ignore[union-attr]  # its table of distances has that length
    said = next((n for name in SAID if isinstance(n := getattr(config, name, None), int)), None)
    if said is None:
        return None
    parts = (getattr(backbone, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output"))
    tokens = {id(getattr(part, "weight", None)) for part in parts}
    for module in backbone.modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in tokens:
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # where families after fairseq begin
            if said <= module.num_embeddings <= said + 2:  # OPT and its kin have two that are never used
                return min(said, module.num_embeddings - first)
    # GPT-J rotates by a table as long as this. MusicGen's sines are one, too, but it makes more when it needs them.
    fixed = (module for module in backbone.modules() if not hasattr(module, "make_weights"))
    tables = (b for module in fixed for b in module.buffers(recurse=False) if b.ndim == 2)
    return said if any(len(table) == said for table in tables) else None


def check_positions(name: str, limit: int, mask: Tensor) -> int:
    """The longest of the rows, in tokens.

    Args:
        name: of the tower, for the message. limit: from `position_limit`. mask: ``[batch, time]``, 1 for tokens.

    Raises:
        ValueError: if it has more tokens than there are positions.
    """
    if mask.is_meta or not mask.numel():  # on meta there is nothing to count
        return 0
    longest = int(on_host(mask).sum(-1).max())
    check_longest(name, limit, longest)
    return longest


def check_longest(name: str, limit: int, longest: int) -> None:
    """Raise `ValueError` for a stream of more tokens than a backbone has positions."""
    if longest > limit:
        raise ValueError(f"{name}: a stream of {longest} tokens, but its backbone has {limit} positions")


def check_length(backbone: PreTrainedModel, lengths: Sequence[int], name: str) -> None:
    """Raise `ValueError` if a stream is longer than the positions that a backbone has, or was made for."""
    limit = position_limit(backbone) or getattr(backbone.config, "max_position_embeddings", None)
    if limit and lengths and max(lengths) > limit:
        raise ValueError(f"{name}: the longest stream has {max(lengths)} tokens, the backbone {limit} positions")


def keep_within(name: str, limit: int, mask: Tensor, given: GenerationConfig) -> None:
    """Let a segment end where positions end; its EOS has one, too.

    Args:
        name, limit, mask: as of `check_positions`; of what is read before. given: written to.

    Raises:
        ValueError: if there is no room for one token and EOS.
    """
    longest = check_positions(name, limit, mask)
    if (room := limit - longest - 1) < 1:
        raise ValueError(f"{name}: its backbone has {limit} positions, and {longest} are read: no room to write")
    asked = given.max_new_tokens if given.max_new_tokens is not None else (given.max_length or 0) - mask.shape[1]
    if asked > room:
        given.max_new_tokens = room
