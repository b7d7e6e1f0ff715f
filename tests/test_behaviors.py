"""Forty behaviors that users of PEFT rely on, stated without torch; the numbers are those of its own suites' list.

Most are tested at length where they belong; here each has its name and its shortest statement.
"""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

import lora_jax as lora
from lora_jax import merging
from lora_jax.adapters.lowrank import LoRAAdapter
from tests.peft.cases import CASES, read_config, write_adapter
from tests.peft.cases import read as read_tensors

IO = ("in", "out")


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


BASE = {
    "layers": {
        str(i): {"q": {"kernel": normal(i, 6, 6)}, "experts": {str(i): {"kernel": normal(9 + i, 6, 6)}}}
        for i in range(3)
    },
    "embed": normal(20, 8, 6),
    "head": {"kernel": normal(21, 6, 4)},
}
IDS = jnp.asarray([[0, 3, 5], [6, 6, 1]])
KERNELS = r"q/kernel|experts/\d+/kernel"
SPEC = {KERNELS: lora.LoRA(2, alpha=3, axes=IO)}


def fn(base, ids):
    x = jnp.take(base["embed"], ids, axis=0)
    for layer in base["layers"].values():
        x = x + jnp.tanh(x @ layer["q"]["kernel"])
        for expert in layer["experts"].values():
            x = x + jnp.tanh(x @ expert["kernel"])
    return x @ base["head"]["kernel"]


plain = jax.jit(fn)
adapted = jax.jit(lora.adapt(fn))
merge = jax.jit(lora.merge)


def made(seed, spec=SPEC, base=BASE):
    """A delta that changes something: every trained leaf has moved."""
    delta = lora.init(jax.random.key(seed), base, spec)
    train, frozen = lora.partition(delta)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
    moved = [x + 0.2 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys)]
    return lora.join(treedef.unflatten(moved), frozen)


def close(one, other, tolerance=2e-5):
    chex.assert_trees_all_close(one, other, rtol=tolerance, atol=tolerance)


def change(node):
    """ΔW."""
    return np.asarray(node.merge(jnp.zeros(node.shape())))


ONE, TWO = made(1), made(2)


def test_01_unmerged_is_merged_is_unmerged_again():
    merged = merge(BASE, ONE)
    close(adapted(BASE, ONE, IDS), plain(merged, IDS))
    close(adapted(lora.unmerge(merged, ONE), ONE, IDS), plain(merged, IDS))


def test_02_a_second_merge_is_of_the_callers_making():
    # Nothing is hidden in the parameters: merging twice adds twice, and taking out once leaves one.
    twice = merge(merge(BASE, ONE), ONE)
    close(lora.unmerge(twice, ONE), merge(BASE, ONE))


def test_03_a_merge_that_would_write_nan_is_refused():
    path, node = next(iter(ONE.items()))
    broken = ONE | {path: dataclasses.replace(node, b=node.b.at[0, 0].set(jnp.inf))}
    with pytest.raises(ValueError, match=f"{path}.*not finite"):
        lora.merge(BASE, broken)


def test_04_merging_a_named_subset_is_that_adapter_alone():
    path = next(iter(ONE))
    close(plain(merge(BASE, {path: ONE[path]}), IDS), adapted(BASE, {path: ONE[path]}, IDS))


def test_05_the_order_of_merging_does_not_matter():
    close(merge(merge(BASE, ONE), TWO), merge(merge(BASE, TWO), ONE))


def test_06_a_round_trip_restores_the_base():
    close(lora.unmerge(merge(BASE, ONE), ONE), BASE)
    chex.assert_trees_all_equal(lora.unmerge(merge(BASE, ONE), ONE, BASE), BASE)


def test_07_a_disabled_adapter_is_the_base():
    np.testing.assert_array_equal(adapted(BASE, {}, IDS), plain(BASE, IDS))


def test_08_and_so_it_is_merged():
    chex.assert_trees_all_equal(lora.merge(BASE, {}), BASE)


def test_09_training_moves_adapter_leaves_only_and_every_b_under_remat(lenient):
    delta, tx = lora.init(jax.random.key(0), BASE, SPEC), optax.sgd(0.1)
    forward = jax.checkpoint(lora.adapt(fn))
    state = lora.TrainState.create(BASE, delta, tx, jax.random.key(1))
    step = lora.train_step(lambda base, delta, ids, key: jnp.mean(forward(base, delta, ids) ** 2), tx)
    after, _ = step(state, IDS)
    assert after.base is BASE
    for path, node in after.delta.items():
        assert np.asarray(node.b).any(), path
        np.testing.assert_array_equal(node.scale, delta[path].scale)


