"""Adapters written by PEFT: the same outputs and merged weights here, and the same files when saved again.

`fixtures/peft/make_fixtures.py` says what the fixtures hold and how they were made.
"""

import functools

import jax
import numpy as np
import pytest

import lora_jax as lora
from tests.peft import cases
from tests.peft.cases import CASES, read, read_config
from tests.peft.meaning import meaning

HELD = {name: case for name, case in CASES.items() if not case.refused}
RUN = {name: case for name, case in HELD.items() if case.fn}
FACTORED = {"LoRA", "DoRA", "Rows"}


def over(chosen):
    return pytest.mark.parametrize("name", chosen)


@functools.cache
def loaded(name):
    case = CASES[name]
    base = case.base
    return base, lora.peft.load(case.adapter, base, case.names)


@functools.cache
def outputs(name):
    """Of the base, of the adapted function and of the merged weights, from one compiled function."""
    case = CASES[name]

    @jax.jit
    def run(base, delta, merged, inputs):
        both = case.fn(base, *inputs), lora.adapt(case.fn)(base, delta, *inputs)
        return both if merged is None else (*both, case.fn(merged, *inputs))

    base, delta = loaded(name)
    return run(base, delta, lora.merge(base, delta) if case.merges else None, case.inputs)


def close(case):
    bound = 2e-2 if case.fixture == "bf16_base" else 1e-5
    return {"rtol": bound, "atol": bound}


def numbers(array):
    return np.asarray(array, np.float32)


@over(RUN)
def test_outputs(name):
    case = CASES[name]
    base, adapted, *merged = outputs(name)
    np.testing.assert_allclose(numbers(base), numbers(case.io["base"]), **close(case))
    np.testing.assert_allclose(numbers(adapted), numbers(case.io["adapted"]), **close(case))
    for output in merged:
        np.testing.assert_allclose(numbers(output), numbers(case.io.get("merged", case.io["adapted"])), **close(case))


@over(RUN)
def test_factored_where_the_kind_allows(name):
    case = CASES[name]
    base, delta = loaded(name)
    uses = lora.explain(case.fn, base, delta, *case.inputs)
    merged = [f"{path}: {use}" for path, of in uses.items() for use in of if not use.factored]
    assert not [line for line in merged if delta[line.partition(":")[0]].kind in FACTORED]


@over({name: case for name, case in HELD.items() if not case.merges})
def test_a_bias_on_b_of_a_layer_without_one_is_not_merged(name):
    base, delta = loaded(name)
    path = next(path for path, node in delta.items() if getattr(node, "bias", None) is not None)
    with pytest.raises(ValueError, match=rf"^'{path}'.*no merged weight holds"):
        lora.merge(base, delta)
    with pytest.raises(ValueError, match=rf"^'{path}'.*no merged weight holds"):
        lora.unmerge(base, delta, base)


@over({name: case for name, case in HELD.items() if case.merges})
def test_merged_tensors(name):
    case = CASES[name]
    base, delta = loaded(name)
    expected = case.merged_tensors
    merged = case.torch(lora.merge(base, delta))
    if expected is None:
        assert case.fn, "neither outputs nor merged tensors are compared"
        return
    for tensor, before in case.base_tensors.items():
        if tensor not in expected and "stacked_initial" not in name and "train" not in name:
            np.testing.assert_array_equal(merged[tensor], before, tensor)
            continue
        # bfloat16: one place either way, where sums in another order round to the other side.
        bound = 2**-7 if before.dtype != np.float32 else 1e-6
        wanted = expected.get(tensor, before)
        np.testing.assert_allclose(numbers(merged[tensor]), numbers(wanted), rtol=bound, atol=bound, err_msg=tensor)


@over(HELD)
def test_saved_again(name, tmp_path):
    case = CASES[name]
    _, delta = loaded(name)
    lora.peft.save(tmp_path / "out", delta, case.names)
    before, after = (read(directory / "adapter_model.safetensors") for directory in (case.adapter, tmp_path / "out"))
    assert {*after} | {*case.dropped} == {*before}
    for tensor, array in after.items():
        assert (array.dtype, array.shape) == (before[tensor].dtype, before[tensor].shape), tensor
        assert array.tobytes() == before[tensor].tobytes(), tensor
    tied = [name for binding in case.bindings.values() for name in binding.tied]
    of = functools.partial(meaning, base_tensors=[*case.base_tensors], tied=tied)
    assert of(read_config(tmp_path / "out")) == of(read_config(case.adapter))


@over({name: case for name, case in CASES.items() if case.refused})
def test_refused_by_name(name):
    case = CASES[name]
    with pytest.raises(ValueError, match=case.refused):
        lora.peft.load(case.adapter, case.base, case.names)


def test_an_adapter_of_the_bare_model(tmp_path):
    """Names that begin with the prefix, and an adapter whose names do not."""
    case = CASES["bert"]
    (tmp_path / "adapter").mkdir()
    tensors = read(case.adapter / "adapter_model.safetensors")
    shorter = {key.replace(".bert.", "."): value for key, value in tensors.items() if "classifier" not in key}
    cases.write_adapter(tmp_path / "adapter", shorter, read_config(case.adapter) | {"modules_to_save": None})
    names = lora.peft.Names(case.weights, prefix="bert.")
    delta = lora.peft.load(tmp_path / "adapter", case.base, names)
    _, whole = loaded("bert")
    assert delta.keys() == {path for path in whole if "classifier" not in path}
    for path in delta:
        np.testing.assert_array_equal(delta[path].b, whole[path].b)


def test_a_nested_base_gives_the_same_delta():
    base, delta = loaded("heads")
    nested = {}
    for path, leaf in base.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, nested)[last] = leaf
    again = lora.peft.load(CASES["heads"].adapter, nested, CASES["heads"].names)
    assert again.keys() == delta.keys()
    jax.tree.map(np.testing.assert_array_equal, again, delta)


def test_the_parameter_of_a_module_is_the_module(tmp_path):
    case = CASES["parameter_of_a_linear"]
    config = read_config(case.adapter)
    modules = [name.removesuffix(".weight") for name in config["target_parameters"]]
    tensors = read(case.adapter / "adapter_model.safetensors")
    cases.write_adapter(tmp_path, tensors, config | {"target_parameters": None, "target_modules": modules})
    by_module = lora.peft.load(tmp_path, case.base, case.names)
    assert by_module.keys() == loaded("parameter_of_a_linear")[1].keys()
    jax.tree.map(np.testing.assert_array_equal, by_module, loaded("parameter_of_a_linear")[1])


def test_every_fixture_is_used():
    stored = {directory.name for directory in cases.FIXTURES.iterdir() if (directory / "adapter").is_dir()}
    assert stored == {case.fixture for case in CASES.values()}
