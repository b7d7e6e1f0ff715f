"""Weights that a checkpoint stores as the codes of GGUF's formats, as quantized leaves with the same codes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from experiments.errors import UserError
from experiments.models.shards import read_shards
from experiments.pretrained.files import Codes
from lora_jax import peft
from lora_jax.quantization import Quantized, from_gguf, shardings


class StoredCodes:
    """The codes of a checkpoint.

    Args:
      codes: The codes by the names of tensors.
      copies: Tensors that are copies of others if the checkpoint does not hold them (an untied head).
    """

    def __init__(self, codes: Codes, copies: Mapping[str, str] | None = None):
        self._codes = codes
        self._copies = {name: source for name, source in (copies or {}).items() if name not in codes}

    def is_uniform(self, binding: peft.Binding) -> bool:
        """Whether the layers and experts of a stacked weight have codes of one type."""
        return len(self._kinds(binding)) == 1

    def kind(self, binding: peft.Binding) -> str | None:
        """Returns the type of a weight's codes; None if the checkpoint stores numbers.

        Raises:
          UserError: The layers or experts of a stacked weight have different types.
        """
        kinds = self._kinds(binding)
        if len(kinds) > 1:
            listed = " and ".join(f"{kind or 'numbers'} ({name})" for kind, name in kinds.items())
            raise UserError(
                f"{binding.path}: stored as {listed}, but layers and experts that are stacked need one type; load the "
                "layers unrolled (Options(scan=False)), or quantize with --quantize nf4"
            )
        return next(iter(kinds))

    def _kinds(self, binding: peft.Binding) -> dict[str | None, str]:
        """Returns the types of a weight's tensors, each with the name of a tensor."""
        return {self._codes.kind(self._stored(name)): name for name in binding.tensors}

    def leaf(self, binding: peft.Binding, dtype: Any, sharding: Sharding | None = None) -> Quantized:
        """Returns a weight that is stored as codes. Each device receives only its shard.

        Args:
          binding: The weight.
          dtype: The dtype of its values when they are used.
          sharding: The sharding of the weight in floats; None uses the default device.

        Raises:
          UserError: No format has its type, or a scale is not finite.
        """
        if sharding is None:
            return self._part(binding, dtype, None)
        leaf = self.abstract(binding, dtype)

        def read(limits: tuple[tuple[int, int], ...]) -> jax.Array:
            # Pending copies would hold several shards in the host's memory.
            return jax.block_until_ready(self._part(binding, dtype, limits).codes)

        codes = read_shards(leaf.codes.shape, shardings(leaf, sharding).codes, read)
        return dataclasses.replace(leaf, codes=codes)

    def _part(self, binding: peft.Binding, dtype: Any, limits: tuple[tuple[int, int], ...] | None) -> Quantized:
        """Returns a weight, or the part of it that has its codes between limits of each axis."""
        sizes = [binding.sizes[label] for label in binding.index_labels]
        *layers, first, last = [slice(None)] * (len(sizes) + 2) if limits is None else [slice(*one) for one in limits]
        rows, numbers = (first, last) if binding.kind == "embedding" else (last, first)
        chosen = [range(size)[positions] for size, positions in zip(sizes, layers, strict=True)]
        leaves = [
            self._layer(binding, self._codes.rows(self._stored(name), rows)[:, numbers], dtype)
            for name, index in binding.tensors.items()
            if all(position in positions for position, positions in zip(index, chosen, strict=True))
        ]
        return _stack(leaves, list(map(len, chosen)))

    def abstract(self, binding: peft.Binding, dtype: Any) -> Quantized:
        """Returns the shapes of a weight that is stored as codes, of which no rows are read."""
        rows = binding.tensor_shape[-1 if binding.kind == "conv1d" else 0]
        name = self._stored(next(iter(binding.tensors)))
        layer = self._layer(binding, np.zeros_like(self._codes.rows(name, slice(1))), dtype)
        shape = tuple(rows if size == 1 else size for size in layer.codes.shape)

        def build() -> Quantized:
            full = dataclasses.replace(layer, codes=jnp.zeros(shape, layer.codes.dtype))
            return _stack([full] * len(binding.tensors), [binding.sizes[label] for label in binding.index_labels])

        return jax.eval_shape(build)

    def _stored(self, name: str) -> str:
        return self._copies.get(name, name)

    def _layer(self, binding: peft.Binding, rows: np.ndarray, dtype: Any) -> Quantized:
        axes = ("lookup", "out") if binding.kind == "embedding" else ("in", "out")
        try:
            return from_gguf(rows, self.kind(binding) or "", axes, dtype=dtype or jnp.float32)
        except ValueError as error:
            raise UserError(f"{binding.path}: --quantize stored: {error}") from None


def _stack(leaves: list[Quantized], sizes: list[int]) -> Quantized:
    """Stacks tensors of a weight along axes of layers and experts, which have these sizes."""
    for size in reversed(sizes):
        groups = [leaves[first : first + size] for first in range(0, len(leaves), size)]
        leaves = [jax.tree.map(lambda *arrays: jnp.stack(arrays), *group) for group in groups]
    return leaves[0]
