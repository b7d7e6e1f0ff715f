"""Layers of every framework, each as a function of parameters with what the library should find in it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax as lora


@dataclasses.dataclass(frozen=True)
class Layer:
    """One case.

    Attributes:
      name: `framework.kind`.
      make: dtype -> (fn, base, args).
      axes: Expected axis roles by path, as the trace should find them.
      merged: Whether the function forces a merge (a custom derivative rule).
    """

    name: str
    make: Callable[[Any], tuple[Callable, Any, tuple]]
    axes: dict[str, tuple[str, ...]]
    merged: bool = False


LAYERS: dict[str, Layer] = {}


def layer(name: str, axes: dict[str, tuple[str, ...]], *, merged: bool = False):
    def register(make):
        LAYERS[name] = Layer(name, make, axes, merged)
        return make

    return register


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    """Normal numbers. NumPy draws them: JAX would compile a program for each shape."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


IDS = jnp.asarray([[0, 3, 5], [6, 6, 1]])
EMBED = ("in", "out")


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def linen(name: str, axes, *inputs: Callable, **options):
    """Registers a Linen module, made by the decorated function of a dtype."""

    def register(build):
        @layer(f"linen.{name}", axes, **options)
        def make(dtype):
            module = build(dtype)
            args = tuple(arg(dtype) for arg in inputs)
            base = cast(module.init(jax.random.key(0), *args), dtype)

            def fn(base, *args):
                out = module.apply(base, *args)
                return out[0] if isinstance(out, tuple) else out

            return fn, base, args

        return make

    return register


def tokens(*shape: int):
    return lambda dtype: normal(7, *shape, dtype=dtype)


def ids(_dtype):
    return IDS


linen("Dense", {"params/kernel": ("in", "out")}, tokens(2, 3, 4))(lambda dtype: nn.Dense(6, dtype=dtype))
linen(
    "DenseGeneral",
    {"params/kernel": ("in", "in", "out", "out")},
    tokens(2, 3, 4, 2),
)(lambda dtype: nn.DenseGeneral((3, 6), axis=(-2, -1), dtype=dtype))
linen("Einsum", {"params/kernel": ("in", "out", "out")}, tokens(2, 3, 4))(
    lambda dtype: nn.Einsum((4, 2, 6), "...d,dhk->...hk", dtype=dtype)
)
linen("Conv1d", {"params/kernel": ("in", "in", "out")}, tokens(2, 8, 4))(lambda dtype: nn.Conv(6, (3,), dtype=dtype))
linen("Conv2d_strided", {"params/kernel": ("in", "in", "in", "out")}, tokens(2, 8, 8, 4))(
    lambda dtype: nn.Conv(6, (3, 3), strides=2, dtype=dtype)
)
linen("Conv2d_grouped_dilated", {"params/kernel": ("in", "in", "in", "out")}, tokens(2, 8, 8, 4))(
    lambda dtype: nn.Conv(6, (3, 3), kernel_dilation=2, feature_group_count=2, dtype=dtype)
)
linen("Conv3d", {"params/kernel": ("in", "in", "in", "in", "out")}, tokens(1, 4, 4, 4, 2))(
    lambda dtype: nn.Conv(6, (2, 2, 2), dtype=dtype)
)
linen("Embed", {"params/embedding": EMBED}, ids)(lambda dtype: nn.Embed(7, 4, dtype=dtype))
linen(
    "MultiHeadDotProductAttention",
    {
        "params/query/kernel": ("in", "out", "out"),
        "params/value/kernel": ("in", "out", "out"),
        "params/out/kernel": ("in", "in", "out"),
    },
    tokens(2, 5, 4),
)(lambda dtype: nn.MultiHeadDotProductAttention(2, qkv_features=12, dtype=dtype))


class Tied(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, dtype=self.dtype)
        return embed.attend(jnp.tanh(embed(ids)))


linen("Embed_tied_attend", {"params/Embed_0/embedding": EMBED}, ids)(lambda dtype: Tied(dtype))


class Block(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x, _=None):
        return x + jnp.tanh(nn.Dense(x.shape[-1], dtype=self.dtype)(x)), None


linen("scan", {"params/Dense_0/kernel": ("batch", "in", "out")}, tokens(2, 3, 4))(
    lambda dtype: nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(dtype)
)
linen("scan_of_remat", {"params/Dense_0/kernel": ("batch", "in", "out")}, tokens(2, 3, 4))(
    lambda dtype: nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(dtype)
)
linen("remat", {"params/Dense_0/kernel": ("in", "out")}, tokens(2, 3, 4))(lambda dtype: nn.remat(Block)(dtype))
linen("vmap", {"params/kernel": ("batch", "in", "out")}, tokens(2, 3, 4))(
    lambda dtype: nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)(6, dtype=dtype)
)


def nnx_layer(name: str, axes, *inputs: Callable):
    """Registers an NNX module, made by the decorated function of a dtype."""

    def register(build):
        @layer(f"nnx.{name}", axes)
        def make(dtype):
            fn, base = lora.nnx.functional(build(dtype))
            return fn, cast(base, dtype), tuple(arg(dtype) for arg in inputs)

        return make

    return register


