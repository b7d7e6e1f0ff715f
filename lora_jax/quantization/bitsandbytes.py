"""Checkpoints in four and eight bits, in the format of transformers and bitsandbytes."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.quantization import codebooks
from lora_jax.quantization.absmax import FP4, NF4, Int8
from lora_jax.quantization.leaf import Quantized
from lora_jax.quantization.scales import SECOND_BLOCK, Scales
from lora_jax.renamed import module_getattr

_STATE = ".quant_state.bitsandbytes__"
_FORMATS = {"nf4": (NF4, codebooks.NORMAL_FLOAT), "fp4": (FP4, codebooks.FLOAT)}
_SCALES = ".SCB"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def from_bitsandbytes(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the weights of a quantized checkpoint from the tensors of its safetensors files.

    Args:
      tensors: `{name: array}`, including those that bitsandbytes stores with a weight: for four bits `NAME.absmax`,
        `NAME.quant_map`, `NAME.quant_state.bitsandbytes__nf4` (or fp4) and, with double quantization,
        `NAME.nested_absmax` and `NAME.nested_quant_map`; for eight bits (LLM.int8) `SCB` and `weight_format`.

    Returns:
      `{name: leaf}`. A quantized weight, `[out, in]` in PyTorch (also of a Conv1D, which bitsandbytes transposes),
      becomes a leaf for a kernel `[in, out]` with the same codes and scales, so the same values. Other tensors are
      unchanged.

    Raises:
      ValueError: The tensors of a weight are incomplete or inconsistent, or have an unsupported type, codebook or
        layout.

    Example:
      >>> import safetensors.numpy
      >>> tensors = safetensors.numpy.load_file("tests/fixtures/quantization/four_bits.safetensors")
      >>> from_bitsandbytes(tensors)["layers.0.up.weight"]
      NF4[128, 16](dtype=bfloat16, block=64, double, 4.156 bits)
    """
    listed = bitsandbytes_tensors(tensors)
    parts = {name for names in listed.values() for name in names}
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return rest | {name: _leaf(tensors, name, names[-1]) for name, names in listed.items()}


