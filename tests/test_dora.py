"""DoRA and Offset: what the contract suite does not say of them."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.peft import LINEAR, Names, Weight


def moved(delta, amount=0.3):
    train, frozen = lora.partition(delta)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return lora.join(
        treedef.unflatten(x + amount * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys)), frozen
    )


def by_hand(weight, node, axes, norm_over="in"):
    """m · V / ‖V‖ with the product formed: the paper's formula."""
    other_role = "out" if norm_over == "in" else "in"
    letters = dict(zip(range(weight.ndim), "abcdef"))
    of = {r: "".join(letters[i] for i, x in enumerate(axes) if x == r) for r in ("batch", "in", "out")}
    delta = jnp.einsum(
        f"{of['batch']}r{of['in']},{of['batch']}r{of['out']}->{''.join(letters[i] for i in range(weight.ndim))}",
        node.a,
        node.b,
        precision="highest",
    )
    v = weight + node.scale * delta
    summed = tuple(i for i, role in enumerate(axes) if role == norm_over)
    norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=summed, keepdims=True))
    shape = [1 if role == norm_over else n for n, role in zip(weight.shape, axes)]
    order = [i for r in ("batch", other_role) for i, x in enumerate(axes) if x == r]
    magnitude = node.magnitude.reshape([weight.shape[i] for i in order])
    back = sorted(range(len(order)), key=lambda i: order[i])
    return magnitude.transpose(back).reshape(shape) * v / norm


CASES = {
    "in out": ((6, 5), ("in", "out")),
    "out in": ((5, 6), ("out", "in")),
    "heads": ((6, 2, 3), ("in", "out", "out")),
    "layers": ((3, 6, 5), ("batch", "in", "out")),
    "experts last": ((6, 5, 3), ("in", "out", "batch")),
    "convolution": ((3, 2, 4, 5), ("in", "in", "in", "out")),
}