def test_10_a_saved_adapter_gives_identical_outputs(tmp_path):
    lora.save(tmp_path / "adapter", ONE)
    np.testing.assert_array_equal(adapted(BASE, lora.load(tmp_path / "adapter", BASE), IDS), adapted(BASE, ONE, IDS))


def test_11_trained_leaves_reload_equal(tmp_path):
    delta = made(1, SPEC | {"head": lora.Full(), "embed": lora.Rows((1, 3), axes=IO)})
    lora.save(tmp_path / "adapter", delta)
    chex.assert_trees_all_equal(lora.load(tmp_path / "adapter"), delta)


def test_12_several_adapters_add():
    both = lora.combine([ONE, TWO], [1.0, 1.0])
    close(merge(BASE, both), merge(merge(BASE, ONE), TWO))
    close(adapted(BASE, both, IDS), plain(merge(BASE, both), IDS))


def test_13_odd_names_are_safe(tmp_path):
    base = {"a.b/c d": {"ключ:é$[0]": normal(1, 4, 3)}}
    delta = made(1, {r"\$\[0\]$": lora.LoRA(1, axes=IO)}, base)
    lora.save(tmp_path / "ein Adapter.v1:β", delta, base=base)
    chex.assert_trees_all_equal(lora.load(tmp_path / "ein Adapter.v1:β", base), delta)


def test_14_removing_an_adapter_leaves_nothing():
    path = next(iter(ONE))
    rest = {name: node for name, node in ONE.items() if name != path}
    layer = merge(BASE, rest)["layers"]["0"]
    assert path == "layers/0/experts/0/kernel"
    np.testing.assert_array_equal(layer["experts"]["0"]["kernel"], BASE["layers"]["0"]["experts"]["0"]["kernel"])


def test_15_a_name_that_two_leaves_print_is_an_error():
    with pytest.raises(ValueError, match="a/b"):
        lora.init(jax.random.key(0), {"a": {"b": normal(0, 2, 2)}, "a/b": normal(0, 2, 2)}, {"b": lora.Full()})


def test_16_ranks_by_pattern_have_the_right_shapes():
    delta = lora.init(jax.random.key(0), BASE, {r"layers/1/q": lora.LoRA(4, axes=IO), KERNELS: lora.LoRA(1, axes=IO)})
    assert {path: node.rank for path, node in delta.items() if "/q/" in path} == {
        "layers/0/q/kernel": 1,
        "layers/1/q/kernel": 4,
        "layers/2/q/kernel": 1,
    }


def test_17_cat_takes_uneven_ranks():
    wide = made(3, {KERNELS: lora.LoRA(4, alpha=2, axes=IO)})
    combined = lora.combine([ONE, wide], [0.5, 2.0])
    for path, node in combined.items():
        assert node.rank == 6
        close(change(node), 0.5 * change(ONE[path]) + 2 * change(wide[path]))


def test_18_weights_may_be_negative():
    for path, node in lora.combine([ONE, TWO], [1.0, -1.0]).items():
        close(change(node), change(ONE[path]) - change(TWO[path]))


def test_19_scales_may_differ():
    other = made(4, {KERNELS: lora.LoRA(2, alpha=16, scaling="alpha/sqrt(r)", axes=IO)})
    for path, node in lora.combine([ONE, other], [1.0, 1.0]).items():
        close(change(node), change(ONE[path]) + change(other[path]))


@pytest.mark.parametrize("method", merging.METHODS)
def test_20_every_method_keeps_an_adapter_alone_as_it_is(method):
    path = next(iter(ONE))
    alone = lora.combine([{path: ONE[path]}], [1.0], method=method, density=1.0, key=jax.random.key(0))
    close(change(alone[path]), change(ONE[path]))


def test_21_in_a_mixed_batch_each_row_is_its_own_adapters():
    routed = lora.route(lora.adapt(fn))(BASE, lora.stack([ONE, TWO]), [1, 0], IDS)
    close(routed[0], adapted(BASE, TWO, IDS[:1])[0])
    close(routed[1], adapted(BASE, ONE, IDS[1:])[0])


