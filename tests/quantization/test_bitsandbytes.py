"""Four-bit checkpoints of bitsandbytes."""

import json
import pathlib

import ml_dtypes  # noqa: F401  bfloat16 for safetensors
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from lora_jax.quantization import from_bitsandbytes

FILE = pathlib.Path(__file__).parents[1] / "fixtures/quantization/four_bits.safetensors"
NAME = "layers.0.up.weight"


@pytest.fixture
def tensors():
    return load_file(FILE)


@pytest.mark.parametrize("layer", ["layers.0.up", "layers.1.up", "layers.0.down"])
def test_weights_are_those_of_bitsandbytes_bit_for_bit(tensors, layer):
    leaf = from_bitsandbytes(tensors)[f"{layer}.weight"]
    np.testing.assert_array_equal(np.asarray(leaf).T, tensors[f"expected.{layer}"])


def test_leaves_are_those_that_quantize_makes(tensors):
    read = from_bitsandbytes(tensors)
    assert read[NAME].format == lora.NF4() and read["layers.0.down.weight"].format == lora.FP4(double=False)
    assert read["norm.weight"] is tensors["norm.weight"]
    assert set(read) == {
        name for name in tensors if name.count(".") < 4 and "quant" not in name and "absmax" not in name
    }
    again = lora.quantize({"w": read[NAME].dequantize()}, {"w": lora.NF4(axes=("in", "out"))})["w"]
    assert (again.shape, again.blocked, again.codes.shape) == (read[NAME].shape, (-2,), read[NAME].codes.shape)


def state(tensors, **changes):
    name = f"{NAME}.quant_state.bitsandbytes__nf4"
    old = json.loads(bytes(tensors[name]).decode())
    return {name: np.frombuffer(json.dumps(old | changes).encode(), np.uint8)}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {NAME: t[NAME][:-1]}, r"layers.0.up.weight: 1023 × uint8; a weight of shape \(16, 128\) needs 1024"),
        (lambda t: {f"{NAME}.absmax": t[f"{NAME}.absmax"][1:]}, r"absmax: 31 × uint8; .* needs 32 × uint8"),
        (lambda t: {f"{NAME}.absmax": t[f"{NAME}.absmax"].astype(np.float32)}, "absmax: 32 × float32; .* needs 32 × u"),
        (lambda t: {f"{NAME}.nested_absmax": None}, "nested_absmax: missing beside"),
        (lambda t: {f"{NAME}.quant_map": t[f"{NAME}.quant_map"][::-1]}, "quant_map: not the levels of nf4"),
        (lambda t: {f"{NAME}.nested_quant_map": t[f"{NAME}.nested_quant_map"] / 2}, "unsupported codebook"),
        (lambda t: state(t, blocksize=96), "absmax: 32 × uint8; .* needs 22 × uint8"),
        (lambda t: state(t, blocksize=63), "expected a matrix in blocks of an even size"),
        (lambda t: state(t, blocksize=32), "absmax: 32 × uint8; .* needs 64 × uint8"),
        (lambda t: state(t, quant_type="af4"), "type 'af4'; expected one of 'nf4', 'fp4'"),
        (lambda t: state(t, dtype="float3"), "not the state of a quantized weight"),
        (lambda t: {f"{NAME}.quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)}, "not the state of a quantized"),
    ],
)
def test_damage_is_told_by_name(tensors, change, message):
    tensors |= change(tensors)
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_bitsandbytes(tensors)
