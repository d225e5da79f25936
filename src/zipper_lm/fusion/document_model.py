"""What is common to models that read documents: transformers' base class, without what asks for one vocabulary.

Whatever `PreTrainedModel` offers and a model of several decoders cannot follow is refused by name, with the way on.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from transformers import PreTrainedModel

from zipper_lm.fusion.backbones import check_no_kernels
from zipper_lm.utils.arguments import Loading

_SIZES = "a vocabulary belongs to its codec: resize the backbone before it is fused"
_ADAPTERS = 'adapters are a tower\'s: fuse with train={NAME: "lora"}'


def _refused(name: str, way: str) -> Any:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        kind = self if isinstance(self, type) else type(self)
        raise ValueError(f"{kind.__name__}.{name} cannot be followed: {way}")

    method.__name__, method.__doc__ = name, f"Raises `ValueError`: {way}."
    return method


class DocumentModel(PreTrainedModel):
    """A `PreTrainedModel` whose `forward` takes a batch of documents."""

    base_model_prefix = ""
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    resize_token_embeddings = _refused("resize_token_embeddings", _SIZES)
    resize_position_embeddings = _refused("resize_position_embeddings", _SIZES)
    set_input_embeddings = _refused("set_input_embeddings", _SIZES)
    set_output_embeddings = _refused("set_output_embeddings", _SIZES)
    add_adapter = _refused("add_adapter", _ADAPTERS)
    load_adapter = _refused("load_adapter", _ADAPTERS)
    add_model_tags = _refused("add_model_tags", "write tags into the model card")
    register_for_auto_class: Any = classmethod(
        _refused("register_for_auto_class", "the auto classes know it once zipper_lm is imported")
    )

    def get_input_embeddings(self) -> Any:
        """Raises `NotImplementedError`, by which transformers knows that there is no single one."""
        raise NotImplementedError(
            f"{type(self).__name__} has embeddings for each tower: model.tower(NAME).backbone.get_input_embeddings()"
        )

    @classmethod
    def with_random_weights(cls, config: Any, dtype: torch.dtype | None, trust: bool = False) -> Self:
        """A model of a config alone, its backbones in a dtype, or as recorded; `trust`: with code of their own."""
        raise NotImplementedError

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Self:
        """As transformers' `AutoModel.from_config`, with the arguments of `zipper_lm.utils.arguments.Loading`.

        Raises:
            ValueError: for an argument that is not followed.
        """
        where = f"{cls.__name__}.from_config"
        how = Loading.of(where, (), kwargs)
        check_no_kernels(where, config, how.trust_remote_code)
        model = cls.with_random_weights(config, how.dtype, how.trust_remote_code)
        return how.settle(model, config).train()
