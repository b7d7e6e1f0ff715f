"""Modules that PEFT saves in full, ambiguous names, and factors in other dtypes: deltas are saved and loaded again."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.peft import LINEAR, Names, Weight
from tests.peft.cases import CASES, PREFIX, read, read_config, write_adapter

NAMES = Names(
    (
        Weight("fc/{layer}/kernel", "fc.{layer}.weight", LINEAR),
        Weight("fc/{layer}/bias", "fc.{layer}.bias"),
        Weight("norm/scale", "norm.weight"),
        Weight("norm/bias", "norm.bias"),
    )
)
BASE = {
    "fc": {"kernel": jnp.ones((2, 4, 4)), "bias": jnp.full((2, 4), 0.5)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)},
}
LOW_RANK = lora.LoRA(2, alpha=3, axes=("batch", "in", "out"))


def trained(spec, base=BASE):
    delta = lora.init(jax.random.key(0), base, spec)
    train, frozen = lora.partition(delta)
    return lora.join(jax.tree.map(lambda leaf: leaf + jnp.asarray(0.25, leaf.dtype), train), frozen)


@pytest.mark.parametrize("spec", [{"norm/scale": lora.Full()}, {"fc/bias": lora.Full(), "norm/bias": lora.Full()}])
def test_what_belongs_to_it_comes_from_the_base(spec, tmp_path):
    delta = trained({"fc/kernel": LOW_RANK, **spec})
    lora.peft.save(tmp_path / "out", delta, NAMES, base=BASE)
    again = lora.peft.load(tmp_path / "out", BASE, NAMES)
    assert set(delta) <= set(again)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(BASE, again), lora.merge(BASE, delta))


def test_without_the_base_a_part_of_a_module_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"norm\.bias: PEFT saves full modules.*base="):
        lora.peft.save(tmp_path / "out", trained({"fc/kernel": LOW_RANK, "norm/scale": lora.Full()}), NAMES)


def test_some_biases_of_adapted_modules(tmp_path):
    """Unrolled layers, one of whose biases is trained: PEFT has all of them or none."""
    base = {"fc": {str(i): {"kernel": jnp.ones((4, 4)), "bias": jnp.full(4, 0.5)} for i in range(2)}}
    spec = {"kernel": lora.LoRA(2, axes=("in", "out")), "fc/0/bias": lora.Full()}
    delta = trained(spec, base)
    with pytest.raises(ValueError, match=r"fc\.1\.bias"):
        lora.peft.save(tmp_path / "out", delta, NAMES)
    lora.peft.save(tmp_path / "out", delta, NAMES, base=base)
    assert read_config(tmp_path / "out")["bias"] == "lora_only"
    again = lora.peft.load(tmp_path / "out", base, NAMES)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(base, again), lora.merge(base, delta))


def test_a_saved_module_inside_of_which_a_target_lies(tmp_path):
    """PEFT gives no factors to what it saves whole."""
    case = CASES["linear"]
    tensors = read(case.adapter / "adapter_model.safetensors")
    names = Names((*case.names.weights, Weight("head/fc/kernel", "head.fc.weight", LINEAR)))
    base = {**case.base, "head/fc/kernel": jnp.ones((3, 5))}
    tensors[f"{PREFIX}head.fc.weight"] = np.full((5, 3), 2, np.float32)
    write_adapter(tmp_path, tensors, read_config(case.adapter) | {"modules_to_save": ["head"]})
    assert lora.peft.load(tmp_path, base, names)["head/fc/kernel"].kind == "Full"


# Names.

ALIKE = Names(
    tuple(
        Weight(f"{path}/kernel", f"{path.replace('/', '.')}.weight", LINEAR) for path in ("fc", "a/fc", "x/1", "y/x/1")
    )
)
ALIKE_BASE = {f"{path}/kernel": jnp.ones((4, 3)) for path in ("fc", "a/fc", "x/1", "y/x/1")}


@pytest.mark.parametrize("target", ["peft", "vllm", "gguf"])
@pytest.mark.parametrize("ranks", [(2, 2, 2), (3, 2, 1)])
def test_scales_and_ranks_of_names_that_end_alike(target, ranks, tmp_path, capsys):
    recipes = [lora.LoRA(r, alpha, axes=("in", "out")) for r, alpha in zip(ranks, (16, 2, 3))]
    delta = trained(dict(zip(("^fc/", "^a/fc/", "^x/"), recipes)), ALIKE_BASE)
    lora.peft.save(tmp_path / "out", delta, ALIKE, target=target)
    again = lora.peft.load(tmp_path / "out", ALIKE_BASE, ALIKE)
    assert again.keys() == delta.keys()
    for path in delta:
        np.testing.assert_allclose(lora.merge(ALIKE_BASE, again)[path], lora.merge(ALIKE_BASE, delta)[path], rtol=1e-6)


def test_of_rows_for_one_path_the_first_counts():
    one, two = (Weight("t", name, module="embedding") for name in ("one.weight", "two.weight"))
    assert list(Names((one, two)).find("t", (4, 2)).tensors) == ["one.weight"]


def test_names_that_a_running_model_changes(tmp_path):
    """Adapters are written with the running model's names and read with either."""
    row = Weight("{layer}/q", "encoder.{layer}.query.weight", LINEAR, in_model="layers.{layer}.q_proj.weight")
    names, base = Names((row,)), {"q": jnp.ones((2, 4, 4))}
    delta = trained({"q": LOW_RANK}, base)
    lora.peft.save(tmp_path / "out", delta, names)
    tensors = read(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.removeprefix(PREFIX).split(".lora")[0] for key in tensors} == {"layers.0.q_proj", "layers.1.q_proj"}
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path / "out", base, names), delta)
    old = {key.replace("layers", "encoder").replace("q_proj", "query"): value for key, value in tensors.items()}
    config = read_config(tmp_path / "out") | {"target_modules": ["query"]}
    write_adapter(tmp_path / "out", old, config)
    jax.tree.map(np.testing.assert_array_equal, lora.peft.load(tmp_path / "out", base, names), delta)


