"""Memory of a stack's steps."""

from __future__ import annotations

from torch import Tensor


class Room:
    """Tensors that are written anew in each step, kept: memory of that size costs more to get than to fill."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the tensor of a name and shape; its values are those of its last use."""
        if (name, shape) not in self._held:
            self._held[name, shape] = like.new_empty(shape)
        return self._held[name, shape]
