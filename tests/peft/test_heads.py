"""Classification heads of several layers: RoBERTa's, which PEFT saves as one module.

`fixtures/transformers/make_adapters.py` says what the fixtures are.
"""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lora
from experiments.models import heads
from lora_jax.__main__ import main
from tests.peft.cases import PREFIX, read_config, write_adapter
from tests.peft.test_ties import FIXTURES, close, tokens

MODEL = FIXTURES / "models" / "roberta"
HEAD = {f"{PREFIX}classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")}


@pytest.fixture(scope="module")
def program():
    model = heads.load(MODEL)
    fn, base = lora.nnx.functional(model)
    return fn, base, heads.names(model.encoder.config)


def run(fn, base, delta):
    x = tokens(MODEL)
    return jax.jit(lora.adapt(fn))(base, delta, x, jnp.ones_like(x))


@pytest.mark.parametrize("case", ["roberta", "roberta_biases"])
def test_loaded_and_written_again(case, program, tmp_path):
    fn, base, names = program
    adapter = FIXTURES / "adapters" / case
    delta = lora.peft.load(adapter, base, names)
    close(run(fn, base, delta), adapter)
    lora.peft.save(tmp_path / "out", delta, names, task_type="SEQ_CLS")
    config = read_config(tmp_path / "out")
    assert config["modules_to_save"] == ["classifier"] and config["bias"] == read_config(adapter)["bias"]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    assert {name for name in before if "modules_to_save" not in name and "original_module" not in name} == after.keys()
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("case", ["roberta", "roberta_biases"])
@pytest.mark.parametrize("based", [True, False])
def test_converted(case, based, tmp_path, capsys):
    adapter = FIXTURES / "adapters" / case
    options = ["--base", str(MODEL)] if based else []
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--target", "peft", *options]) == 0
    assert read_config(tmp_path / "out")["modules_to_save"] == read_config(adapter)["modules_to_save"]
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() >= HEAD
    assert main(["diff", str(adapter), str(tmp_path / "out")]) == 0


def test_modules_of_other_names_are_not_the_same(tmp_path, capsys):
    adapter = FIXTURES / "adapters" / "roberta"
    shutil.copytree(adapter, tmp_path / "leaves")
    leaves = {"modules_to_save": ["classifier.dense", "classifier.out_proj"]}
    write_adapter(tmp_path / "leaves", load_file(adapter / "adapter_model.safetensors"), read_config(adapter) | leaves)
    assert main(["diff", str(adapter), str(tmp_path / "leaves")]) == 1
    assert "modules_to_save is ['classifier', 'score'] in " in capsys.readouterr().out


def test_a_head_that_is_not_trained_comes_from_the_base(program, tmp_path):
    fn, base, names = program
    whole = lora.peft.load(FIXTURES / "adapters" / "roberta", base, names)
    delta = {path: node for path, node in whole.items() if path.startswith("encoder/")}
    with pytest.raises(ValueError, match=r"classifier\.dense\.weight: PEFT saves full modules.*base="):
        lora.peft.save(tmp_path / "out", delta, names, task_type="SEQ_CLS")
    lora.peft.save(tmp_path / "out", delta, names, task_type="SEQ_CLS", base=base)
    stored, original = load_file(tmp_path / "out" / "adapter_model.safetensors"), load_file(MODEL / "model.safetensors")
    assert {name for name in stored if "lora" not in name} == HEAD
    for name in HEAD:
        np.testing.assert_array_equal(stored[name], original[name.removeprefix(PREFIX)])
    again = lora.peft.load(tmp_path / "out", base, names)
    np.testing.assert_allclose(run(fn, base, again), run(fn, base, delta), rtol=1e-6, atol=1e-6)
    lora.peft.save(tmp_path / "bare", delta, names)  # without a task PEFT saves no head
    assert not HEAD & load_file(tmp_path / "bare" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("case", ["roberta", "roberta_biases"])
def test_merged(case, tmp_path):
    adapter = FIXTURES / "adapters" / case
    assert main(["merge", str(MODEL), str(adapter), str(tmp_path / "out")]) == 0
    fn, base = lora.nnx.functional(heads.load(tmp_path / "out"))
    close(run(fn, base, {}), adapter)
