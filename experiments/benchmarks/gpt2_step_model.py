"""A GPT-2-shaped language model as a pure function of a nested dict, for timing a step.

Layers are unrolled, since XLA's cost analysis counts the body of a loop once, and every matrix product of a block calls
one hook.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Params = Any
Linear = Callable[[str, dict[str, jax.Array], jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The model's sizes; the defaults are GPT-2 small's, on 4 sequences of 128 tokens."""

    layers: int = 12
    """Transformer blocks."""
    width: int = 768
    """Features of the residual stream."""
    hidden: int = 3072
    """Features inside the MLP."""
    heads: int = 12
    """Attention heads."""
    vocabulary: int = 50257
    """Tokens of the (tied) embedding."""
    batch: int = 4
    """Sequences in a step."""
    length: int = 128
    """Tokens in a sequence."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """The four linear weights of every block: path of the kernel's parent -> (in, out)."""
        block = {
            "attn/qkv": (self.width, 3 * self.width),
            "attn/out": (self.width, self.width),
            "mlp/up": (self.width, self.hidden),
            "mlp/down": (self.hidden, self.width),
        }
        return {f"layers/{i}/{name}": size for i in range(self.layers) for name, size in block.items()}


def make_params(key: jax.Array, shape: Shape) -> Params:
    """Random parameters, leaves named like layers/0/attn/qkv/kernel."""
    keys = iter(jax.random.split(key, 2 + 4 * shape.layers))

    def normal(*size: int) -> jax.Array:
        return 0.02 * jax.random.normal(next(keys), size)

    def norm() -> dict[str, jax.Array]:
        return {"scale": jnp.ones(shape.width), "bias": jnp.zeros(shape.width)}

    params: Params = {
        "embed": {
            "tokens": normal(shape.vocabulary, shape.width),
            "positions": normal(shape.length, shape.width),
        },
        "layers": {str(i): {"norm1": norm(), "norm2": norm(), "attn": {}, "mlp": {}} for i in range(shape.layers)},
        "norm": norm(),
    }
    for path, (n_in, n_out) in shape.linears().items():
        _, layer, part, name = path.split("/")
        params["layers"][layer][part][name] = {"kernel": normal(n_in, n_out), "bias": jnp.zeros(n_out)}
    return params


def dense(path: str, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """The hook's default: a frozen linear layer."""
    del path
    return x @ params["kernel"] + params["bias"]


def layer_norm(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def attention(path: str, params: Params, x: jax.Array, heads: int, linear: Linear) -> jax.Array:
    batch, length, width = x.shape
    qkv = linear(f"{path}/qkv", params["qkv"], x)
    q, k, v = (part.reshape(batch, length, heads, -1) for part in jnp.split(qkv, 3, axis=-1))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    scores = jnp.where(jnp.tri(length, dtype=bool), scores, jnp.finfo(scores.dtype).min)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return linear(f"{path}/out", params["out"], mixed.reshape(batch, length, width))


def logits(params: Params, tokens: jax.Array, shape: Shape, linear: Linear = dense) -> jax.Array:
    """Next-token logits [batch, length, vocabulary] of `tokens` [batch, length]."""
    x = params["embed"]["tokens"][tokens] + params["embed"]["positions"][: tokens.shape[1]]
    for i in range(shape.layers):
        path, block = f"layers/{i}", params["layers"][str(i)]
        x = x + attention(f"{path}/attn", block["attn"], layer_norm(block["norm1"], x), shape.heads, linear)
        hidden = linear(f"{path}/mlp/up", block["mlp"]["up"], layer_norm(block["norm2"], x))
        x = x + linear(f"{path}/mlp/down", block["mlp"]["down"], jax.nn.gelu(hidden))
    return layer_norm(params["norm"], x) @ params["embed"]["tokens"].T


def cross_entropy(predicted: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of `targets` [batch, length] under logits."""
    picked = jnp.take_along_axis(predicted, targets[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(predicted, axis=-1) - picked)