def test_22_adapters_of_one_batch_may_be_on_different_layers():
    first = {path: node for path, node in ONE.items() if path.startswith("layers/0")}
    last = {path: node for path, node in ONE.items() if path.startswith("layers/2")}
    routed = lora.route(lora.adapt(fn))(BASE, lora.stack([{}, first, last]), [1, 2], IDS)
    close(routed[0], adapted(BASE, first, IDS[:1])[0])
    close(routed[1], adapted(BASE, last, IDS[1:])[0])


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("ids", [[0], [0, 1, 1]], ids=len)
def test_23_as_many_ids_as_examples(ids, grouped):
    routed = lora.route(lora.adapt(fn), grouped=grouped)
    with pytest.raises(ValueError, match=f"adapter_ids has {len(ids)} entries; the batch has 2 examples"):
        routed(BASE, lora.stack([ONE, TWO]), ids, IDS)


def test_24_an_embedding_with_lora_is_saved(tmp_path):
    names = lora.peft.Names((lora.peft.Weight("embed", "embed.weight", module="embedding"),))
    delta = made(1, {"embed": lora.LoRA(2, alpha=3, axes=("lookup", "out"))})
    lora.peft.save(tmp_path / "adapter", delta, names, base=BASE)
    loaded = lora.peft.load(tmp_path / "adapter", BASE, names)
    close(change(loaded["embed"]), change(delta["embed"]))


def test_25_initial_distributions():
    node = lora.LoRA(16).create(jax.random.key(0), jnp.zeros((100, 50)), IO)
    assert stats.kstest(np.ravel(node.a), stats.uniform(-0.1, 0.2).cdf).pvalue > 1e-3
    assert not np.asarray(node.b).any()


def test_26_embeddings_start_from_a_zero_and_b_normal():
    node = lora.LoRA(16).create(jax.random.key(0), jnp.zeros((100, 50)), ("lookup", "out"))
    assert stats.kstest(np.ravel(node.b), stats.norm.cdf).pvalue > 1e-3
    assert not np.asarray(node.a).any()


def test_27_rank_stabilised_scales_follow_the_patterns():
    spec = {
        r"layers/1/q": lora.LoRA(4, alpha=6, scaling="alpha/sqrt(r)", axes=IO),
        r"q/kernel": lora.LoRA(1, alpha=6, scaling="alpha/sqrt(r)", axes=IO),
    }
    scales = {path: float(node.scale) for path, node in lora.init(jax.random.key(0), BASE, spec).items()}
    assert scales == {"layers/0/q/kernel": 6.0, "layers/1/q/kernel": 3.0, "layers/2/q/kernel": 6.0}


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_28_inits_that_move_the_base_leave_the_output_unchanged(init):
    spec = {"head": lora.LoRA(2, alpha=3, init=init)}
    moved, delta = lora.prepare(jax.random.key(0), BASE, spec, fn, [(IDS,)])
    close(lora.adapt(fn)(moved, delta, IDS), plain(BASE, IDS))
    assert (np.asarray(moved["head"]["kernel"]) != np.asarray(BASE["head"]["kernel"])).any()


def test_29_a_trained_pissa_is_a_plain_lora_of_twice_the_rank():
    moved, start = lora.prepare(jax.random.key(0), BASE, {"head": lora.LoRA(1, init="pissa")}, fn, [(IDS,)])
    trained = {path: dataclasses.replace(node, a=node.a + 0.1, b=node.b - 0.2) for path, node in start.items()}
    exported = lora.to_plain_lora(trained, start)
    assert exported["head/kernel"].rank == 2
    close(plain(merge(BASE, exported), IDS), plain(merge(moved, trained), IDS))


