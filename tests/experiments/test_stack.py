"""Layers unrolled and scanned, with and without rematerialization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lora_jax as lora
from experiments.models import stack
from experiments.models.options import Options
from tests.contract.jaxpr_checks import equations


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x, entry, shift):
        y = jnp.tanh(self.linear(x)) + shift
        return y, None if entry is None else entry + jnp.sum(y)


def layers_of(options):
    """The same weights in either form."""
    unrolled = stack.build(Layer, 3, Options(), nnx.Rngs(0))
    if not options.scan:
        return unrolled
    scanned = stack.build(Layer, 3, options, nnx.Rngs(0))
    states = [nnx.state(layer) for layer in unrolled]
    nnx.update(scanned, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
    return scanned


@pytest.mark.parametrize("remat", ["none", "dots", "full", "offload"])
@pytest.mark.parametrize("scan", [False, True])
def test_all_forms_compute_the_same(scan, remat):
    options = Options(scan=scan, remat=remat)
    x, shift = jnp.ones((2, 4)), jnp.float32(0.5)

    def run(layers, x, options):
        states = stack.stack_states([jnp.float32(number) for number in range(3)], options)
        return stack.run(layers, x, shift, states=states, options=options)

    y, entries = nnx.jit(run, static_argnums=2)(layers_of(options), x, options)
    want, want_kept = run(layers_of(Options()), x, Options())
    np.testing.assert_allclose(y, want, rtol=1e-6)
    np.testing.assert_allclose(jnp.stack(entries) if not scan else entries, jnp.stack(want_kept), rtol=1e-6)
    y, entries = stack.run(layers_of(options), x, shift, options=options)
    np.testing.assert_allclose(y, want, rtol=1e-6)
    assert jax.tree.leaves(entries) == []


def test_layers_start_with_weights_of_their_own():
    kernel = stack.build(Layer, 3, Options(scan=True), nnx.Rngs(0)).linear.kernel[...]
    assert kernel.shape == (3, 4, 4) and np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_remat_computes_again():
    graph, state = nnx.split(layers_of(Options()))

    def products(remat):
        def loss(x):
            layers = nnx.merge(graph, state, copy=True)
            return jnp.sum(stack.run(layers, x, jnp.float32(0), options=Options(remat=remat))[0])

        traced = jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 4)))
        return sum(equation.primitive.name == "dot_general" for equation in equations(traced))

    assert (
        products("offload") == products("full") > products("none") == products("dots") == 6
    )  # a forward and a backward one a layer


class Model(nnx.Module):
    def __init__(self, options):
        self.layers, self.options = layers_of(options), options

    def __call__(self, x):
        return stack.run(self.layers, x, jnp.float32(0), options=self.options)[0]


@pytest.mark.parametrize("scan", [False, True])
def test_inputs_wait_in_host_memory(scan, getkey):
    x = jax.random.normal(getkey(), (2, 4))

    def gradient(remat):
        apply, base = lora.nnx.functional(Model(Options(scan=scan, remat=remat)))
        delta = lora.init(jax.random.key(0), base, {"kernel": lora.LoRA(2, init="gaussian")}, apply, x)
        train, frozen = lora.partition(delta)
        adapted = lora.adapt(apply)
        return jax.grad(lambda train: jnp.sum(adapted(base, lora.join(train, frozen), x) ** 2)), train

    function, train = gradient("offload")
    moved = [
        (equation.params["devices"][0].name, equation.outvars[0].aval.shape)
        for equation in equations(jax.make_jaxpr(function)(train))
        if equation.primitive.name == "device_put"
    ]
    count = 1 if scan else 3
    assert sorted(moved) == [("Device", (2, 4))] * count + [("Host", (2, 4))] * count
    got, want = jax.jit(function)(train), jax.jit(gradient("full")[0])(train)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(want))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)
