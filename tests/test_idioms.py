"""What models do to weights before they use them: factored where it is linear, and roles are found behind the rest."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import lora_jax as lora
from lora_jax.adapters.factored import narrow_dtype
from lora_jax.transform.rules import RULES, rule
from tests.contract.jaxpr_checks import dense_dependents
from tests.test_rules import moved, normal, with_own_jvp, with_own_vjp

D, F, C = 9, 7, lambda array: array.astype(jnp.complex64)
X = normal(1, 5, D)
BASE = {
    "w": normal(2, D, F),
    "v": normal(3, D, F),
    "u": normal(4, F, D),
    "g": 1 + 0.1 * normal(5, F),
    "h": 1 + 0.1 * normal(6, D),
    "stack": normal(7, 3, D, D) / 3,
    "square": normal(8, D, D) / 3,
    "other": normal(9, D, D) / 3,
    "k": normal(10, 3, D, F),
    "kv": normal(11, 3, D),
    "kernels": normal(12, 2, 3, D, F),
}
SIZES = {63, 81, 126, 189, 162, 243, 378}
"""Sizes of weights and of pairs of weights. No activation or factor here has such a size."""


def conv(x, kernel, **options):
    return jax.lax.conv_general_dilated(x, kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), **options)


def lstm(p, x):
    """Gates of four kernels, joined at the call."""
    gates = x @ jnp.concatenate([p["w"], p["v"], -p["w"], 2 * p["v"]], axis=1)
    i, f, g, o = jnp.split(gates, 4, axis=1)
    return jnp.tanh(i) * jnp.tanh(g) + jnp.tanh(f) * o


def scan(kernels, x):
    return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, kernels)[0]


def spectral_norm(p, x):
    """Power iteration, and a division by the largest singular value."""
    u = p["g"][None]
    for _ in range(2):
        v = u @ p["w"].T
        v = v / jnp.linalg.norm(v)
        u = v @ p["w"]
        u = u / jnp.linalg.norm(u)
    sigma = (jax.lax.stop_gradient(v) @ p["w"] @ jax.lax.stop_gradient(u).T)[0, 0]
    return x @ (p["w"] / sigma)


IN_OUT = ("in", "out")
FACTORED = {
    "times a vector per output": ("w", lambda p, x: x @ (p["w"] * p["g"][None])),
    "times a vector per input": ("w", lambda p, x: x @ (p["w"] * p["h"][:, None])),
    "times vectors per input and output": ("w", lambda p, x: x @ (p["h"][:, None] * p["w"] / p["g"][None])),
    "over a vector that is broadcast before": ("w", lambda p, x: x @ (p["w"] / jnp.broadcast_to(p["g"][None], (D, F)))),
    "masked on the out axis": ("w", lambda p, x: x @ jnp.where(p["g"][None] > 1, p["w"], 0.0)),
    "masked on the in axis": ("w", lambda p, x: x @ jnp.where(p["h"][:, None] > 1, p["w"], 0.5)),
    "selected from two weights": ("w|v", lambda p, x: x @ jnp.where(p["g"][None] > 1, p["w"], p["v"])),
    "concatenated on the out axis": ("w|v", lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1)),
    "concatenated on the in axis": ("w|v", lambda p, x: jnp.concatenate([x, x], 1) @ jnp.concatenate([p["w"], p["v"]])),
    "concatenated with an array": ("w", lambda p, x: x @ jnp.concatenate([jnp.ones((D, 2)), p["w"]], 1)),
    "concatenated after gains": ("w|v", lambda p, x: x @ jnp.concatenate([p["w"] * p["g"][None], p["v"]], 1)),
    "concatenated and transposed": ("w|u", lambda p, x: x @ jnp.concatenate([p["w"], p["u"].T], 1)),
    "concatenated and divided again": (
        "w|v",
        lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.split(jnp.concatenate([p["w"], p["v"]], 1), 2, axis=1)),
    ),
    "gates": ("w|v", lstm),
    "stacked": ("w|v", lambda p, x: jnp.einsum("td,ndf->tnf", x, jnp.stack([p["w"], p["v"]]))),
    "stacked on the last axis": ("w|v", lambda p, x: jnp.einsum("td,dfn->tnf", x, jnp.stack([p["w"], p["v"]], -1))),
    "stacked with an array": ("w", lambda p, x: jnp.einsum("td,ndf->tnf", x, jnp.stack([p["w"], jnp.ones((D, F))]))),
    "stacked and scanned": ("square|other", lambda p, x: scan(jnp.stack([p["square"], p["other"]]), x)),
    "stacked and indexed": ("w|v", lambda p, x: x @ jnp.stack([p["w"], p["v"]])[1]),
    "joined stacks, scanned": ("stack", lambda p, x: scan(jnp.concatenate([p["stack"], p["stack"]]), x)),
    "unstacked": ("stack", lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(p["stack"]))),
    "lax.map": ("stack", lambda p, x: jax.lax.map(lambda w: x @ w, p["stack"])),
    "lax.map in batches": ("stack", lambda p, x: jax.lax.map(lambda w: x @ w, p["stack"], batch_size=2)),
    "plus a constant": ("square", lambda p, x: x @ (p["square"] + jnp.eye(D))),
    "minus another leaf": ("w", lambda p, x: x @ (p["w"] - p["v"])),
    "another leaf minus it": ("w", lambda p, x: x @ (p["v"] - p["w"])),
    "plus another weight": ("w|v", lambda p, x: x @ (p["w"] + p["v"])),
    "symmetrized": ("square", lambda p, x: x @ (0.5 * (p["square"] + p["square"].T))),
    "mixed": ("w|v", lambda p, x: x @ (0.3 * p["w"] + 0.7 * p["v"])),
    "flipped": ("w", lambda p, x: x @ jnp.flip(p["w"])),
    "rolled": ("w", lambda p, x: x @ jnp.roll(p["w"], 3, 1)),
    "padded on the out axis": ("w", lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 4)))),
    "padded on the in axis": ("w", lambda p, x: jnp.pad(x, ((0, 0), (0, 2))) @ jnp.pad(p["w"], ((0, 2), (0, 0)))),
    "padded with ones": ("w", lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (1, 4)), constant_values=1)),
    "tiled": ("w", lambda p, x: x @ jnp.tile(p["w"], (1, 2))),
    "repeated on the in axis": ("w", lambda p, x: jnp.concatenate([x, 2 * x], 1) @ jnp.tile(p["w"], (2, 1))),
    "written into zeros": (
        "w|v",
        lambda p, x: x @ jnp.zeros((D, 2 * F)).at[:, :F].set(p["w"]).at[:, F:].set(p["v"]),
    ),
    "written by slices": (
        "w|v",
        lambda p, x: (
            x
            @ jax.lax.dynamic_update_slice(
                jax.lax.dynamic_update_slice(jnp.ones((D, 2 * F + 1)), p["w"], (0, 0)), p["v"], (0, F)
            )
        ),
    ),
    "written into a stack": (
        "w|v",
        lambda p, x: jnp.einsum("td,ndf->tnf", x, jnp.zeros((3, D, F)).at[1].set(p["w"]).at[0].add(p["v"])),
    ),
    "rows and columns replaced": ("w", lambda p, x: x @ p["w"].at[0].set(0.0).at[:, 2].set(1.0).at[3].add(2.0)),
    "columns permuted": ("w", lambda p, x: x @ p["w"][:, jnp.array([2, 0, 1, 3, 4, 6, 5])]),
    "columns selected": ("w", lambda p, x: x @ (jnp.take(p["w"], jnp.array([2, 0, 2]), axis=1) * p["g"][:3][None])),
    "rows permuted": ("w", lambda p, x: x @ p["w"][jnp.arange(D)[::-1]]),
    "columns permuted, transposed": ("u", lambda p, x: x @ p["u"][jnp.array([2, 0, 1, 3, 4, 6, 5])].T),
    "heads permuted": (
        "square",
        lambda p, x: jnp.einsum("td,dhk->thk", x, p["square"].reshape(D, 3, 3)[:, :, jnp.array([0, 2, 1])]),
    ),
    "put on a device": ("w", lambda p, x: x @ jax.device_put(p["w"])),
    "complex": ("w|v", lambda p, x: jnp.abs(C(x) @ (C(p["w"]) + jnp.complex64(1j) * C(p["v"])))),
    "spectral norm": ("w", spectral_norm),
    "rotated on the in axis": ("w", lambda p, x: x @ (p["other"] @ p["w"])),
    "rotated on the out axis": ("square", lambda p, x: x @ (p["square"] @ p["other"])),
    "rotated on both axes, with gains": (
        "square",
        lambda p, x: x @ (p["other"] @ (p["h"][:, None] * p["square"] * p["h"][None]) @ p["other"].T),
    ),
    "rotated and transposed": ("square", lambda p, x: x @ (p["other"] @ p["square"].T).T),
    "rotated heads": (
        "square",
        lambda p, x: jnp.einsum(
            "td,dhl->thl",
            x,
            jnp.einsum("dhk,kl->dhl", p["square"].reshape(D, 3, 3), p["h"][:3, None] * p["h"][None, :3]),
        ),
    ),
    "the first of two matrices": ("square", lambda p, x: x @ (p["square"] @ p["w"])),
    "weighted mean of experts": ("stack", lambda p, x: x @ jnp.einsum("n,ndf->df", p["h"][:3], p["stack"])),
    "weighted mean of kernels": ("kernels", lambda p, x: conv(x[None], jnp.tensordot(p["h"][:2], p["kernels"], 1))),
    "learned queries": ("w|v", lambda p, x: jax.nn.softmax((p["square"][:3] @ p["w"] + p["g"][None]) @ (x @ p["v"]).T)),
    "one learned query": (
        "w|v",
        lambda p, x: jax.nn.softmax((x @ p["v"]) @ (p["h"] @ p["w"])),
    ),
    "transposed kernel": (
        "k",
        lambda p, x: jax.lax.conv_transpose(
            x[None, :, :F], p["k"], (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), transpose_kernel=True
        ),
    ),
    "depthwise": ("kv", lambda p, x: conv(x[None], p["kv"][:, None], feature_group_count=D)),
    "kernel with an axis added": ("w", lambda p, x: conv(x[None], p["w"][None])),
    "kernel with gains": ("k", lambda p, x: conv(x[None], p["h"][None, :, None] * p["k"] * p["g"][None, None])),
    "kernel masked on in": ("k", lambda p, x: conv(x[None], jnp.where(p["h"][None, :, None] > 1, p["k"], 0.0))),
    "kernels concatenated": ("k", lambda p, x: conv(x[None], jnp.concatenate([p["k"], 2 * p["k"]], -1))),
    "vmapped convolution": ("kernels", lambda p, x: jax.vmap(conv)(jnp.stack([x[None], 2 * x[None]]), p["kernels"])),
    "convolution vmapped over kernels": ("kernels", lambda p, x: jax.vmap(conv, (None, 0))(x[None], p["kernels"])),
}
ROLES = {
    "w": IN_OUT,
    "v": IN_OUT,
    "u": ("out", "in"),
    "square": IN_OUT,
    "other": IN_OUT,
    "stack": ("batch", "in", "out"),
    "k": ("in", "in", "out"),
    "kv": IN_OUT,
    "kernels": ("batch", "in", "in", "out"),
}
OTHER_ROLES = {
    "transposed kernel": {"k": ("in", "out", "in")},
    "lax.map in batches": {"stack": ("out", "in", "out")},
    "convolution vmapped over kernels": {"kernels": ("out", "in", "in", "out")},
}


def kernel(x, w, out):
    out[...] = x[...] @ w[...]


def pallas_product(x, w):
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, w)


def pallas_experts(x, w, squeezed):
    """A grid over experts, whose axis the blocks do not have, or have with size one."""

    def kernel(x, w, out):
        out[0] = x[0] @ (w[...] if squeezed else w[0])

    block = pl.BlockSpec((None if squeezed else 1, D, D), lambda n: (n, 0, 0))
    rows = pl.BlockSpec((1, x.shape[1], D), lambda n: (n, 0, 0))
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(
        kernel, grid=(len(w),), in_specs=[rows, block], out_specs=rows, out_shape=shape, interpret=True
    )(x, w)


def pallas_loop(x, w):
    """A loop over experts inside the kernel."""

    def kernel(x, w, out):
        def step(n, _):
            out[n] = x[n] @ w[n]
            return 0

        jax.lax.fori_loop(0, 3, step, 0)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x, w)


def pallas_prefetch(x, w):
    """Blocks of rows that choose experts by an array of indices."""

    def kernel(ids, x, w, out):
        out[...] = x[...] @ w[...]

    rows = pl.BlockSpec((1, D), lambda i, ids: (i, 0))
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(x.shape[0],),
        in_specs=[rows, pl.BlockSpec((None, D, D), lambda i, ids: (ids[i], 0, 0))],
        out_specs=rows,
    )
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pl.pallas_call(kernel, grid_spec=grid, out_shape=shape, interpret=True)(jnp.zeros(len(x), jnp.int32), x, w)


def pallas_change(w):
    def kernel(w, out):
        out[...] = 2 * w[...]

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(w.shape, w.dtype), interpret=True)(w)


MERGED = {
    "tanh": ("w", lambda p, x: x @ jnp.tanh(p["w"])),
    "ternary": ("w", lambda p, x: x @ jnp.round(jnp.clip(p["w"] / jnp.abs(p["w"]).mean(), -1, 1) * 9)),
    "over its own norm": ("w", lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"]))),
    "weight norm": ("w", lambda p, x: x @ (p["w"] * (p["g"] / jnp.linalg.norm(p["w"], axis=0))[None])),
    "standardized": ("w", lambda p, x: x @ ((p["w"] - p["w"].mean(0, keepdims=True)) / p["w"].std(0, keepdims=True))),
    "normalized and concatenated": (
        "w|v",
        lambda p, x: (
            x @ jnp.concatenate([p["w"] / jnp.linalg.norm(p["w"], axis=0, keepdims=True), jnp.tanh(p["v"])], 1)
        ),
    ),
    "masked entries": ("w", lambda p, x: x @ (p["w"] * (p["v"] > 0).astype(jnp.float32))),
    "blocks on a diagonal": ("square", lambda p, x: x @ (p["square"] * jnp.kron(jnp.eye(3), jnp.ones((3, 3))))),
    "modulated by each example": (
        "w",
        lambda p, x: jax.vmap(lambda row: row @ (p["w"] * jnp.tanh(row[:F])[None]))(x),
    ),
    "masked by each example": (
        "w",
        lambda p, x: jnp.einsum("td,tdf->tf", x, p["w"][None] * (x[:, :, None] > 0).astype(jnp.float32)),
    ),
    "product of two weights": ("w|u", lambda p, x: x @ (p["w"] @ p["u"])),
    "product of two weights, by elements": ("w|v", lambda p, x: x @ (p["w"] * p["v"])),
    "a penalty before the use": (
        "w",
        lambda p, x: jnp.sum((p["w"].T @ p["w"] - jnp.eye(F)) ** 2) + x @ p["w"],
    ),
    "rotated and changed": ("w", lambda p, x: x @ jnp.tanh(p["other"] @ p["w"])),
    "mean over experts": ("stack", lambda p, x: x @ p["stack"].mean(0)),
    "complex from parts": ("w|v", lambda p, x: jnp.abs(C(x) @ jax.lax.complex(p["w"], p["v"]))),
    "an elementwise custom_jvp": ("w", lambda p, x: x @ jax.nn.relu(p["w"])),
    "an elementwise custom_vjp": ("w", lambda p, x: x @ with_own_vjp(lambda w: w)(p["w"])),
    "a product with custom_jvp": ("w", lambda p, x: with_own_jvp(lambda w: X @ w)(p["w"])),
    "returned from a branch": ("w", lambda p, x: x @ jax.lax.cond(x[0, 0] > 0, jnp.tanh, lambda w: 2 * w, p["w"])),
    "returned from a loop": (
        "stack",
        lambda p, x: jnp.einsum(
            "ntd,ndf->ntf", jnp.stack([x] * 3), jax.lax.map(lambda w: w / jnp.linalg.norm(w), p["stack"])
        ),
    ),
    "changed by a loop": (
        "square",
        lambda p, x: x @ jax.lax.fori_loop(0, 2, lambda _, w: 1.5 * w - 0.1 * w @ (w.T @ w), p["square"]),
    ),
    "changed by an unbounded loop": (
        "w",
        lambda p, x: x @ jax.lax.stop_gradient(jax.lax.while_loop(lambda w: w[0, 0] < 9, lambda w: w + 1, p["w"])),
    ),
    "written over a weight with gains": (
        "w|v",
        lambda p, x: x @ jnp.concatenate([p["w"] * p["g"][None]] * 2, 1).at[:, 3 : 3 + F].set(p["v"]),
    ),
    "every other column written": ("w", lambda p, x: x @ jnp.zeros((D, 2 * F)).at[:, ::2].set(p["w"])),
    "an entry replaced": ("w", lambda p, x: x @ p["w"].at[0, 1].set(0.0)),
    "a kernel": ("w", lambda p, x: pallas_product(x, p["w"])),
    "a kernel with squeezed blocks": ("stack", lambda p, x: pallas_experts(jnp.stack([x] * 3), p["stack"], True)),
    "a kernel with blocks of one": ("stack", lambda p, x: pallas_experts(jnp.stack([x] * 3), p["stack"], False)),
    "a kernel with a loop": ("stack", lambda p, x: pallas_loop(jnp.stack([x] * 3), p["stack"])),
    "a kernel with indices": ("stack", lambda p, x: pallas_prefetch(x, p["stack"])),
    "a kernel under vmap": ("stack", lambda p, x: jax.vmap(pallas_product)(jnp.stack([x] * 3), p["stack"])),
    "a kernel that changes entries": ("w", lambda p, x: x @ pallas_change(p["w"])),
}


def check(fn, base, paths):
    """Values and gradients agree with the merged model's; returns `explain`, the delta and the gradient's program."""
    delta = moved(lora.init(jax.random.key(0), base, {f"^({paths})$": lora.LoRA(2)}, fn, X))
    train, frozen = lora.partition(delta)
    adapted = lora.adapt(fn)

    def loss(train):
        return jnp.sum(jnp.sin(adapted(base, lora.join(train, frozen), X)))

    def merged(train):
        return jnp.sum(jnp.sin(fn(lora.merge(base, lora.join(train, frozen)), X)))

    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(jax.value_and_grad(loss))(train)),
        jax.tree.leaves(jax.jit(jax.value_and_grad(merged))(train)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4 * (1 + float(jnp.abs(theirs).max())))
    return lora.explain(fn, base, delta, X), delta, jax.make_jaxpr(jax.grad(loss))(train)


@pytest.mark.parametrize("idiom", FACTORED)
def test_linear_operations_keep_a_weight_factored(idiom):
    paths, fn = FACTORED[idiom]
    explained, delta, gradient = check(fn, BASE, paths)
    assert explained.factored and all(explained.values()), str(explained)
    for path, node in delta.items():
        assert node.axes == OTHER_ROLES.get(idiom, {}).get(path, ROLES[path]), path
    assert dense_dependents(gradient, SIZES) == []


def mixed(x, w, dtype=jnp.float32):
    """A product of arrays of two dtypes, as `jnp.matmul` forms it outside of strict promotion."""
    return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=dtype)


def complex_product(x, w):
    return mixed(x, w, jnp.complex64)


def grouped(x, w):
    return jax.lax.ragged_dot(x, w, jnp.array([2, 1, 2], jnp.int32), preferred_element_type=w.dtype)


COMPLEX = {
    "two real weights": ("w|v", lambda p, x: complex_product(x, C(p["w"]) + jnp.complex64(1j) * C(p["v"]))),
    "on the left": ("w", lambda p, x: complex_product((jnp.complex64(1j) * C(p["w"])).T, x.T)),
    "a gain on the in axis": (
        "w",
        lambda p, x: complex_product(x, C(p["w"]) * (jnp.complex64(1 + 2j) * C(p["h"]))[:, None]),
    ),
    "a gain on the out axis": (
        "w",
        lambda p, x: complex_product(x, C(p["w"]) * (jnp.complex64(1 + 2j) * C(p["g"]))[None]),
    ),
    "concatenated": (
        "w|v",
        lambda p, x: complex_product(x, jnp.concatenate([C(p["w"]), jnp.complex64(1j) * C(p["v"])], 1)),
    ),
    "stacked": ("w|v", lambda p, x: complex_product(x, jnp.stack([C(p["w"]), jnp.complex64(1j) * C(p["v"])], 1))),
    "grouped": ("stack", lambda p, x: grouped(x, jnp.complex64(1j) * C(p["stack"]))),
}


@pytest.mark.parametrize("idiom", COMPLEX)
def test_a_real_input_times_a_complex_weight(idiom):
    paths, fn = COMPLEX[idiom]
    explained, _, gradient = check(lambda p, x: jnp.abs(fn(p, x)), BASE, paths)
    assert explained.factored, str(explained)
    assert dense_dependents(gradient, SIZES) == []


@pytest.mark.parametrize(
    "recipe", [lora.MiSS(3), lora.OFT(3), lora.LoKr(2), lora.VeRA(2)], ids=lambda r: type(r).__name__
)
def test_every_recipe_takes_real_inputs_of_complex_weights(recipe):
    fn = lambda p, x: complex_product(x, C(p["w"]) + jnp.complex64(1j) * C(p["v"]))  # noqa: E731
    delta = moved(lora.init(jax.random.key(0), BASE, {"^[wv]$": recipe}, fn, X))
    assert lora.explain(fn, BASE, delta, X).factored
    np.testing.assert_allclose(lora.adapt(fn)(BASE, delta, X), fn(lora.merge(BASE, delta), X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_inputs_of_other_dtypes(dtype):
    """Factors and gains act in the dtype of the result: float32 here."""
    x, fn = (4 * X).astype(dtype), lambda p, x: mixed(x, p["w"] * p["h"][:, None]) + mixed(x, p["v"])
    delta = moved(lora.init(jax.random.key(0), BASE, {"^[wv]$": lora.LoRA(2)}, fn, x))
    assert lora.explain(fn, BASE, delta, x).factored
    np.testing.assert_allclose(lora.adapt(fn)(BASE, delta, x), fn(lora.merge(BASE, delta), x), rtol=1e-5, atol=2e-5)


def test_integers_times_a_quantized_weight():
    base, x = {"w": normal(0, 64, 64)}, jnp.arange(128).reshape(2, 64) % 3
    fn = lambda p, x: mixed(x, p["w"])  # noqa: E731
    codes = lora.quantize(base, {"w": lora.Int8()}, fn, x)
    delta = moved(lora.init(jax.random.key(0), codes, {"w": lora.LoRA(2)}, fn, x))
    want = fn(lora.merge(lora.dequantize(codes), delta), x)
    np.testing.assert_allclose(lora.adapt(fn)(codes, delta, x), want, rtol=1e-4, atol=1e-4)
    assert jax.grad(lambda delta: lora.adapt(fn)(codes, delta, x).sum())(delta)["w"].b.any()


def test_a_complex_weight_that_becomes_real_is_merged():
    fn = lambda p, x: x @ (C(p["w"]) * jnp.complex64(1 + 2j)).real  # noqa: E731
    explained, *_ = check(fn, BASE, "w")
    assert not explained.factored


def test_an_imaginary_part_is_never_dropped():
    with pytest.raises(TypeError, match="A factor of dtype complex64 cannot act on an array of dtype float32"):
        narrow_dtype(C(X), jnp.float32)


@pytest.mark.parametrize("idiom", MERGED)
def test_roles_are_found_behind_operations_that_merge(idiom):
    paths, fn = MERGED[idiom]
    if "a kernel" in idiom:  # which has no derivative
        delta = lora.init(jax.random.key(0), BASE, {f"^({paths})$": lora.LoRA(2)}, fn, X)
        explained = lora.explain(fn, BASE, delta, X)
    else:
        explained, delta, _ = check(fn, BASE, paths)
    assert not explained.factored
    assert all(use.reason for uses in explained.values() for use in uses)
    assert {path: node.axes for path, node in delta.items()} == {path: ROLES[path] for path in delta} | (
        {"u": IN_OUT} if "u" in delta else {}
    )


@pytest.mark.parametrize("ids", [jnp.arange(5), jnp.array([4, 1, 1])])
def test_rows_of_a_table_are_looked_up_whatever_the_indices(ids):
    def fn(p, x, ids):
        return (x[: len(ids)] + p["square"][ids]) @ p["w"] + (p["other"][jnp.arange(len(ids))] * 2) @ p["w"]

    delta = moved(lora.init(jax.random.key(0), BASE, {"^(square|other|w)$": lora.LoRA(2)}, fn, X, ids))
    assert lora.explain(fn, BASE, delta, X, ids).factored
    np.testing.assert_allclose(
        lora.adapt(fn)(BASE, delta, X, ids), fn(lora.merge(BASE, delta), X, ids), rtol=1e-4, atol=1e-4
    )


def test_a_learned_query_of_several_heads_is_an_input():
    """As a mean of experts, it is a vector times three axes, of which a later product contracts one."""
    base, x = {"q": normal(2, D, 2, 3), "k": normal(3, D, 2, 3), "query": normal(4, D)}, X

    def fn(p, x):
        query = jnp.einsum("d,dhk->hk", p["query"], p["q"])
        return jnp.einsum("hk,thk->ht", query, jnp.einsum("td,dhk->thk", x, p["k"]))

    delta = moved(lora.init(jax.random.key(0), base, {"^[qk]$": lora.LoRA(2)}, fn, x))
    assert {node.axes for node in delta.values()} == {("in", "out", "out")}
    assert lora.explain(fn, base, delta, x).factored
    np.testing.assert_allclose(lora.adapt(fn)(base, delta, x), fn(lora.merge(base, delta), x), rtol=1e-4, atol=1e-4)


def test_a_use_that_needs_other_roles_is_merged_and_says_why():
    """Absorbed latent attention contracts the key projection on either side."""
    base, x = {"up": normal(2, D, 3, 4)}, normal(3, 5, D)

    def fn(p, x):
        keys = jnp.einsum("tc,chd->thd", x, p["up"])
        return jnp.einsum("thd,chd->thc", jnp.tanh(keys), p["up"])

    delta = moved(lora.init(jax.random.key(0), base, {"up": lora.LoRA(2)}, fn, x))
    assert delta["up"].axes == ("in", "out", "out")
    np.testing.assert_allclose(lora.adapt(fn)(base, delta, x), fn(lora.merge(base, delta), x), rtol=1e-4, atol=1e-4)
    first, second = lora.explain(fn, base, delta, x)["up"]
    assert first.factored and not second.factored
    assert "axes=('in', 'batch', 'out')" in second.reason
    both = lora.init(jax.random.key(0), base, {"up": lora.LoRA(2, axes=("in", "batch", "out"))}, fn, x)
    assert lora.explain(fn, base, both, x).factored


JOINED = {
    "concatenated": lambda p, x: jnp.split(x @ jnp.concatenate([p["square"], p["other"]], 1), 2, axis=1),
    "stacked": lambda p, x: jnp.einsum("td,ndf->ntf", x, jnp.stack([p["square"], p["other"]])),
    "plus constants": lambda p, x: (x @ (p["square"] + 1), x @ (jnp.eye(D) - p["other"])),
}


def in_order(p, x):
    return jnp.tanh(jnp.tanh(x @ p["square"]) @ p["other"])


@pytest.mark.parametrize(
    "joined, separate",
    [
        *((fn, lambda p, x: (x @ p["square"], x @ p["other"])) for fn in JOINED.values()),
        (lambda p, x: scan(jnp.stack([p["square"], p["other"]]), x), in_order),
    ],
    ids=[*JOINED, "stacked and scanned"],
)
def test_inputs_are_read_behind_joined_weights(joined, separate):
    spec = {"square|other": lora.LoRA(2, init="eva")}
    _, ours = lora.prepare(jax.random.key(0), BASE, spec, joined, [X])
    _, theirs = lora.prepare(jax.random.key(0), BASE, spec, separate, [X])
    for path, node in theirs.items():
        np.testing.assert_allclose(jnp.abs(ours[path].a), jnp.abs(node.a), rtol=1e-3, atol=1e-3)


def test_the_rule_in_the_guide_is_complete(monkeypatch):
    guide = pathlib.Path(__file__).parent.parent / "docs" / "guides" / "rules.md"
    (code,) = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 25
    monkeypatch.delitem(RULES, "dot_general")
    fn = FACTORED["concatenated and transposed"][1]
    delta = lora.init(jax.random.key(0), BASE, {"^(w|u)$": lora.LoRA(2, axes=IN_OUT)}, fn, X)
    assert not lora.explain(fn, BASE, delta, X).factored
    exec(compile(code, str(guide), "exec"), {})
    explained, *_ = check(fn, BASE, "w|u")
    assert explained.factored, str(explained)


def test_a_primitive_has_one_rule():
    with pytest.raises(ValueError, match=r"'dot_general' already has a rule, dot_general"):
        rule("dot_general")(lambda interpreter, equation, values: values)


def attention(p, x):
    """Learned positions for one example, and a fused kernel that is split."""
    h = x + p["positions"]
    q, k, v = jnp.split(p["qkv"], 3, axis=1)
    return jax.nn.softmax((h @ q) @ (h @ k).T) @ (h @ v)


@pytest.mark.parametrize("recipe, shape", [(lora.LoRA(2), (2, D)), (lora.IA3(), (3 * D,))])
@pytest.mark.parametrize("positions", [{}, {"positions": lora.Full()}, {"positions": lora.LoRA(2, axes=IN_OUT)}])
def test_a_weight_that_is_added_to_activations_is_one(recipe, shape, positions):
    base = {"qkv": normal(2, D, 3 * D), "positions": normal(3, 5, D)}
    delta = lora.init(jax.random.key(0), base, {"qkv": recipe} | positions, attention, X)
    assert delta["qkv"].axes == IN_OUT
    assert jax.tree.leaves(delta["qkv"])[0].shape == shape
    uses = lora.explain(attention, base, delta, X)
    assert all(use.factored for use in uses["qkv"])
    assert all(use.operation in ("input", "add") and not use.factored for use in uses.get("positions", []))


def test_heads_of_different_numbers_are_fused():
    base = {"q": normal(2, D, 3, 2), "k": normal(3, D, 1, 2), "v": normal(4, D, 2, 2)}

    def fn(p, x):
        return x @ jnp.concatenate([p[name].reshape(D, -1) for name in "qkv"], axis=1)

    delta = moved(lora.init(jax.random.key(0), base, {".": lora.LoRA(2)}, fn, X))
    assert lora.explain(fn, base, delta, X).factored
    np.testing.assert_allclose(lora.adapt(fn)(base, delta, X), fn(lora.merge(base, delta), X), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: jnp.einsum("ntd,ndf->ntf", x, jnp.concatenate([p["stack"], p["stack"]])),
        lambda p, x: jnp.einsum("ntd,ndf->ntf", x[:4], jnp.pad(p["stack"], ((1, 0), (0, 0), (0, 0)))),
    ],
    ids=["concatenated", "padded"],
)
def test_masks_of_joined_experts_depend_on_the_key(fn):
    x = normal(1, 6, 5, D)
    delta = moved(lora.init(jax.random.key(0), BASE, {"stack": lora.LoRA(2, dropout=0.5)}, fn, x))
    one, other = (lora.adapt(fn)(BASE, delta, x, dropout_key=jax.random.key(seed)) for seed in (0, 1))
    adapted = [n for n in range(one.shape[0]) if not np.allclose(one[n], fn(BASE, x)[n])]
    assert len(adapted) >= 3
    assert not any(np.allclose(one[n], other[n]) for n in adapted)


def test_windows_are_reduced_without_roles():
    def fn(p, x):
        return x @ jax.lax.reduce_window(p["square"], 0.0, jax.lax.add, (3, 1), (1, 1), "SAME")

    with pytest.raises(ValueError, match="contracts no axis"):
        lora.init(jax.random.key(0), BASE, {"square": lora.LoRA(2)}, fn, X)
    delta = lora.init(jax.random.key(0), BASE, {"square": lora.LoRA(2, axes=IN_OUT)}, fn, X)
    assert not lora.explain(fn, BASE, delta, X).factored


def test_a_merged_weight_does_not_hide_the_roles_of_another():
    base = {"w": normal(2, D, F), "q": normal(3, D, 3, 2)}

    def fn(p, x):
        return x @ jnp.concatenate([p["w"], jnp.tanh(p["q"].reshape(D, -1))], 1)

    spec = {"w": lora.LoRA(2), "q": lora.LoRA(2, axes=("in", "out", "out"))}
    delta = moved(lora.init(jax.random.key(0), base, spec, fn, X))
    uses = lora.explain(fn, base, delta, X)
    assert delta["w"].axes == IN_OUT and uses["w"][0].factored and not uses["q"][0].factored


def test_inputs_behind_a_mask_are_not_read():
    def fn(p, x):
        return x @ jnp.where(p["h"][:, None] > 1, p["w"], 0.0)

    with pytest.raises(ValueError, match="a mask on in axes"):
        lora.prepare(jax.random.key(0), BASE, {"^w$": lora.LoRA(2, init="eva")}, fn, [X])