def bitsandbytes_tensors(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns, for each quantized weight of a checkpoint, the names of its tensors; the last one identifies its kind.

    Example:
      >>> bitsandbytes_tensors(["a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4", "b.weight"])
      {'a.weight': ['a.weight', 'a.weight.absmax', 'a.weight.quant_state.bitsandbytes__nf4']}
      >>> bitsandbytes_tensors(["a.weight", "a.SCB", "a.weight_format", "b.weight"])
      {'a.weight': ['a.weight', 'a.weight_format', 'a.SCB']}
    """
    names = set(names)
    states = {name.rpartition(_STATE)[0]: name for name in names if _STATE in name}
    four = {
        weight: [name for name in (weight, *(f"{weight}.{part}" for part in _PARTS), state) if name in names]
        for weight, state in states.items()
    }
    modules = [name.removesuffix(_SCALES) for name in names if name.endswith(_SCALES)]
    eight = {
        f"{module}.weight": [x for x in (f"{module}.weight", f"{module}.weight_format", module + _SCALES) if x in names]
        for module in modules
    }
    return four | eight


def _leaf(tensors: Mapping[str, Any], name: str, last: str) -> Quantized:
    return _eight_bits(tensors, name, last) if last.endswith(_SCALES) else _four_bits(tensors, name, last)


def _eight_bits(tensors: Mapping[str, Any], name: str, scales_name: str) -> Quantized:
    """LLM.int8: integers, and the largest magnitude of each output."""
    if name not in tensors:
        raise ValueError(f"{name}: missing beside {scales_name}.")
    codes, scales = (np.asarray(tensors[x]) for x in (name, scales_name))
    layout = np.asarray(tensors.get(f"{name}_format", 0))
    if layout.any():
        raise ValueError(f"{name}_format: {layout}; expected 0 (row-major).")
    if codes.ndim != 2 or codes.dtype != np.int8 or scales.shape != codes.shape[:1] or scales.dtype != np.float32:
        raise ValueError(
            f"{name}: {codes.shape} × {codes.dtype} with SCB {scales.shape} × {scales.dtype}; expected int8[out, in] "
            "with float32[out]."
        )
    if codes.shape[1] % 2:
        raise ValueError(f"{name}: shape {codes.shape}; expected an even number of inputs.")
    return Quantized(
        codes=jnp.asarray((codes.T.astype(np.int16) + 128).astype(np.uint8)),
        scales=jnp.asarray(scales[None]),
        format=Int8(codes.shape[1], double=False),
        blocked=(-2,),
        sizes=(codes.shape[1],),
        dtype=np.dtype(np.float32),
    )


def _four_bits(tensors: Mapping[str, Any], name: str, state_name: str) -> Quantized:
    try:
        state = json.loads(bytes(np.asarray(tensors[state_name])).decode())
        kind, block, shape = state["quant_type"], int(state["blocksize"]), tuple(map(int, state["shape"]))
        dtype = jnp.dtype(state["dtype"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state_name}: not the state of a quantized weight ({error}).") from error
    if kind not in _FORMATS:
        raise ValueError(f"{name}: type {kind!r}; expected one of {', '.join(map(repr, _FORMATS))}.")
    recipe, levels = _FORMATS[kind]
    if len(shape) != 2 or block < 2 or block % 2 or shape[0] * shape[1] % 2:
        raise ValueError(f"{name}: shape {shape} in blocks of {block}; expected a matrix in blocks of an even size.")
    outputs, inputs = shape
    double = "nested_blocksize" in state

    def part(suffix: str, size: int, dtype: Any) -> np.ndarray:
        full = f"{name}.{suffix}" if suffix else name
        if full not in tensors:
            raise ValueError(f"{full}: missing beside {state_name}.")
        array = np.ascontiguousarray(tensors[full]).reshape(-1)
        if not suffix and array.dtype != dtype:  # bnb_4bit_quant_storage: the same bytes under another dtype
            array = array.view(np.uint8)
        if array.size != size or array.dtype != dtype:
            raise ValueError(
                f"{full}: {array.size} × {array.dtype}; a weight of shape {shape} needs {size} × {np.dtype(dtype)}."
            )
        return array

    if not np.array_equal(part("quant_map", 16, np.float32), np.asarray(levels, np.float32)):
        raise ValueError(f"{name}.quant_map: not the levels of {kind}.")
    packed = part("", outputs * inputs // 2, np.uint8)
    number = math.ceil(outputs * inputs / block)
    absmax = part("absmax", number, np.uint8 if double else np.float32)
    # bitsandbytes packs neighboring codes into a byte; here a byte holds one code of each half of a block.
    codes = np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)
    codes = np.pad(codes, (0, number * block - codes.size)).reshape(number, 2, block // 2)
    codes = (codes[:, 0] << 4) | codes[:, 1]
    blocked: tuple[int, ...]
    if inputs % block:  # blocks cross rows, and the last one may be incomplete
        codes, blocked, sizes = codes.reshape(-1), (-1, -2), (outputs, inputs)
    else:
        codes, blocked, sizes = codes.reshape(outputs, inputs // 2).T, (-2,), (inputs,)
        absmax = absmax.reshape(outputs, -1).T
    scales: Any = jnp.asarray(absmax)
    if double:
        if state["nested_blocksize"] != SECOND_BLOCK or not np.array_equal(
            part("nested_quant_map", 256, np.float32), codebooks.dynamic_map()
        ):
            raise ValueError(
                f"{name}: scales in blocks of {state['nested_blocksize']} or with an unsupported codebook."
            )
        scales = Scales(
            codes=scales,
            second=jnp.asarray(part("nested_absmax", math.ceil(number / SECOND_BLOCK), np.float32)),
            offset=jnp.asarray(state["nested_offset"], jnp.float32),
        )
    return Quantized(
        codes=jnp.asarray(codes),
        scales=scales,
        format=recipe(block, double),
        blocked=blocked,
        sizes=sizes,
        dtype=np.dtype(dtype),
    )


__getattr__ = module_getattr(__name__, four_bit_tensors="bitsandbytes_tensors")