@pytest.mark.parametrize("norm_over", ["in", "out"])
@pytest.mark.parametrize("shape, axes", CASES.values(), ids=CASES)
def test_the_merged_weight_is_the_papers(shape, axes, norm_over, lenient):
    base = {"w": jax.random.normal(jax.random.key(1), shape)}
    delta = lora.init(jax.random.key(0), base, {"w": lora.DoRA(2, alpha=3, axes=axes, norm_over=norm_over)})
    np.testing.assert_allclose(lora.merge(base, delta)["w"], base["w"], rtol=1e-6)
    delta = moved(delta)
    expected = by_hand(base["w"], delta["w"], axes, norm_over)
    np.testing.assert_allclose(lora.merge(base, delta)["w"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm_gradient", [False, True])
def test_the_gradient_through_the_norm_is_an_option(norm_gradient):
    base = {"w": jax.random.normal(jax.random.key(1), (6, 5))}
    x = jax.random.normal(jax.random.key(2), (4, 6))
    fn = lambda base, x: jnp.sum(jnp.sin(x @ base["w"]))  # noqa: E731
    delta = moved(lora.init(jax.random.key(0), base, {"w": lora.DoRA(2, alpha=3, norm_gradient=norm_gradient)}, fn, x))
    adapted = lora.adapt(fn)

    def by_norm(a):
        v = base["w"] + delta["w"].scale * jnp.matmul(a.T, delta["w"].b, precision="highest")
        norm = jnp.sqrt(jnp.sum(jnp.square(v), axis=0))
        norm = norm if norm_gradient else jax.lax.stop_gradient(norm)
        return fn({"w": delta["w"].magnitude[None] * v / norm[None]}, x)

    def ours(a):
        return adapted(base, {"w": dataclasses.replace(delta["w"], a=a)}, x)

    np.testing.assert_allclose(jax.grad(ours)(delta["w"].a), jax.grad(by_norm)(delta["w"].a), rtol=1e-4, atol=1e-5)


def test_nothing_as_large_as_the_weight_is_formed():
    base, x = {"w": jnp.ones((64, 96))}, jnp.ones((2, 64))
    fn = lambda base, x: x @ base["w"]  # noqa: E731
    delta = lora.init(jax.random.key(0), base, {"w": lora.DoRA(2)}, fn, x)
    text = str(jax.make_jaxpr(lora.adapt(fn))(base, delta, x))
    assert "f32[2,64]" in text
    assert not re.search(r"f32\[(64,96|96,64)\] = dot_general", text)


def test_a_column_of_zeros_stays_one():
    base = {"w": jnp.zeros((4, 3))}
    delta = lora.init(jax.random.key(0), base, {"w": lora.DoRA(2, axes=("in", "out"))})
    np.testing.assert_array_equal(lora.merge(base, delta)["w"], 0)


def test_dora_needs_values():
    with pytest.raises(ValueError, match="norms"):
        base = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
        lora.init(jax.random.key(0), base, {"w": lora.DoRA(2, axes=("in", "out"))})


def test_pissa_and_dora_leave_the_first_output_alone():
    base = {"w": jax.random.normal(jax.random.key(1), (6, 5))}
    x = jax.random.normal(jax.random.key(2), (4, 6))
    fn = lambda base, x: x @ base["w"]  # noqa: E731
    moved_base, delta = lora.prepare(jax.random.key(0), base, {"w": lora.DoRA(2, init="pissa")}, fn, [(x,)])
    np.testing.assert_allclose(lora.adapt(fn)(moved_base, delta, x), fn(base, x), rtol=1e-4, atol=1e-5)


# Offset.


def test_an_offset_is_a_bias_on_the_second_factor(lenient):
    base = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    fn = lambda base, x: x @ base["w"] + base["b"]  # noqa: E731
    x = jnp.ones((1, 3))
    spec = {"w": lora.LoRA(1, alpha=2.0), "b": lora.Offset(2.0)}
    delta = moved(lora.init(jax.random.key(0), base, spec, fn, x))
    a, b, o = delta["w"].a, delta["w"].b, delta["b"].value
    expected = x @ base["w"] + base["b"] + 2.0 * ((x @ a.T) @ b + o)
    np.testing.assert_allclose(lora.adapt(fn)(base, delta, x), expected, rtol=1e-6)
    np.testing.assert_array_equal(lora.unmerge(lora.merge(base, delta), delta, base)["b"], base["b"])
    assert [use.factored for use in lora.explain(fn, base, delta, x)["b"]] == [False]


def test_an_offset_along_layers_has_a_scale_a_layer(tmp_path):
    names = Names(
        (Weight("{layer}/w", "layers.{layer}.fc.weight", LINEAR), Weight("{layer}/b", "layers.{layer}.fc.bias"))
    )
    base = {"w": jnp.ones((2, 3, 4)), "b": jnp.zeros((2, 4))}
    axes = ("batch", "in", "out")
    delta = moved(lora.init(jax.random.key(0), base, {"w": lora.LoRA(1, alpha=3.0, axes=axes), "b": lora.Offset(3.0)}))
    lora.peft.save(tmp_path / "out", delta, names)
    again = lora.peft.load(tmp_path / "out", base, names)
    jax.tree.map(np.testing.assert_array_equal, again, delta)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounded:
    """A quantized leaf."""

    codes: jax.Array

    def dequantize(self):
        return self.codes.astype(jnp.float32) / 3


def test_magnitudes_over_a_quantized_leaf_are_those_of_what_it_stands_for():
    base, x = {"w": jax.random.normal(jax.random.key(1), (6, 5))}, jnp.ones((2, 6))
    fn = lambda base, x: x @ base["w"]  # noqa: E731
    init = lora.initializers.LoftQ(lambda w: Rounded(jnp.round(w * 3).astype(jnp.int8)))
    moved_base, delta = lora.prepare(jax.random.key(0), base, {"w": lora.DoRA(2, init=init)}, fn, [(x,)])
    node = delta["w"]
    whole = moved_base["w"].dequantize() + node.a.T @ node.b * node.scale
    np.testing.assert_allclose(node.magnitude, jnp.linalg.norm(whole, axis=0), rtol=1e-5)
