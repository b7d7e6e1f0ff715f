"""init() and prepare(): matching, axis roles, initial values, and every refusal."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora


def fn(base, x):
    h = jnp.tanh(x @ base["layers"]["0"]["kernel"] + base["layers"]["0"]["bias"][None, None])
    return h @ base["layers"]["1"]["kernel"]


BASE = {
    "layers": {
        "0": {"kernel": jnp.ones((4, 8)), "bias": jnp.zeros(8)},
        "1": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)},
    }
}
X = jnp.ones((2, 3, 4))


def init(spec, base=BASE, function=fn, *args):
    return lora.init(jax.random.key(0), base, spec, function, *(args or (X,)))


def test_first_match_wins_and_none_freezes():
    delta = init({r"layers/0/kernel": lora.LoRA(1), r"layers/1": None, r"layers/0/bias": lora.Full()})
    assert list(delta) == ["layers/0/bias", "layers/0/kernel"]
    delta = init({r"0/kernel": lora.LoRA(1), r"kernel": lora.LoRA(3)})
    assert [node.rank for node in delta.values()] == [1, 3]


def test_ranks_and_scales_follow_the_patterns():
    options = {"alpha": 6, "scaling": "alpha/sqrt(r)"}
    delta = init({r"layers/1/kernel": lora.LoRA(4, **options), r"kernel": lora.LoRA(1, **options)})
    assert {path: (node.rank, float(node.scale)) for path, node in delta.items() if path.endswith("kernel")} == {
        "layers/0/kernel": (1, 6.0),
        "layers/1/kernel": (4, 3.0),
    }


def test_a_number_in_a_pattern_is_that_of_its_position():
    experts = {"layers": {str(i): {"experts": {str(1 - i): {"kernel": jnp.ones((4, 4))}}} for i in range(2)}}
    delta = lora.init(jax.random.key(0), experts, {r"^layers/1/": lora.LoRA(1, axes=("in", "out"))})
    assert list(delta) == ["layers/1/experts/0/kernel"]


def test_a_pattern_without_match_names_the_nearest():
    with pytest.raises(ValueError, match=r"'layers/0/kernal' matches no path.*'layers/0/kernel'"):
        init({"layers/0/kernal": lora.LoRA(1)})


def test_a_shadowed_pattern_names_what_shadows_it():
    with pytest.raises(ValueError, match=r"'0/kernel' is fully shadowed.*'kernel'"):
        init({"kernel": lora.LoRA(1), "0/kernel": lora.LoRA(2)})


def test_bad_specs():
    with pytest.raises(ValueError, match="not a regular expression"):
        init({"(": lora.LoRA(1)})
    with pytest.raises(TypeError, match=r"write LoRA\(…\)"):
        init({"kernel": lora.LoRA})
    with pytest.raises(TypeError, match="dict from path patterns"):
        init([lora.LoRA(1)])


def test_a_bias_has_no_axes():
    with pytest.raises(ValueError, match=r"'layers/0/bias': the function contracts no axis.*\(8,\).*add.*Full\(\)"):
        init({"bias": lora.LoRA(1)})


@pytest.mark.parametrize(
    ("pattern", "suggestion"),
    [("layers/0", "layers/0/kernel"), ("layers/(0|1)", "layers/(0|1)/kernel"), ("0", "0/kernel")],
)
def test_a_pattern_that_matches_a_bias_too(pattern, suggestion):
    with pytest.raises(ValueError, match=re.escape(f"to adapt that alone, write {suggestion!r}")):
        init({pattern: lora.LoRA(1)})
    assert set(init({suggestion: lora.LoRA(1)})) <= {"layers/0/kernel", "layers/1/kernel"}
    with pytest.raises(ValueError, match=r"'layers/0/bias': .*needs 1. The pattern 'layers/0' also matches"):
        lora.init(jax.random.key(0), BASE, {"layers/0": lora.LoRA(1, axes=("in", "out"))})


def test_an_unused_weight():
    with pytest.raises(ValueError, match=r"'layers/1/bias': the function never uses"):
        init({"1/bias": lora.Full()})


def test_rank_above_the_weights():
    with pytest.raises(ValueError, match=r"'layers/0/kernel': LoRA\(rank=5\).*\(4, 8\).*rank 4"):
        init({"0/kernel": lora.LoRA(5)})


def test_without_a_function_recipes_give_axes():
    with pytest.raises(ValueError, match="needs axis roles"):
        lora.init(jax.random.key(0), BASE, {"kernel": lora.LoRA(1)})
    delta = lora.init(jax.random.key(0), BASE, {"kernel": lora.LoRA(1, axes=("in", "out")), "bias": lora.Full()})
    assert len(delta) == 4


def test_wrong_axes():
    with pytest.raises(ValueError, match=r"3 roles.*\(4, 8\) needs 2"):
        init({"0/kernel": lora.LoRA(1, axes=("in", "in", "out"))})
    with pytest.raises(ValueError, match="got the role 'inn', expected one of"):
        init({"0/kernel": lora.LoRA(1, axes=("inn", "out"))})
    with pytest.raises(ValueError, match="no 'out' axis"):
        init({"0/kernel": lora.LoRA(1, axes=("in", "in"))})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "positive integer"),
        ({"rank": 1.5}, "positive integer"),
        ({"rank": True}, "positive integer"),
        ({"rank": 1, "scaling": "alpha"}, "'alpha/r', 'alpha/sqrt"),
        ({"rank": 1, "dropout": 1.0}, "below 1"),
        ({"rank": 1, "init": "xavier"}, "'kaiming_uniform'"),
        ({"rank": 1, "dtype": jnp.int32}, "expected a floating-point dtype"),
        ({"rank": 1, "blocks": (False, False)}, "no block"),
    ],
)
def test_recipes_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        lora.LoRA(**options)


def test_a_rank_from_numpy():
    assert init({"0/kernel": lora.LoRA(np.int64(2))})["layers/0/kernel"].a.shape == (2, 4)


def test_blocks_that_do_not_divide():
    with pytest.raises(ValueError, match=r"3 equal parts.*\(8,\)"):
        init({"0/kernel": lora.LoRA(1, blocks=3)})


def test_of_two_uses_that_need_other_roles_the_first_decides():
    def two(base, x):
        return jnp.einsum("td,dhk->thk", x, base["w"]).sum() + jnp.einsum("th,dhk->tdk", x, base["w"]).sum()

    base, x = {"w": jnp.ones((4, 4, 2))}, jnp.ones((3, 4))
    for axes, factored in (None, [True, False]), (("in", "out", "batch"), [True, True]):
        delta = init({"w": lora.LoRA(1, axes=axes)}, base, two, x)
        assert delta["w"].axes == (axes or ("in", "out", "out"))
        delta = jax.tree.map(lambda leaf: leaf + 0.3, delta)
        out = lora.adapt(two)(base, delta, x)
        chex.assert_trees_all_close(out, two(lora.merge(base, delta), x), rtol=1e-5)
        assert [use.factored for use in lora.explain(two, base, delta, x)["w"]] == factored


def test_declared_batch_axes_give_each_expert_its_factors():
    def dispatch(base, x):
        return jnp.einsum("btd,edf->btef", x, base["w"])

    base = {"w": jnp.ones((2, 4, 6))}
    shared = init({"w": lora.LoRA(1)}, base, dispatch)["w"]
    assert (shared.a.shape, shared.b.shape) == ((1, 4), (1, 2, 6))
    separate = init({"w": lora.LoRA(1, axes=("batch", "in", "out"))}, base, dispatch)["w"]
    assert (separate.a.shape, separate.b.shape) == ((2, 1, 4), (2, 1, 6))
    moved = {
        "w": jax.tree.map(lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape), separate)
    }
    out = lora.adapt(dispatch)(base, moved, X)
    chex.assert_trees_all_close(out, dispatch(lora.merge(base, moved), X), rtol=1e-5)
    assert lora.explain(dispatch, base, moved, X).factored


def test_scanned_norms_and_biases_are_no_lookups():
    def scanned(base, x):
        return jax.lax.scan(lambda c, p: (jnp.tanh(c @ p["w"] + p["b"][None, None]), None), x, base)[0]

    base = {"w": jnp.ones((3, 4, 4)), "b": jnp.zeros((3, 4))}
    with pytest.raises(ValueError, match="'b': the function contracts no axis"):
        init({".": lora.LoRA(1)}, base, scanned)


def test_keys_belong_to_paths():
    both = init({"kernel": lora.LoRA(2)})
    one = init({"1/kernel": lora.LoRA(2)})
    chex.assert_trees_all_equal(both["layers/1/kernel"], one["layers/1/kernel"])
    assert (both["layers/0/kernel"].a[:, :4] != both["layers/1/kernel"].a[:, :4]).any()


def test_prepare_refuses():
    with pytest.raises(ValueError, match="at least one batch"):
        lora.prepare(jax.random.key(0), BASE, {"0/kernel": lora.LoRA(1)}, fn, [])
    with pytest.raises(ValueError, match="reads gradients"):
        lora.prepare(jax.random.key(0), BASE, {"0/kernel": lora.LoRA(1)}, fn, [(X,)], loss=lambda y: y)


def test_rows_refuse():
    with pytest.raises(ValueError, match="distinct"):
        lora.Rows([1, 1])
    table = {"t": jnp.ones((5, 3))}
    look_up = lambda base, ids: base["t"][ids]  # noqa: E731
    with pytest.raises(ValueError, match="row 7; the table has 5"):
        init({"t": lora.Rows([7])}, table, look_up, jnp.asarray([0]))


def test_boxes_add_no_path_segment():
    class Partitioned(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            return nn.Dense(6, kernel_init=kernel)(x)

    variables = Partitioned().init(jax.random.key(0), X)
    apply = lambda base, x: Partitioned().apply(base, x)  # noqa: E731
    delta = init({"kernel": lora.LoRA(1)}, variables, apply)
    assert list(delta) == ["params/Dense_0/kernel"]
    merged = lora.merge(variables, delta)
    assert jax.tree.structure(merged) == jax.tree.structure(variables)

    state = nnx.state(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    assert list(lora.init(jax.random.key(0), state, {"kernel": lora.LoRA(1, axes=("in", "out"))})) == ["kernel"]


def test_paths_that_print_alike_are_refused():
    twins = {"a": {"b": jnp.ones((2, 2))}, "a/b": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="same path: 'a/b'"):
        lora.init(jax.random.key(0), twins, {"b": lora.Full()})


def test_shapes_suffice():
    shapes = jax.eval_shape(lambda: BASE)
    delta = lora.init(jax.random.key(0), shapes, {"kernel": lora.LoRA(2)}, fn, jax.ShapeDtypeStruct(X.shape, X.dtype))
    chex.assert_trees_all_equal(delta, init({"kernel": lora.LoRA(2)}))


@pytest.mark.parametrize("init, reads", [("pissa", "reads the weight"), ("corda", "the function must run")])
def test_shapes_do_not_suffice_where_values_are_read(init, reads):
    shapes = jax.eval_shape(lambda: BASE)
    with pytest.raises(ValueError, match=rf"'layers/0/\w+': .*{reads}.*the base has.* shape"):
        lora.prepare(jax.random.key(0), shapes, {"0/kernel": lora.LoRA(2, init=init)}, fn, [X])


def test_full_keeps_what_float32_cannot_hold():
    base = {"c": jnp.asarray([1 + 2j], jnp.complex64), "h": jnp.ones(2, jnp.bfloat16)}
    delta = lora.init(jax.random.key(0), base, {".": lora.Full()})
    assert {path: node.value.dtype.name for path, node in delta.items()} == {"c": "complex64", "h": "float32"}
    with pytest.raises(ValueError, match=r"'h'.*its shape only"):
        lora.init(jax.random.key(0), jax.eval_shape(lambda: base), {"h": lora.Full()})
