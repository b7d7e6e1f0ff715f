"""Ragged products inside shard_map that checks along which mesh axes values vary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora


@pytest.mark.parametrize("recipe", [lora.LoRA(2), lora.DoRA(2)], ids=["LoRA", "DoRA"])
def test_ragged_products_inside_shard_map(getkey, recipe):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    base = {"up": jax.random.normal(getkey(), (3, 8, 6)), "down": jax.random.normal(getkey(), (3, 6, 8))}
    x, group = jax.random.normal(getkey(), (16, 8)), jax.random.randint(getkey(), (16,), 0, 3)

    def rows(x, group, up, down):
        order = jnp.argsort(group)
        sizes = jnp.sum(jax.nn.one_hot(group, 3, dtype=jnp.int32), axis=0)
        y = jax.lax.ragged_dot(jnp.tanh(jax.lax.ragged_dot(x[order], up, sizes)), down, sizes)
        return y[jnp.argsort(order)]

    def whole(base, x, group):
        return rows(x, group, base["up"], base["down"])

    def divided(base, x, group):
        local = lambda *arrays: jax.lax.psum(rows(*arrays), "tensor")  # noqa: E731
        specs = (jax.P("data"), jax.P("data"), jax.P(None, None, "tensor"), jax.P(None, "tensor"))
        mapped = jax.shard_map(local, in_specs=specs, out_specs=jax.P("data"))
        return mapped(x, group, base["up"], base["down"])

    delta = lora.init(getkey(), base, {"": recipe}, whole, x, group)
    train, frozen = lora.partition(jax.tree.map(lambda leaf: leaf + 0.1, delta))

    def learn(fn):
        loss = lambda train: jnp.sum(lora.adapt(fn)(base, lora.join(train, frozen), x, group) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(train)

    with jax.set_mesh(mesh):
        result = learn(divided)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), result, learn(whole))