def rngs():
    return nnx.Rngs(0)


nnx_layer("Linear", {"kernel": ("in", "out")}, tokens(2, 3, 4))(
    lambda dtype: nnx.Linear(4, 6, dtype=dtype, rngs=rngs())
)
nnx_layer("LinearGeneral", {"kernel": ("in", "in", "out", "out")}, tokens(2, 4, 2))(
    lambda dtype: nnx.LinearGeneral((4, 2), (3, 6), axis=(-2, -1), dtype=dtype, rngs=rngs())
)
nnx_layer("Einsum", {"kernel": ("in", "out", "out")}, tokens(2, 3, 4))(
    lambda dtype: nnx.Einsum("...d,dhk->...hk", (4, 2, 6), dtype=dtype, rngs=rngs())
)
nnx_layer("Conv", {"kernel": ("in", "in", "in", "out")}, tokens(2, 6, 6, 4))(
    lambda dtype: nnx.Conv(4, 6, (3, 3), dtype=dtype, rngs=rngs())
)
nnx_layer("Embed", {"embedding": EMBED}, ids)(lambda dtype: nnx.Embed(7, 4, dtype=dtype, rngs=rngs()))
nnx_layer(
    "MultiHeadAttention",
    {"query/kernel": ("in", "out", "out"), "out/kernel": ("in", "in", "out")},
    tokens(2, 5, 4),
)(lambda dtype: nnx.MultiHeadAttention(2, 4, 12, dtype=dtype, decode=False, rngs=rngs()))


class WithNorms(nnx.Module):
    def __init__(self, dtype):
        self.layers = nnx.List([nnx.Linear(4, 4, dtype=dtype, rngs=rngs()) for _ in range(2)])
        self.norm = nnx.BatchNorm(4, dtype=dtype, use_running_average=True, rngs=rngs())
        self.dropout = nnx.Dropout(0.5, rngs=rngs())

    def __call__(self, x):
        for linear in self.layers:
            x = self.dropout(self.norm(linear(x)))
        return x


nnx_layer("BatchNorm_Dropout", {"layers/0/kernel": ("in", "out"), "layers/1/kernel": ("in", "out")}, tokens(2, 3, 4))(
    WithNorms
)


def equinox_layer(name: str, axes, arg: Callable):
    def register(build):
        @layer(f"equinox.{name}", axes)
        def make(dtype):
            return (
                (lambda model, x: jax.vmap(model)(x)),
                cast(build(jax.random.key(0)), dtype),
                (arg(dtype),),
            )

        return make

    return register


equinox_layer("Linear", {"weight": ("out", "in")}, tokens(3, 4))(lambda key: eqx.nn.Linear(4, 6, key=key))
equinox_layer("Conv2d", {"weight": ("out", "in", "in", "in")}, tokens(2, 4, 6, 6))(
    lambda key: eqx.nn.Conv2d(4, 6, 3, key=key)
)
equinox_layer("Embedding", {"weight": EMBED}, lambda dtype: IDS[0])(lambda key: eqx.nn.Embedding(7, 4, key=key))
equinox_layer("MLP", {"layers/0/weight": ("out", "in"), "layers/1/weight": ("out", "in")}, tokens(3, 4))(
    lambda key: eqx.nn.MLP(4, 6, 8, 1, key=key)
)


def haiku_layer(name: str, axes, arg: Callable):
    def register(build):
        @layer(f"haiku.{name}", axes)
        def make(dtype):
            pure = hk.without_apply_rng(hk.transform(lambda x: build()(x)))
            x = arg(dtype)
            return pure.apply, cast(pure.init(jax.random.key(0), x), dtype), (x,)

        return make

    return register


haiku_layer("Linear", {"linear/w": ("in", "out")}, tokens(2, 3, 4))(lambda: hk.Linear(6))
haiku_layer("Conv2D", {"conv2_d/w": ("in", "in", "in", "out")}, tokens(2, 6, 6, 4))(lambda: hk.Conv2D(6, 3))
haiku_layer("Embed", {"embed/embeddings": EMBED}, ids)(lambda: hk.Embed(7, 4))


def raw(name: str, shape, axes, arg: Callable = tokens(2, 5, 4), **options):  # noqa: B008
    """Registers a plain function of one weight `w`."""

    def register(fn):
        @layer(f"raw.{name}", {"w": axes}, **options)
        def make(dtype):
            return (lambda base, x: fn(x, base["w"])), {"w": normal(1, *shape, dtype=dtype)}, (arg(dtype),)

        return fn

    return register


