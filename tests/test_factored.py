"""How factors meet the arrays of a product."""

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from lora_jax.adapters.factored import narrow_dtype


def test_narrowed_gives_the_bits_of_a_cast():
    bits = jnp.concatenate(
        [
            jax.random.bits(jax.random.key(0), (20_000,), jnp.uint32),
            jnp.arange(0, 2**23, 997, dtype=jnp.uint32),  # subnormal numbers
            jnp.arange(0x7F7F0000, 0x7F800001, 13, dtype=jnp.uint32),  # up to infinity
        ]
    )
    values = jax.lax.bitcast_convert_type(bits, jnp.float32)
    values = values[~jnp.isnan(values)]
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        np.testing.assert_array_equal(narrow_dtype(values, dtype), values.astype(dtype))
    assert jnp.isnan(narrow_dtype(jnp.full(3, jnp.nan), jnp.bfloat16)).all()


def test_factors_of_a_scan_are_rounded_in_the_loop_for_the_dtype_of_its_products():
    base = {"w": jnp.ones((2, 8, 8), jnp.bfloat16)}
    fn = lambda base, x: jax.lax.scan(lambda x, w: (x @ w, None), x, base["w"])[0]  # noqa: E731
    x = jnp.ones((4, 8), jnp.bfloat16)
    for dtype, times in ((jnp.float32, 2), (jnp.bfloat16, 0)):
        delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, dtype=dtype)}, fn, x)
        assert str(jax.make_jaxpr(lora.adapt(fn))(base, delta, x)).count("reduce_precision[") == times
