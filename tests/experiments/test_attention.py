"""Attention's kernels: the TPU's (interpreted) against XLA's, and what each refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.models import attention
from experiments.models.attention import attend
from experiments.models.options import Shards

LENGTH, WIDTH = 256, 8
CASES = {
    "all": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 50},
    "segments": {"causal": True, "segments": True},
    "padding": {"segments": True, "scale": 0.5},
}


def inputs(getkey, length=LENGTH, heads=4, groups=2, dtype=jnp.float32, width=WIDTH):
    return [jax.random.normal(getkey(), (2, length, n, width), dtype) for n in (heads, groups, groups)]


@pytest.mark.parametrize("case", CASES)
def test_the_flash_kernel_agrees(getkey, monkeypatch, case):
    make = functools.partial(attention.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha", make)
    how = dict(CASES[case])
    if how.pop("segments", False):
        how["segments_BL"] = jnp.arange(LENGTH)[None] // jnp.array([[100], [200]])
    qkv = inputs(getkey)

    def both(q, k, v):
        def loss(kernel, *qkv):
            return jnp.sum(jnp.sin(attend(*qkv, **how, kernel=kernel, platform="tpu")))

        return [jax.value_and_grad(functools.partial(loss, kernel), argnums=(0, 1, 2))(q, k, v) for kernel in KERNELS]

    (want, want_grads), (got, got_grads) = jax.jit(both)(*qkv)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for a, b in zip(got_grads, want_grads):
        np.testing.assert_allclose(a, b, atol=1e-4)


KERNELS = ("xla", "flash")


@pytest.mark.parametrize("segments", [None, jnp.arange(128)[None] // jnp.array([[100]] * 4)])
def test_the_flash_kernel_on_several_devices(getkey, monkeypatch, segments):
    make = functools.partial(attention.splash.make_splash_mha, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha", make)
    q, k, v = (jax.random.normal(getkey(), (4, 128, heads, WIDTH)) for heads in (4, 2, 2))
    want = attend(q, k, v, segments_BL=segments, causal=True)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    flash = functools.partial(attend, causal=True, kernel="flash", platform="tpu", shards=Shards("data", "model"))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *qkv: flash(*qkv, segments_BL=segments))(q, k, v)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert got.sharding.shard_shape(got.shape) == (1, 128, 2, WIDTH)


def test_windows_segments_and_masks(getkey):
    q, k, v = inputs(getkey, length=6)
    index = np.arange(6)
    seen = (index[:, None] >= index) & (index[:, None] - index < 2)
    want = attend(q, k, v, jnp.asarray(seen)[None, None])
    np.testing.assert_allclose(attend(q, k, v, causal=True, window=2), want, atol=1e-6)
    segments = jnp.array([[0, 0, 1, 1, 1, 1], [3, 3, 3, 3, 0, 0]])
    whole = attend(q, k, v, segments_BL=segments, causal=True)
    np.testing.assert_allclose(whole[:1, 2:], attend(*(x[:1, 2:] for x in (q, k, v)), causal=True), atol=1e-6)
    mask = jnp.ones((2, 1, 6, 6), bool).at[:, :, :, 5].set(False)
    both = attend(q, k, v, mask, segments_BL=segments)
    np.testing.assert_allclose(both[1, :4], attend(q, k, v, segments_BL=segments)[1, :4], atol=1e-6)
    np.testing.assert_allclose(
        both[0, 2:], attend(*(x[:, 2:5] if x is not q else x[:, 2:] for x in (q, k, v)))[0], atol=1e-6
    )


@pytest.mark.parametrize(
    ("kernel", "platform", "shape", "message"),
    [
        ("flash", None, {}, r"'flash' runs on tpu, this is cpu; .*set platform='tpu'"),
        ("cudnn", None, {}, "'cudnn' runs on gpu, this is cpu"),
        ("flash", "tpu", {"length": 100}, "a multiple of 128, got 100 queries and 100 keys"),
        ("flash", "tpu", {"dtype": jnp.float16}, "bfloat16 or float32, got float16"),
        ("cudnn", "gpu", {}, "bfloat16 or float16, got float32"),
        ("cudnn", "gpu", {"width": 12, "dtype": jnp.bfloat16}, "a multiple of 8, got 12"),
        ("flash", "tpu", {"heads": 3}, "got 3 heads and 2 groups"),
        ("fast", None, {}, "attention='fast'; the kernels are 'xla', 'cudnn', 'flash'"),
    ],
)
def test_what_a_kernel_does_not_serve(getkey, kernel, platform, shape, message):
    with pytest.raises(ValueError, match=message):
        attend(*inputs(getkey, **shape), kernel=kernel, platform=platform)


def test_masks_are_not_for_flash_and_windows_are_causal(getkey):
    qkv = inputs(getkey)
    with pytest.raises(ValueError, match="segments, no mask"):
        attend(*qkv, jnp.ones((1, 1, 1, LENGTH), bool), kernel="flash", platform="tpu")
    with pytest.raises(ValueError, match="window=3 requires causal=True"):
        attend(*qkv, window=3)


def test_cudnn_is_given_what_it_takes(getkey, monkeypatch):
    options = {}

    def record(q, *rest, mask, **how):
        options.update(how, mask=mask)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    qkv = inputs(getkey, dtype=jnp.bfloat16)
    padding = jnp.ones((2, 1, 1, LENGTH), bool)
    attend(*qkv, padding, causal=True, window=7, kernel="cudnn", platform="gpu")
    assert options["mask"].shape == (2, 1, LENGTH, LENGTH)  # it broadcasts over heads, not over queries
    assert options["implementation"] == "cudnn" and options["local_window_size"] == (6, 0) and options["is_causal"]
