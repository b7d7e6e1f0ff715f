"""Four-bit checkpoints as transformers and bitsandbytes write them."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.quantize import codebooks
from lora_jax.quantize.formats import FP4, NF4
from lora_jax.quantize.leaf import Quantized
from lora_jax.quantize.scales import SECOND_BLOCK, Scales

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = {"nf4": (NF4, codebooks.NORMAL_FLOAT), "fp4": (FP4, codebooks.FLOAT)}
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def from_bitsandbytes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a four-bit checkpoint, as it stands in safetensors files.

    Args:
      tensors: Names and arrays, with what bitsandbytes puts beside a weight: `NAME.absmax`, `NAME.quant_map`,
        `NAME.quant_state.bitsandbytes__nf4` (or fp4) and, doubly quantised, `NAME.nested_absmax` and
        `NAME.nested_quant_map`.

    Returns:
      The tensors by name. A quantised weight, `[out, in]` in PyTorch, is a leaf for a kernel `[in, out]`: the same
      codes and scales, so the same numbers. Other tensors are what they were.

    Raises:
      ValueError: A weight's tensors are incomplete or do not fit each other, or hold what these leaves do not:
        another type or codebook, rows of no whole number of blocks.

    Example:
      >>> import safetensors.numpy
      >>> tensors = safetensors.numpy.load_file("tests/fixtures/quantize/four_bits.safetensors")
      >>> from_bitsandbytes(tensors)["layers.0.up.weight"]
      NF4[128, 16](dtype=bfloat16, block=64, double, 4.156 bits)
    """
    found = four_bit_tensors(tensors)
    parts = {name for names in found.values() for name in names}
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return rest | {name: _leaf(tensors, name, names[-1]) for name, names in found.items()}


def four_bit_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """The quantised weights of a checkpoint by name, and the names of the tensors of each, its state last.

    Example:
      >>> four_bit_tensors(["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "b.weight"])
      {'a.weight': ['a.weight', 'a.weight.absmax', 'a.weight.quant_state.bitsandbytes__nf4']}
    """
    known = set(names)
    states = {name.rpartition(_STATE)[0]: name for name in known if _STATE in name}
    return {
        weight: [name for name in (weight, *(f"{weight}.{part}" for part in _PARTS), state) if name in known]
        for weight, state in states.items()
    }


def _leaf(tensors: Mapping[str, Any], name: str, state_name: str) -> Quantized:
    try:
        state = json.loads(bytes(np.asarray(tensors[state_name])).decode())
        kind, block, shape = state["quant_type"], int(state["blocksize"]), tuple(map(int, state["shape"]))
        dtype = jnp.dtype(state["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state_name}: not the state of a quantised weight ({error}).") from error
    if kind not in _FORMATS:
        raise ValueError(f"{name}: of the type {kind!r}; expected one of {', '.join(map(repr, _FORMATS))}.")
    recipe, levels = _FORMATS[kind]
    if len(shape) != 2 or shape[1] % block:
        raise ValueError(f"{name}: of shape {shape} in blocks of {block}, which are no whole number of blocks a row.")
    out, into = shape
    double = "nested_blocksize" in state

    def part(suffix: str, size: int, dtype: Any) -> np.ndarray:
        full = f"{name}.{suffix}" if suffix else name
        if full not in tensors:
            raise ValueError(f"{full}: missing beside {state_name}.")
        array = np.asarray(tensors[full]).reshape(-1)
        if array.size != size or array.dtype != dtype:
            raise ValueError(
                f"{full}: {array.size} × {array.dtype}; a weight of shape {shape} needs {size} × {np.dtype(dtype)}."
            )
        return array

    if not np.array_equal(part("quant_map", 16, np.float32), np.asarray(levels, np.float32)):
        raise ValueError(f"{name}.quant_map: not the levels of {kind}.")
    packed = part("", out * into // 2, np.uint8)
    # bitsandbytes packs neighbours into a byte; here the halves of a block share their bytes.
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(out, -1, 2, block // 2)
    codes = ((codes[:, :, 0] << 4) | codes[:, :, 1]).reshape(out, into // 2).T
    number = out * into // block
    absmax = part("absmax", number, np.uint8 if double else np.float32).reshape(out, -1).T
    scales: Any = jnp.asarray(absmax)
    if double:
        if state["nested_blocksize"] != SECOND_BLOCK or not np.array_equal(
            part("nested_quant_map", 256, np.float32), codebooks.dynamic_map()
        ):
            raise ValueError(f"{name}: scales in blocks of {state['nested_blocksize']} or of another codebook.")
        scales = Scales(
            codes=scales,
            second=jnp.asarray(part("nested_absmax", math.ceil(number / SECOND_BLOCK), np.float32)),
            offset=jnp.asarray(state["nested_offset"], jnp.float32),
        )
    return Quantized(
        codes=jnp.asarray(codes),
        scales=scales,
        format=recipe(block, double),
        blocked=(-2,),
        sizes=(into,),
        dtype=np.dtype(dtype),
    )
