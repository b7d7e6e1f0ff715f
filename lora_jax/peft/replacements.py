"""Loads tensors that are not factors: replaced weights and biases, trained rows, offsets of biases."""

import collections
from collections.abc import Collection, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter
from lora_jax.peft import keys, ties
from lora_jax.peft.adapter_tensors import StoredTensor
from lora_jax.peft.arrays import common_dtype
from lora_jax.peft.config import CONFIG
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.keys import Key
from lora_jax.peft.load_context import LoadContext
from lora_jax.peft.module import Module
from lora_jax.peft.problems import collect_problems
from lora_jax.peft.weights import Binding


def load_offsets(context: LoadContext, modules: Mapping[str, Module[StoredTensor]]) -> dict[str, Adapter]:
    """Loads the biases on B of layers that have a bias, as offsets of that bias."""
    base, config = context.base, context.config
    by_leaf: dict[str, dict[str, tuple[np.ndarray, float]]] = collections.defaultdict(dict)
    for name, module in modules.items():
        tensor, bias = module.tensors.get("b_bias"), base.bias(name)
        if tensor is None:
            if config.lora_bias:
                context.problems.append("missing: " + keys.factor_keys(module.label, embedding=False)["b_bias"])
        elif not config.lora_bias:
            context.problems.append(f"unused: {tensor.key}, since {CONFIG} has lora_bias false")
        elif bias is not None:
            with collect_problems(context.problems):
                binding = base.binding(bias)
                by_leaf[binding.path][bias] = tensor.read(binding.tensor_shape), module.scale
        elif name in base.tied and context.tensors.read(tensor.key).any():
            context.problems.append(f"unsupported: {tensor.key}, since {name} is the embedding's weight (tied)")
    return {path: _make_offset(context, offsets) for path, offsets in by_leaf.items()}


def _make_offset(context: LoadContext, offsets: Mapping[str, tuple[np.ndarray, float]]) -> OffsetAdapter:
    """An offset of a leaf, from the values and scales of its tensors; zeros for other tensors of the leaf."""
    base = context.base
    binding = base.binding(next(iter(offsets)))
    scales = {scale for _, scale in offsets.values()}
    (scale,) = scales if len(scales) == 1 and all(scales) else (1.0,)
    zeros = np.zeros(binding.tensor_shape, np.float32)

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
        value, tensor_scale = offsets.get(base.bare(name), (zeros, scale))
        return (value * np.float32(tensor_scale / scale))[part]

    value = binding.join(read, next(iter(offsets.values()))[0].dtype)
    return OffsetAdapter(value=jnp.asarray(value), scale=jnp.asarray(scale, jnp.float32), axes=())


def load_values(
    context: LoadContext, values: Sequence[Key], modules: Mapping[str, Module[StoredTensor]]
) -> dict[str, Adapter]:
    """Loads saved modules and biases, which are trained in full.

    PEFT also stores an embedding that has factors, or that may have been resized; an unchanged one is ignored.
    """
    base = context.base
    replaced: dict[str, Key] = {}
    for key in values:
        name = base.file_name(key.name)
        primary = base.tied.get(name, name)
        if primary not in base.tensors:
            context.problems.append(context.describe_unknown(key))
            continue
        with collect_problems(context.problems):
            shape = _replacement_shape(context, key, primary, primary in modules)
            value = context.tensors.read_checked(key.key, shape)
            is_saved = keys.saved_module(key.module, context.config.modules_to_save)
            is_copy = primary in modules or (keys.split_name(name)[1] == "weight" and not is_saved)
            if is_copy and value.shape == base.binding(primary).tensor_shape:
                if base.has_value(primary, value):
                    continue
                if primary in modules:
                    raise ValueError(f"unsupported: {key.key} differs from the base's, and has factors too")
            replaced.setdefault(primary, key)
    delta: dict[str, Adapter] = {}
    for path, binding in {base.binding(name).path: base.binding(name) for name in replaced}.items():
        with collect_problems(context.problems):
            delta[path] = _make_full(context, binding, replaced)
    return delta


