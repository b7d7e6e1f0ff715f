"""Leaves quantized where they are: one compiled function a kind of weight, each device its own shard."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax.quantization.formats import Format
from lora_jax.quantization.leaf import Quantized
from lora_jax.quantization.placement import shardings


def encoded(weight: Any, form: Format, axes: tuple[str, ...]) -> tuple[Quantized, bool]:
    """Quantizes a leaf where it is.

    Args:
      weight: An array, or a `jax.ShapeDtypeStruct`. From a `NamedSharding` of it codes and scales get theirs.
      form: The format.
      axes: The role of each axis.

    Returns:
      The quantized leaf, and whether the weight is finite in float32 (a tracer and a shape count as finite).

    Raises:
      ValueError: A shard of the weight would be no whole number of blocks.
    """
    if isinstance(weight, jax.core.Tracer):
        return form.quantize(weight, axes), True
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    made = jax.eval_shape(functools.partial(form.quantize, axes=axes), shape)
    sharding = getattr(weight, "sharding", None)
    placed = None if sharding is None else shardings(made, sharding)
    if not isinstance(weight, jax.ShapeDtypeStruct):
        on_mesh = placed if isinstance(sharding, NamedSharding) else None
        leaves, treedef = jax.tree.flatten(on_mesh)  # which compare by what they hold, so that equal ones are found
        made, finite = _compiled(form, axes, tuple(leaves), treedef)(weight)
        return made, bool(finite)
    if placed is not None:
        made = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), made, placed)
    return made, True


@functools.lru_cache(maxsize=256)
def _compiled(form: Format, axes: tuple[str, ...], leaves: tuple[NamedSharding, ...], treedef: Any):
    """One function for all weights of a kind, with the shardings of codes and scales where they lie on a mesh."""

    def both(weight):
        return form.quantize(weight, axes), jnp.isfinite(weight.astype(jnp.float32)).all()

    if not leaves:
        return jax.jit(both)
    placed, mesh = jax.tree.unflatten(treedef, leaves), leaves[0].mesh
    whole = NamedSharding(mesh, PartitionSpec())
    if AxisType.Explicit in mesh.axis_types:
        both = jax.sharding.auto_axes(both, out_sharding=(placed, whole))
    return jax.jit(both, out_shardings=(placed, whole))
