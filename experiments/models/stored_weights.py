"""The weights of a checkpoint as its files store them, read onto shardings."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError
from experiments.models.shards import read_shards
from experiments.models.stored_codes import StoredCodes
from experiments.pretrained.files import Tensors
from lora_jax import peft
from lora_jax.quantization import Plan, bitsandbytes_tensors, from_bitsandbytes, shardings

_LISTED = 12  # the maximum number of problems in an error


class StoredWeights:
    """The tensors of a checkpoint by their usual names, without the prefix that a bare model's names lack.

    Args:
      tensors: The tensors in the files.
      prefix: The prefix of the names of a full model.
      spellings: See :func:`experiments.models.checkpoint.load`.
      copies: See :func:`experiments.models.checkpoint.load`.

    Raises:
      UserError: Two tensors have the same usual name.
    """

    def __init__(
        self,
        tensors: Tensors,
        prefix: str,
        spellings: Sequence[tuple[str, str]],
        copies: Mapping[str, str],
        codes: StoredCodes | None = None,
    ):
        self._tensors = tensors
        self._prefix, self._codes = prefix, codes
        self._names: dict[str, str] = {}  # usual name -> name in the file
        for name in tensors:
            usual = name
            for pattern, replacement in spellings:
                usual = re.sub(pattern, replacement, usual)
            usual = usual.removeprefix(prefix)
            if usual in self._names:
                raise UserError(f"{tensors.file_of(name)}: {name} and {self._names[usual]} are the same weight")
            self._names[usual] = name
        for name, source in copies.items():
            if (source := source.removeprefix(prefix)) in self._names:
                self._names.setdefault(name.removeprefix(prefix), self._names[source])
        self._quantized = bitsandbytes_tensors(self._names)

    def has_any(self, binding: peft.Binding) -> bool:
        """Whether the checkpoint holds a tensor of the weight."""
        return any(name.removeprefix(self._prefix) in self._names for name in binding.tensors)

    def leaf(self, binding: peft.Binding, dtype: Any, sharding: jax.sharding.Sharding | None, plan: Plan | None) -> Any:
        """Returns the weight on its devices, quantized if the checkpoint or the plan says so."""
        if any(name.removeprefix(self._prefix) in self._quantized for name in binding.tensors):
            if plan is not None and binding.path in plan.chosen:
                raise UserError(f"{binding.path}: cannot be quantized, since it is quantized in the checkpoint")
            leaf = self._quantized_leaf(binding, dtype)
            if leaf.shape != binding.shape:
                raise UserError(f"{binding.path}: shape {leaf.shape} in the checkpoint, expected {binding.shape}")
            return leaf if sharding is None else jax.device_put(leaf, shardings(leaf, sharding))
        if self._codes is not None and self._codes.kind(binding) is not None:
            return self._codes.leaf(binding, dtype, sharding)
        if plan is None or binding.path not in plan.chosen:
            return self._device_array(binding, dtype, sharding, slice(None))
        by_layer = bool(binding.stacked) and (sharding is None or not _divides_first(sharding, binding.shape))
        layers = [slice(i, i + 1) for i in range(binding.shape[0])] if by_layer else [slice(None)]
        parts = [
            jax.block_until_ready(plan(binding.path, self._device_array(binding, dtype, sharding, layer)))
            for layer in layers
        ]
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if by_layer else parts[0]

    def _quantized_leaf(self, binding: peft.Binding, dtype: Any) -> Any:
        """Returns a weight that is quantized in the checkpoint, with the same codes."""
        if (binding.weight.layout != peft.LINEAR and binding.weight.module != "conv1d") or len(binding.stacked) > 1:
            raise UserError(f"{binding.path}: quantized in the checkpoint, which is supported for linear layers only")
        leaves = []
        for name in binding.tensors:
            usual = name.removeprefix(self._prefix)
            if usual not in self._quantized:
                raise UserError(f"{name}: not quantized, but other layers of {binding.path} are; unroll the layers")
            tensors = {part: self._tensors.read(self._names[part]) for part in self._quantized[usual]}
            leaf = from_bitsandbytes(tensors)[usual]
            leaves.append(dataclasses.replace(leaf, dtype=np.dtype(dtype or leaf.dtype)))
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves) if binding.stacked else leaves[0]

    def _device_array(
        self, binding: peft.Binding, dtype: Any, sharding: jax.sharding.Sharding | None, layers: slice
    ) -> jax.Array:
        """Returns the weight, or the given slice of its first axis, on its devices."""
        dtype = jnp.dtype(dtype or self._dtype(binding))
        first, last, _ = layers.indices(binding.shape[0] if binding.shape else 0)
        shape = (last - first, *binding.shape[1:]) if binding.shape else ()
        window = (layers, *(slice(None) for _ in binding.shape[1:])) if binding.shape else None
        if sharding is None:
            return jax.device_put(binding.join(self._read, dtype, window))

        def read(part: tuple[tuple[int, int], ...]) -> np.ndarray:
            limits = [(start + first, stop + first) for start, stop in part[:1]] + list(part[1:])
            return binding.join(self._read, dtype, tuple(slice(*limit) for limit in limits))

        return read_shards(shape, sharding, read)

    def _dtype(self, binding: peft.Binding) -> np.dtype:
        """Returns the dtype of the weight's first tensor."""
        return self._read(next(iter(binding.tensors)), tuple(slice(0, 0) for _ in binding.tensor_axes)).dtype

    def _read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        return self._tensors.read(self._names[name.removeprefix(self._prefix)], part)

    def check(self, directory: Path, bindings: Sequence[peft.Binding], replaced: set[str], unused: str) -> None:
        """Raises a UserError that lists every difference in names and shapes.

        Args:
          directory: The directory of the checkpoint.
          bindings: The weights to read.
          replaced: The names of tensors that new weights replace.
          unused: A pattern of the names of tensors that the model does not use.
        """
        shapes = {
            name.removeprefix(self._prefix): shape for binding in bindings for name, shape in binding.shapes.items()
        }
        expected = shapes.keys() | {name.removeprefix(self._prefix) for binding in bindings for name in binding.tied}
        expected |= {name.removeprefix(self._prefix) for name in replaced}
        parts = {part for weight, parts in self._quantized.items() for part in parts if part != weight}
        available = {name: self._tensors[stored] for name, stored in self._names.items() if name not in parts}
        # Packed codes have another shape than the weight, which is compared when the weight is read.
        available |= {name: shapes.get(name, available[name]) for name in self._quantized if name in available}
        problems = [f"missing: {name} {shape}" for name, shape in shapes.items() if name not in available]
        problems += [
            f"unexpected: {name} {available[name]}"
            for name in sorted(available.keys() - expected)
            if not re.search(unused, name)
        ]
        problems += [
            f"shape: {name} is {available[name]}, expected {shape}"
            for name, shape in shapes.items()
            if name in available and available[name] != shape
        ]
        if problems:
            more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            listed = "\n  ".join([*problems[:_LISTED], *more])
            raise UserError(f"{directory}: the weights do not fit the model ({len(problems)} problems):\n  {listed}")


def _divides_first(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> bool:
    """Whether a sharding divides the first axis of an array."""
    return sharding.shard_shape(shape)[0] != shape[0]