def _replacement_shape(context: LoadContext, key: Key, name: str, has_factors: bool) -> tuple[int, ...]:
    """The shape that a replaced tensor must have: the base's, or that of a table with more tokens."""
    binding, stored = context.base.binding(name), context.tensors[key.key]
    shape = binding.tensor_shape
    is_table = binding.kind == "embedding" or ties.has_tokens(key.name)
    if (
        is_table
        and not has_factors
        and len(binding.tensors) == 1
        and stored[1:] == shape[1:]
        and stored[:1] > shape[:1]
    ):
        return stored
    return shape


def _make_full(context: LoadContext, binding: Binding, replaced: Mapping[str, Key]) -> FullAdapter:
    """Makes a leaf from replaced tensors and, for the others, those of the base."""
    base, tensors = context.base, context.tensors
    if len(binding.tensors) == 1:
        (name,) = map(base.bare, binding.tensors)
        binding = binding.resized(tensors[replaced[name].key])
    names = [base.bare(name) for name in binding.tensors]
    dtype = common_dtype([tensors.read(replaced[name].key).dtype for name in names if name in replaced])
    rest: dict[str, np.ndarray] = {}
    if any(name not in replaced for name in names):
        rest = {base.bare(name): value for name, value in binding.split(base.leaf(binding.path)).items()}

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
        bare = base.bare(name)
        return tensors.read(replaced[bare].key, part) if bare in replaced else rest[bare][part]

    return FullAdapter(value=jnp.asarray(binding.join(read, dtype)), axes=())


def load_rows(context: LoadContext, rows: Sequence[Key], untied: Collection[str]) -> list[tuple[str, Adapter]]:
    """Loads trained rows (trainable tokens), except those of weights that the adapter unties.

    Returns:
      Pairs of a leaf's path and its adapter.
    """
    adapters: list[tuple[str, Adapter]] = []
    for key in rows:
        name = context.base.file_name(f"{key.module}.weight")
        if name in untied or name in context.base.tied:
            continue
        with collect_problems(context.problems):
            if not _repeats_rows(context, key, rows):
                adapters.append(_make_rows(context, key, name))
    return adapters


def _repeats_rows(context: LoadContext, key: Key, rows: Sequence[Key]) -> bool:
    """Whether rows repeat those of the base's table, for another module that PyTorch ties to it.

    PEFT writes the rows of each tied module if one list of rows is for all modules.
    """
    base = context.base
    if base.file_name(f"{key.module}.weight") in base.tensors or "" not in context.config.trainable_token_indices:
        return False
    tables = [other for other in rows if base.file_name(f"{other.module}.weight") in base.tensors]
    for other in tables:
        ties.check_equal_rows(other, key, context.tensors)
    return bool(tables)


def _make_rows(context: LoadContext, key: Key, name: str) -> tuple[str, Adapter]:
    if name not in context.base.tensors:
        raise ValueError(f"unused: {context.tensors.describe(key.key)}: the base has no {name}")
    ids = context.config.tokens(key.module)
    if ids is None:
        raise ValueError(f"unused: {key.key}, since {CONFIG} has no trainable_token_indices for it")
    binding = context.base.binding(name)
    layout = FactorLayout(binding)
    row_role, other_role = layout.row_roles()
    if len(binding.tensors) > 1 or layout.axes.count(row_role) != 1 or BATCH in layout.axes:
        raise ValueError(f"unsupported: {key.key} on {binding.path!r}, which is not a single table")
    count = layout.sizes(layout.labels(row_role))[0]
    if len(set(ids)) < len(ids) or not all(0 <= i < count for i in ids):
        raise ValueError(
            f"{CONFIG}: trainable_token_indices {list(ids)} of {key.module}: expected different rows of a table of "
            f"{count}"
        )
    shape = (len(ids), *layout.sizes(layout.tensor_labels(other_role)))
    rows = layout.to_leaf(context.tensors.read_checked(key.key, shape), other_role)
    axes = tuple(IN if role == row_role else OUT for role in layout.axes)
    return binding.path, RowsAdapter(rows=jnp.asarray(rows), ids=jnp.asarray(ids, jnp.int32), count=count, axes=axes)
