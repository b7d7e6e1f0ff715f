"""Regions: functions that stay whole, under every transformation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.transform.regions import region

A, B = jax.random.normal(jax.random.key(0), (3, 4)), jax.random.normal(jax.random.key(1), (4, 5))


def product(a, b):
    return a @ jnp.sin(b)


def linear(a, b):
    return region(product, a, b, linear=1)


def nonlinear(a, b):
    return region(product, a, b)


@pytest.mark.parametrize("function", [linear, nonlinear])
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_derivatives_are_the_function_s(function, jit):
    compiled = jax.jit if jit else lambda f: f

    def checks(f):
        loss = lambda a, b: jnp.sum(jnp.cos(f(a, b)))  # noqa: E731
        yield compiled(f)(A, B)
        yield from compiled(jax.grad(loss, (0, 1)))(A, B)
        yield from compiled(lambda a, b: jax.jvp(f, (a, b), (b[:3, :4], a[:1, :1] + b)))(A, B)
        yield compiled(jax.hessian(loss))(A, B)
        yield compiled(jax.jacfwd(jax.grad(loss, 1), 0))(A, B)
        yield compiled(jax.vmap(f, (0, None)))(jnp.stack([A, 2 * A]), B)
        yield compiled(jax.vmap(f, (1, 2), 1))(jnp.stack([A, 2 * A], 1), jnp.stack([B, 2 * B], 2))
        yield compiled(jax.vmap(jax.grad(loss, 1), (None, 0)))(A, jnp.stack([B, 2 * B]))

    for ours, plain in zip(checks(function), checks(product), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=2e-4, atol=2e-5)


def test_a_linear_region_keeps_no_more_than_its_other_operands():
    _, back = jax.vjp(lambda a: linear(a, B), A)
    assert {leaf.shape for leaf in jax.tree.leaves(back)} <= {B.shape}


def test_what_does_not_depend_on_a_loop_stays_in_it_one_after_the_other():
    count, size = 6, 128
    weights = [jnp.full((size, size), i, jnp.int8) for i in range(count)]

    def held(function):
        def decode(weights, x):
            def step(_, x):
                for weight in weights:
                    x = function(x, weight)
                return x

            return jax.lax.fori_loop(0, 5, step, x)

        compiled = jax.jit(decode).lower(weights, jnp.ones((1, size))).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * size * size)

    plain = lambda x, w: x @ jnp.sin(w.astype(jnp.float32))  # noqa: E731
    assert held(plain) > 5  # XLA moves all of them out of the loop
    assert held(lambda x, w: region(plain, x, w, linear=1)) < 2


def test_on_other_platforms_it_is_a_checkpoint():
    def program(function, platform):
        gradient = jax.jit(jax.grad(lambda a, b: jnp.sum(jnp.cos(function(a, b)))))
        return gradient.trace(A, B).lower(lowering_platforms=(platform,)).as_text()

    assert "stablehlo.case" in program(linear, "cpu")
    ours, plain = program(linear, "tpu"), program(jax.checkpoint(product), "tpu")
    assert ours.count("optimization_barrier") == plain.count("optimization_barrier") > 0
    for name in ("stablehlo.case", "stablehlo.while"):
        assert name not in ours