raw("x_w", (4, 6), ("in", "out"))(lambda x, w: x @ w)
raw("x_wT", (6, 4), ("out", "in"))(lambda x, w: x @ w.T)
raw("w_x", (6, 4), ("out", "in"), tokens(4, 5))(lambda x, w: w @ x)
raw("w_x_batched", (6, 3), ("out", "in"), tokens(2, 3, 4))(lambda x, w: jnp.einsum("oi,bin->bon", w, x))
raw("experts", (2, 4, 6), ("batch", "in", "out"), tokens(2, 3, 4))(lambda x, w: jnp.einsum("ebd,edf->ebf", x, w))
raw("experts_dense_dispatch", (2, 4, 6), ("out", "in", "out"), tokens(2, 3, 4))(
    lambda x, w: jnp.einsum("btd,edf->btef", x, w)
)
raw("expert_by_index", (3, 4, 6), ("batch", "in", "out"), tokens(2, 4))(
    lambda x, w: jnp.einsum("bd,bdf->bf", x, w[jnp.asarray([2, 0])])
)
raw("ragged_dot", (3, 4, 6), ("batch", "in", "out"), tokens(6, 4))(
    lambda x, w: jax.lax.ragged_dot(x, w, jnp.asarray([1, 3, 2]))
)
raw("qkv_split_after", (4, 18), ("in", "out"))(
    lambda x, w: jnp.concatenate([part**2 for part in jnp.split(x @ w, 3, axis=-1)], axis=-1)
)
raw("qkv_split_before", (4, 18), ("in", "out"))(
    lambda x, w: sum(jnp.tanh(x @ part) for part in jnp.split(w, 3, axis=1))
)
raw("qkv_sliced_before", (4, 18), ("in", "out"))(lambda x, w: (x @ w[:, :6]) * jnp.tanh(x @ w[:, 12:]))
raw("reshaped_to_heads", (4, 6), ("in", "out"))(lambda x, w: jnp.einsum("btd,dhk->bhtk", x, w.reshape(4, 2, 3)))
raw("reshaped_from_heads", (2, 3, 4), ("in", "in", "out"), tokens(2, 6))(lambda x, w: x @ w.reshape(6, 4))
raw("scaled", (4, 6), ("in", "out"))(lambda x, w: x @ (w * jnp.asarray(0.5, w.dtype) / 3.0 * -1.0))
raw("cast", (4, 6), ("in", "out"))(lambda x, w: x.astype(jnp.float32) @ w.astype(jnp.float32))
raw("transposed_twice", (6, 4), ("out", "in"))(lambda x, w: x @ jnp.swapaxes(w, 0, 1).T.T)
raw("twice", (4, 4), ("in", "out"))(lambda x, w: jnp.tanh(x @ w) @ w)
raw("there_and_back", (4, 6), ("in", "out"))(lambda x, w: jnp.tanh(x @ w) @ w.T)
raw("positions", (7, 4), ("in", "out"))(lambda x, w: x * (1 + w[: x.shape[1]])[None])
raw("jit_in_jit", (4, 6), ("in", "out"))(lambda x, w: jax.jit(lambda w: jax.jit(lambda v: x @ v.T)(w.T))(w))
raw("cond", (4, 6), ("in", "out"))(lambda x, w: jax.lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: jnp.sin(x @ w), w))
raw("while_decode", (4, 4), ("in", "out"))(
    lambda x, w: jax.lax.fori_loop(0, jnp.asarray(3), lambda i, x: jnp.tanh(x @ w), x)
)
raw("scan_decode", (4, 4), ("in", "out"))(
    lambda x, w: jax.lax.scan(lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, w), None, length=3)[0][0]
)
raw("scan_over_layers", (3, 4, 4), ("batch", "in", "out"))(
    lambda x, w: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]
)
raw("loop_over_layers", (3, 4, 4), ("batch", "in", "out"))(
    lambda x, w: jax.lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w[i]), x)
)
raw("sharding_constraint", (8, 6), ("in", "out"), tokens(2, 8))(
    lambda x, w: x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh(), PartitionSpec("model")))
)


def mesh():
    return jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))


@raw("shard_map", (8, 6), ("in", "out"), tokens(2, 8))
def _in_shards(x, w):
    split, whole = PartitionSpec(None, "model"), PartitionSpec()
    return jax.shard_map(
        lambda x, w: jax.lax.psum(x @ w, "model"),
        mesh=mesh(),
        in_specs=(split, PartitionSpec("model")),
        out_specs=whole,
    )(x, w)


@raw("shard_map_gathered", (8, 6), ("in", "out"), tokens(8, 8))
def _gathered(x, w):
    rows = PartitionSpec("model")
    return jax.shard_map(
        lambda x, w: x @ jax.lax.all_gather(w, "model", tiled=True),
        mesh=mesh(),
        in_specs=(rows, rows),
        out_specs=rows,
        check_vma=False,
    )(x, w)


@jax.custom_vjp
def _custom_vjp(x, w):
    return x @ w


_custom_vjp.defvjp(
    lambda x, w: (x @ w, (x, w)),
    lambda residuals, g: (g @ residuals[1].T, jnp.einsum("bti,bto->io", residuals[0], g)),
)


@jax.custom_jvp
def _custom_jvp(x, w):
    return x @ w


@_custom_jvp.defjvp
def _custom_jvp_rule(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


raw("custom_vjp", (4, 6), ("in", "out"), merged=True)(_custom_vjp)
raw("custom_jvp", (4, 6), ("in", "out"), merged=True)(_custom_jvp)
