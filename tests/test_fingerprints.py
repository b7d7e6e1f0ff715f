"""Adapters of a base that `prepare` changed: another base is refused, the changed one is not, in any precision."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax as lora
from lora_jax import merging
from lora_jax.adapters import fingerprints
from lora_jax.adapters.fingerprints import WrongBaseWarning
from lora_jax.initializers import EVA, LoftQ
from lora_jax.peft import LINEAR, Names, Weight

KEY = jax.random.key(0)
W = {"w": jax.random.normal(KEY, (64, 48))}
X = jax.random.normal(jax.random.key(1), (4, 64))
MESSAGE = r"'w'.*base that lora_jax\.prepare.*(the one before|another one).*to_plain_lora"


def fn(base, x):
    return x @ base["w"].astype(jnp.float32)


def prepare(init="pissa", base=W, recipe=lora.LoRA, **options):
    loss = {"loss": lambda base, x: jnp.sum(fn(base, x) ** 2)} if init == "lora_ga" else {}
    return lora.prepare(KEY, base, {"w": recipe(4, 4, init=init, **options)}, fn, [(X,)], **loss)


MOVING = ["pissa", "olora", "corda", "lora_ga", LoftQ(lora.Int4(axes=("in", "out"), block=16))]


@pytest.mark.parametrize("recipe", [lora.LoRA, lora.DoRA, lora.LoRAFA])
@pytest.mark.parametrize("init", MOVING, ids=str)
def test_each_initializer_that_changes_the_base(init, recipe):
    base, delta = prepare(init, recipe=recipe)
    right = lora.merge(base, delta)["w"]
    chex.assert_trees_all_close(lora.adapt(fn)(base, delta, X), X @ right, rtol=1e-4, atol=1e-4)
    for wrong in (W, {"w": jax.random.normal(jax.random.key(2), (64, 48))}):
        with pytest.raises(ValueError, match=MESSAGE):
            lora.merge(wrong, delta)
        with pytest.warns(WrongBaseWarning, match=MESSAGE):
            lora.adapt(fn)(wrong, delta, X)


@pytest.mark.parametrize("init", ["kaiming_uniform", "orthogonal", EVA()], ids=str)
def test_initializers_that_leave_the_base(init):
    _, delta = prepare(init)
    assert delta["w"].fingerprint is None
    lora.merge({"w": W["w"] + 1}, delta)
    assert len(jax.tree.leaves(delta)) == 4


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_the_base_in_another_precision(init):
    base, delta = prepare(init)
    for dtype in (jnp.bfloat16, jnp.float16):
        lora.merge({"w": base["w"].astype(dtype)}, delta)
        with pytest.raises(ValueError, match=MESSAGE):
            lora.merge({"w": W["w"].astype(dtype)}, delta)
    rules = {"w": lora.NF4(axes=("in", "out"), block=16)}
    lora.merge(lora.quantize(base, rules), delta)
    with pytest.raises(ValueError, match=MESSAGE):
        lora.merge(lora.quantize(W, rules), delta)


def test_every_place_that_has_the_base(tmp_path):
    base, delta = prepare()
    names = Names((Weight("w", "w.weight", LINEAR),))
    adapted, tx = lora.adapt(fn), optax.sgd(0.1)
    merged = lora.merge(base, delta)
    lora.save(tmp_path / "a", delta)
    stacked, (train, frozen) = lora.stack([delta, {}]), lora.partition(delta)
    uses = [
        lambda base: lora.load(tmp_path / "a", base),
        lambda base: lora.merge(base, delta),
        lambda base: merging.merge_quantized(base, delta),
        lambda base: lora.unmerge(merged, delta, base),
        lambda base: lora.switch_task(merged, delta, delta, base),
        lambda base: lora.TrainState.create(base, delta, tx, KEY),
        lambda base: lora.TrainStates.create(base, [delta], tx, [KEY]),
    ]
    for use in uses:
        use(base)
        with pytest.raises(ValueError, match=MESSAGE):
            use(W)
    eager = [
        lambda base: adapted(base, delta, X),
        lambda base: jax.grad(lambda train: adapted(base, lora.join(train, frozen), X).sum())(train),
        lambda base: lora.route(adapted)(base, stacked, [0, 1], X[:2]),
    ]
    for use in eager:
        use(base)
        with pytest.warns(WrongBaseWarning, match=MESSAGE):
            use(W)
    with pytest.raises(ValueError, match=MESSAGE):
        lora.unmerge({"w": W["w"][::-1]}, delta)  # what is left is no base of this adapter
    chex.assert_trees_all_close(lora.unmerge(merged, delta), base, atol=1e-5)
    with pytest.raises(ValueError, match=r"'w' \(1 such paths\).*to_plain_lora\(delta, start\)"):
        lora.peft.save(tmp_path / "p", delta, names)
    assert not (tmp_path / "p").exists()


def test_plain_adapters_ask_for_nothing(tmp_path):
    base, start = prepare()
    delta = jax.tree.map(lambda leaf: leaf * 1.1, start)
    plain = lora.to_plain_lora(delta, start)
    assert plain["w"].fingerprint is None
    chex.assert_trees_all_close(lora.merge(W, plain), lora.merge(base, delta), atol=1e-4)
    lora.peft.save(tmp_path, plain, Names((Weight("w", "w.weight", LINEAR),)))


def test_nothing_is_checked_under_tracing():
    _, delta = prepare()
    adapted = lora.adapt(fn)
    jax.jit(adapted)(W, delta, X)
    jax.vmap(adapted, in_axes=(None, 0, None))(W, jax.tree.map(lambda leaf: leaf[None], delta), X)
    jax.jit(lora.merge)(W, delta)
    jax.eval_shape(lora.merge, W, delta)


def test_moved_under_jit():
    base, delta = jax.jit(lambda w: prepare(base={"w": w}))(W["w"])
    lora.merge(base, delta)
    with pytest.raises(ValueError, match=MESSAGE):
        lora.merge(W, delta)


def test_what_is_done_to_all_leaves():
    base, start = prepare()
    other = prepare(base={"w": jax.random.normal(jax.random.key(3), (64, 48))})[1]
    for change in (lambda leaf: leaf * 1.1, lambda leaf: leaf - 0.01 * leaf, lambda leaf: leaf.astype(jnp.bfloat16)):
        delta = jax.tree.map(change, start)
        lora.merge(base, delta)
        with pytest.raises(ValueError, match=MESSAGE):
            lora.merge(W, delta)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, start, jax.tree.map(lambda leaf: leaf * 3, start))
    lora.merge(base, mean)
    with pytest.raises(ValueError, match=MESSAGE):  # of two bases, neither of which it fits
        lora.merge(base, jax.tree.map(lambda x, y: (x + y) / 2, start, other))
    # Changed beyond recognition, it asks for nothing.
    lora.merge(W, jax.tree.map(lambda leaf: leaf + 1, start))


def test_frozen_and_kept_by_training():
    base, start = prepare()
    tx, adapted = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), lora.adapt(fn)
    assert lora.trainable_mask(start)["w"].fingerprint is False
    state = lora.TrainState.create(base, start, tx, KEY)
    step = lora.train_step(lambda base, delta, x, key: jnp.mean(adapted(base, delta, x) ** 2), tx)
    state, _ = step(state, X)
    chex.assert_trees_all_equal(state.delta["w"].fingerprint, start["w"].fingerprint)


def test_save_and_load(tmp_path):
    base, delta = prepare()
    lora.save(tmp_path / "a", delta, base=base)
    chex.assert_trees_all_equal(lora.load(tmp_path / "a", base), delta)
    plain = lora.init(KEY, W, {"w": lora.LoRA(2)}, fn, X)
    lora.save(tmp_path / "b", plain)
    assert lora.load(tmp_path / "b")["w"].fingerprint is None


def test_stacks():
    base, delta = prepare()
    plain = lora.init(KEY, base, {"w": lora.LoRA(2)}, fn, X)
    for members in ([delta, plain], [plain, delta], [{}, delta, plain]):
        stacked = lora.stack(members)
        unstacked = lora.unstack(stacked, members)
        assert jax.tree.structure(unstacked) == jax.tree.structure(members)
        chex.assert_trees_all_equal(unstacked, members)
        routed = lora.route(lora.adapt(fn))
        routed(base, stacked, [0, 1], X[:2])
        with pytest.warns(WrongBaseWarning, match=MESSAGE):
            routed(W, stacked, [0, 1], X[:2])
    swapped = lora.swap(lora.stack([delta, {}]), 1, plain)
    assert (swapped["w"].fingerprint[1] == 0).all()
    with pytest.raises(ValueError, match=r"'w': the adapter needs the base.*when the stack is created"):
        lora.swap(lora.stack([plain], rank=4), 0, delta)
    vmapped = jax.vmap(lora.adapt(fn), in_axes=(None, 0, None))(base, lora.stack([delta, delta]), X)
    chex.assert_trees_all_close(vmapped[0], lora.adapt(fn)(base, delta, X), atol=1e-4)


def test_algebra():
    base, delta = prepare()
    plain = lora.init(KEY, base, {"w": lora.LoRA(4)}, fn, X)
    for changed in (lora.truncate(delta, 2), merging.scale(delta, 0.5), lora.combine([delta, delta], [0.5, 0.5])):
        lora.merge(base, changed)
        with pytest.raises(ValueError, match=MESSAGE):
            lora.merge(W, changed)
    for pair in ([delta, plain], [plain, delta], [delta, prepare(base={"w": W["w"] + 1})[1]]):
        with pytest.raises(ValueError, match="'w': the adapters to combine need different bases"):
            lora.combine(pair, [1.0, 1.0])


def test_shardings():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    _, delta = prepare()
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    shardings = lora.delta_shardings({"w": sharding}, delta)["w"]
    assert shardings.a.spec == PartitionSpec(None, "data") and shardings.fingerprint.spec == PartitionSpec(None)
    jax.device_put(delta, {"w": shardings})


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [("data", None), (None, "data"), (("data", "model"), None), ("data", "model")])
def test_sketches_of_sharded_weights(kind, spec):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2, devices=jax.devices()[:4])
    for weight in (W["w"], lora.quantize(W, {"w": lora.NF4(axes=("in", "out"), block=16)})["w"]):
        whole = fingerprints.sketch(weight)
        if weight is W["w"]:
            weight = jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*spec)))
        np.testing.assert_allclose(fingerprints.sketch(weight), whole, atol=1e-4)


def test_a_sketch_is_of_all_elements_in_order():
    weight = jax.random.normal(KEY, (3, 5, 7))
    norms = []
    for dtype in (jnp.float32, jnp.bfloat16, jnp.complex64):
        flipped, again = (fingerprints.sketch(x.astype(dtype)) for x in (weight[:, ::-1], weight))
        assert jnp.linalg.norm(flipped - again) > 0.5 * jnp.linalg.norm(again)
        norms.append(float(jnp.linalg.norm(again)))
    # The norm of sketches with independent signs estimates the weight's.
    many = [jnp.linalg.norm(fingerprints.sketch(jax.random.normal(jax.random.key(i), (40, 40)))) for i in range(20)]
    assert abs(np.mean(many) / 40 - 1) < 0.1


def test_the_cache_forgets():
    base, delta = prepare()
    lora.adapt(fn)(base, delta, X)
    have = len(fingerprints._SKETCHES._entries), len(fingerprints._MATCHES._entries)
    del base
    assert len(fingerprints._SKETCHES._entries) < have[0] and len(fingerprints._MATCHES._entries) < have[1]


def test_numpy_weights_are_read_each_time():
    base, delta = prepare()
    weight = np.array(base["w"])
    lora.merge({"w": weight}, delta)
    weight[:] = W["w"]
    with pytest.raises(ValueError, match=MESSAGE):
        lora.merge({"w": weight}, delta)


def test_unmerge_with_a_base_that_was_not_merged():
    delta = lora.init(KEY, W, {"w": lora.LoRA(4, init="gaussian")}, fn, X)
    delta = jax.tree.map(lambda leaf: leaf + 0.5, delta)
    merged = lora.merge(W, delta)
    for params in (merged, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), merged)):
        restored = lora.unmerge(params, delta, W)["w"]
        assert (restored == W["w"].astype(restored.dtype)).all()
    other = {"w": W["w"] + 0.1}
    for params, base in ((merged, other), (W, W), (other, W)):
        with pytest.raises(ValueError, match="'w': the parameters are not those of base with this delta merged"):
            lora.unmerge(params, delta, base)
        with pytest.raises(ValueError, match="not those of base"):
            lora.switch_task(params, delta, delta, base)
    small = lora.quantize(W, {"w": lora.NF4(axes=("in", "out"))})
    lora.unmerge(merging.merge_quantized(small, delta)[0], delta, small)
