"""Whether a model's weights are what they were: asked between any two steps while documents come and go."""

from __future__ import annotations

from torch import nn


class Watch:
    """Of a model's parameters. Its modules are listed once: walking through their tree takes longer than all else.

    Args:
        model: any.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._children = self._parts()

    def version(self) -> int | None:
        """A number that is another one after any parameter was written to or replaced; `None` once any module was: the
        model needs another watch. What is written to through `parameter.data` is not noticed: torch counts no version
        there."""
        if self._parts() != self._children:
            return None
        parameters = (p for module in self._modules for p in module._parameters.values() if p is not None)
        return hash(tuple((p._version, p.data_ptr(), p.dtype) for p in parameters))

    def _parts(self) -> list[int]:
        return [id(child) for module in self._modules for child in module._modules.values()]