# DoRA on some layers; narrow factors.


def test_dora_on_some_layers_of_a_stacked_leaf(tmp_path):
    case = CASES["stacked_dora"]
    tensors = read(case.adapter / "adapter_model.safetensors")
    some = {key: value for key, value in tensors.items() if "layers.1." not in key}
    config = read_config(case.adapter) | {"layers_to_transform": [0, 2], "layers_pattern": "layers"}
    write_adapter(tmp_path, some, config)
    delta, whole = lora.peft.load(tmp_path, case.base, case.names), lora.peft.load(case.adapter, case.base, case.names)
    for path, weight in lora.merge(case.base, delta).items():
        if path in delta:
            np.testing.assert_allclose(weight[1], case.base[path][1], rtol=1e-5)
            np.testing.assert_array_equal(weight[::2], lora.merge(case.base, whole)[path][::2])
    # A magnitude that moved is written, though its factors are zeros.
    path = next(iter(delta))
    moved = {path: dataclasses.replace(delta[path], magnitude=delta[path].magnitude + 1.0)}
    lora.peft.save(tmp_path / "out", moved, case.names)
    again = lora.peft.load(tmp_path / "out", case.base, case.names)
    np.testing.assert_allclose(
        lora.merge(case.base, again)[path], lora.merge(case.base, moved)[path], rtol=1e-6, atol=1e-6
    )


def test_a_scale_is_not_rounded_to_the_factors_dtype():
    base = {"w": jnp.zeros((4, 3))}
    delta = trained({"w": lora.LoRA(3, 7, axes=("in", "out"), dtype=jnp.bfloat16)}, base)
    a, b = (np.asarray(x, np.float64) for x in (delta["w"].a, delta["w"].b))
    np.testing.assert_allclose(lora.merge(base, delta)["w"], 7 / 3 * a.T @ b, rtol=1e-6)


@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_folding_into_narrow_factors_loses_nothing(target, tmp_path, capsys):
    base = {"fc/kernel": jnp.zeros((4, 3)), "a/fc/kernel": jnp.zeros((4, 3))}
    recipes = [lora.LoRA(3, alpha, axes=("in", "out"), dtype=jnp.bfloat16) for alpha in (7, 4)]
    delta = trained(dict(zip(("^fc", "^a/"), recipes)), base)
    lora.peft.save(tmp_path / "out", delta, ALIKE, target=target)
    again = lora.peft.load(tmp_path / "out", base, ALIKE)
    for path in base:
        np.testing.assert_allclose(lora.merge(base, again)[path], lora.merge(base, delta)[path], rtol=1e-6)


# Files.


def test_other_files_of_an_adapter_directory_stay(tmp_path, monkeypatch):
    delta = trained({"fc/kernel": LOW_RANK})
    lora.peft.save(tmp_path / "out", delta, NAMES)
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "out")
    lora.peft.save(".", delta, NAMES, base_model="x")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with open("adapter_config.json") as file:  # by a relative path: the directory is the same one
        assert json.load(file)["base_model_name_or_path"] == "x"


def test_gradients_through_the_norm_of_a_column_of_zeros():
    base = {"w": jnp.zeros((4, 6)).at[:, 1:].set(1.0)}
    delta = lora.init(jax.random.key(0), base, {"w": lora.DoRA(2, 2, norm_gradient=True, axes=("in", "out"))})
    train, frozen = lora.partition(delta)
    grads = jax.grad(lambda train: jnp.sum(jnp.sin(lora.merge(base, lora.join(train, frozen))["w"])))(train)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