def test_30_dora_is_the_identity_at_the_start():
    delta = lora.init(jax.random.key(0), BASE, {KERNELS: lora.DoRA(2, axes=IO)})
    # but for how XLA fuses a compiled program
    np.testing.assert_allclose(lora.adapt(fn)(BASE, delta, IDS), fn(BASE, IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axes", [IO, ("out", "in")], ids="-".join)
def test_31_unmerging_dora_inverts_the_merge(axes):
    base = {"w": normal(1, 6, 4)}
    delta = made(1, {"w": lora.DoRA(2, axes=axes)}, base)
    np.testing.assert_array_equal(lora.unmerge(lora.merge(base, delta), delta, base)["w"], base["w"])


def test_32_kernels_either_way_round_have_the_same_adapter():
    node = made(1, {"w": lora.LoRA(2, axes=IO)}, {"w": normal(0, 4, 3)})["w"]
    turned = LoRAAdapter(node.a, node.b, node.scale, node.dropout, ("out", "in"), node.blocks)
    np.testing.assert_allclose(change(turned), change(node).T, rtol=1e-6)


def test_33_a_bias_on_b():
    base, spec = {"w": normal(1, 4, 3), "bias": normal(2, 3)}, {"w": lora.LoRA(2, alpha=4), "bias": lora.Offset(2.0)}
    layer = lambda base, x: x @ base["w"] + base["bias"][None]  # noqa: E731
    x = normal(3, 2, 4)
    delta = lora.init(jax.random.key(0), base, spec, layer, x)
    delta["bias"] = dataclasses.replace(delta["bias"], value=normal(4, 3))
    close(lora.adapt(layer)(base, delta, x), layer(base, x) + 2.0 * delta["bias"].value[None])


def test_34_scales_are_set_and_multiplied():
    doubled = merging.scale(ONE, 2.0)
    for path in ONE:
        close(change(doubled[path]), 2 * change(ONE[path]))
    chex.assert_trees_all_equal(merging.scale(doubled, 0.5), ONE)


def test_35_adapters_of_other_ranks_and_alphas_swap_without_a_retrace():
    traces = []

    def counted(base, ids):
        traces.append(1)
        return fn(base, ids)

    run = jax.jit(lora.adapt(counted))
    other = made(5, {KERNELS: lora.LoRA(1, alpha=7, axes=IO)})
    for delta in (ONE, {path: node.pad_rank(2) for path, node in other.items()}):
        close(run(BASE, delta, IDS), plain(merge(BASE, delta), IDS))
    # One program, or none: JAX drops the oldest when all functions of a process together have too many.
    assert len(traces) == 1 and run._cache_size() <= 1


def test_36_the_first_pattern_wins():
    delta = lora.init(jax.random.key(0), BASE, {"layers/0/q": None, "q/kernel": lora.LoRA(1, axes=IO)})
    assert list(delta) == ["layers/1/q/kernel", "layers/2/q/kernel"]


def test_37_a_filter_by_layer_is_not_one_by_expert():
    # layers/0 has an expert 0, layers/1 an expert 1: the number after `layers/` is the layer's.
    delta = lora.init(jax.random.key(0), BASE, {r"^layers/1/": lora.LoRA(1, axes=IO)})
    assert list(delta) == ["layers/1/experts/1/kernel", "layers/1/q/kernel"]


def test_38_all_linear_layers_without_the_head():
    delta = lora.init(jax.random.key(0), BASE, {"head/": None, "kernel$": lora.LoRA(1, axes=IO)})
    assert len(delta) == 6 and "head/kernel" not in delta and "embed" not in delta


def test_39_the_parameter_of_a_module_is_the_module(tmp_path):
    case = CASES["parameter_of_a_linear"]
    config = read_config(case.adapter)
    modules = [name.removesuffix(".weight") for name in config["target_parameters"]]
    tensors = read_tensors(case.adapter / "adapter_model.safetensors")
    write_adapter(tmp_path, tensors, config | {"target_parameters": None, "target_modules": modules})
    by_module = lora.peft.load(tmp_path, case.base, case.names)
    chex.assert_trees_all_equal(by_module, lora.peft.load(case.adapter, case.base, case.names))


def test_40_overlapping_rows_tied_weights_and_colliding_keys(tmp_path):
    with pytest.raises(ValueError, match=r"ids are distinct"):
        lora.Rows((1, 3, 1))
    # One leaf that is looked up and projected with: one adapter serves both uses.
    tied = lambda base, ids: jnp.take(base["embed"], ids, axis=0) @ base["embed"].T  # noqa: E731
    delta = lora.init(jax.random.key(0), BASE, {"embed": lora.LoRA(2, init="gaussian")}, tied, IDS)
    delta["embed"] = dataclasses.replace(delta["embed"], b=normal(5, *delta["embed"].b.shape))
    close(lora.adapt(tied)(BASE, delta, IDS), tied(lora.merge(BASE, delta), IDS))
    # A key that is there twice under different names is refused.
    case = CASES["linear"]
    shutil.copytree(case.adapter, tmp_path / "adapter")
    tensors = read_tensors(case.adapter / "adapter_model.safetensors")
    key = next(name for name in tensors if name.endswith("lora_A.weight"))
    twice = tensors | {key.replace("lora_A", "base_layer.lora_A"): tensors[key]}
    write_adapter(tmp_path / "adapter", twice, json.loads((case.adapter / "adapter_config.json").read_text()))
    with pytest.raises(ValueError, match="lora_A"):
        lora.peft.load(tmp_path / "adapter", case.base, case.names)
