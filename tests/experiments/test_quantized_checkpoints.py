"""Checkpoints that transformers and bitsandbytes quantized; `fixtures/transformers/make_quantized.py` made them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import families
from experiments.models.options import Options
from lora_jax.quantization import from_bitsandbytes

QUANTIZED = pathlib.Path(__file__).parents[1] / "fixtures" / "transformers" / "quantized"
CASES = sorted(path.name for path in QUANTIZED.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_bitsandbytes(case):
    leaves = from_bitsandbytes(load_file(QUANTIZED / case / "model.safetensors"))
    expected = load_file(QUANTIZED / case / "expected.safetensors")
    exact = "nf4" in case  # the product with 1/127 may round the other way
    for name in expected.keys() - {"x", "logits"}:
        assert leaves[name].shape == expected[name].shape[::-1]
        compare = np.testing.assert_array_equal if exact else np.testing.assert_allclose
        compare(np.asarray(leaves[name]).T, expected[name], **({} if exact else {"rtol": 3e-7}), err_msg=name)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan", [False, True])
def test_logits(case, scan):
    directory = QUANTIZED / case
    family = families.get_family(json.loads((directory / "config.json").read_text()))
    model = family.load(directory, Options(scan=scan))
    fn, base = lora.nnx.functional(model)
    expected = load_file(directory / "expected.safetensors")
    x = jnp.asarray(expected["x"], jnp.int32)
    delta = lora.init(jax.random.key(0), base, {"layers/.*kernel": lora.LoRA(2)}, fn, x)
    np.testing.assert_allclose(jax.jit(lora.adapt(fn))(base, delta, x), expected["logits"], rtol=1e-4, atol=2e-5)


def test_fp8_is_named(tmp_path):
    source = pathlib.Path(__file__).parents[1] / "fixtures" / "transformers" / "models" / "llama"
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UserError, match=r"up_proj\.weight is stored in FP8 .*is not supported.*bfloat16"):
        families.LLAMA.load(tmp_path)
