"""Bases in every format that is tested with every recipe, transformation and mesh."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import lora_jax as lora
from lora_jax.leaves import is_quantized
from lora_jax.quantization import shardings

FORMATS = {"NF4": lora.NF4(block=4), "Q8_0": lora.Q8_0(), "Q4_0": lora.Q4_0(), "Q4_1": lora.Q4_1(), "Q4_K": lora.Q4_K()}
"""By name. Only NF4 has blocks that are small enough for the layers of the contract suite; others are padded there."""


def quantize(base, rules, fn=None, *args):
    """`lora.quantize`, which also takes formats that are only read: their leaves get random blocks."""
    read = {form for form in rules.values() if form is not None and form.is_read_only}
    if not read:
        return lora.quantize(base, rules, fn, *args)
    encoded = {pattern: lora.Q8_0(axes=form.axes) if form in read else form for pattern, form in rules.items()}
    (form,) = {dataclasses.replace(form, axes=None) for form in read}
    small = lora.quantize(base, encoded, fn, *args)
    is_encoded = lambda node: is_quantized(node) and node.format == lora.Q8_0()  # noqa: E731
    return jax.tree.map(
        lambda node: random_blocks(node, form) if is_encoded(node) else node, small, is_leaf=is_quantized
    )


def random_blocks(leaf, form):
    """A leaf like one in Q8_0, in Q4_K: random codes and scales of parts, with values about as large as the leaf's."""
    rest = [size for axis, size in enumerate(leaf.codes.shape, -leaf.codes.ndim) if axis != leaf.block_axis]
    number = -(-math.prod(leaf.sizes) // form.block)
    blocks = np.random.default_rng(number).integers(0, 256, (*rest, number, form.block_bytes), dtype=np.uint8)
    largest = float(jnp.max(jnp.abs(leaf.dequantize().astype(jnp.float32))))
    scales = np.asarray([2 * largest / (63 * 15), largest / 63], np.float16)
    blocks[..., :4] = scales.view(np.uint8)
    codes = jnp.moveaxis(jnp.asarray(blocks.reshape(*rest, -1)), -1, leaf.block_axis)
    result = dataclasses.replace(leaf, codes=codes, format=form)
    sharding = leaf.codes.sharding
    if not isinstance(sharding, NamedSharding):
        return result
    return jax.device_put(result, shardings(result, leaf.unpacked(sharding, leaf.ndim)))
