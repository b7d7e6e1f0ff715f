"""Quantizes leaves in place: one compiled function for each kind of weight; each device encodes its own shard."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from lora_jax.meshes import replicated
from lora_jax.quantization.formats import Format
from lora_jax.quantization.leaf import Quantized
from lora_jax.quantization.placement import shardings


def quantize_leaf(weight: Any, form: Format, axes: tuple[str, ...]) -> tuple[Quantized, bool]:
    """Quantizes a leaf on its devices.

    Args:
      weight: An array or a `jax.ShapeDtypeStruct`. The shardings of codes and scales follow its `NamedSharding`.
      form: The format.
      axes: The role of each axis.

    Returns:
      The quantized leaf, and whether the format can hold every number (all of a tracer and of a shape count).

    Raises:
      ValueError: A shard of the weight is not a whole number of blocks.
    """
    if isinstance(weight, jax.core.Tracer):
        return form.quantize(weight, axes), True
    shape = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    leaf = jax.eval_shape(functools.partial(form.quantize, axes=axes), shape)
    sharding = getattr(weight, "sharding", None)
    out_shardings = None if sharding is None else shardings(leaf, sharding)
    if not isinstance(weight, jax.ShapeDtypeStruct):
        on_mesh = out_shardings if isinstance(sharding, NamedSharding) else None
        leaves, treedef = jax.tree.flatten(on_mesh)  # flat, because a `Quantized` is compared by identity
        leaf, is_finite = _compiled(form, axes, tuple(leaves), treedef)(weight)
        return leaf, bool(is_finite)
    if out_shardings is not None:
        leaf = jax.tree.map(
            lambda array, to: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=to), leaf, out_shardings
        )
    return leaf, True


@functools.lru_cache(maxsize=256)
def _compiled(form: Format, axes: tuple[str, ...], leaves: tuple[NamedSharding, ...], treedef: Any):
    """The compiled function for all weights of a kind; `leaves` are the shardings of codes and scales on a mesh."""

    def encode(weight):
        return form.quantize(weight, axes), (jnp.abs(weight.astype(jnp.float32)) <= form.largest).all()

    if not leaves:
        return jax.jit(encode)
    mesh = leaves[0].mesh
    out_shardings = jax.tree.unflatten(treedef, leaves), replicated(mesh)
    if AxisType.Explicit in mesh.axis_types:
        encode = jax.sharding.auto_axes(encode, out_sharding=out_shardings)
    return jax.jit(encode, out_shardings=out_shardings)
