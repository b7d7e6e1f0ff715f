"""A sparse feed-forward layer: a router sends each token to a few of several SwiGLU experts.

Shapes are in the names: B examples, L tokens of an example, T tokens of all examples, E experts, C experts that a
token is sent to, R = T · C pairs of a token and an expert, D width, F hidden width.

References:
  Shazeer et al., `Outrageously Large Neural Networks <https://arxiv.org/abs/1701.06538>`_, 2017, §2
  Jiang et al., `Mixtral of Experts <https://arxiv.org/abs/2401.04088>`_, 2024, §2.1
  Gale et al., `MegaBlocks <https://arxiv.org/abs/2211.15841>`_, 2022
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.options import MeshAxes, Options


class Matrices(nnx.Module):
    """A matrix for each expert, as one kernel `[experts, in, out]`.

    Args:
      experts: How many.
      into: The size of the contracted axis.
      out: The size of the other.
      dtype: What the kernel is cast to when it is used.
      rngs: Keys of the random initial weights.
    """

    def __init__(self, experts: int, into: int, out: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (experts, into, out)))

    def cast(self) -> jax.Array:
        """The kernel in the dtype of computation."""
        return self.kernel[...].astype(self.dtype)


class SparseFeedForward(nnx.Module):
    """Each token's sum of the outputs of the experts that its router scores highest, weighted by those scores.

    The scores are the softmax of the router's logits, of which the highest are scaled to sum to one. There is no
    capacity: no token is dropped, and an expert may have any share of them. Tokens are sorted by expert and multiplied
    by :func:`jax.lax.ragged_dot`. Compiled for a TPU, that computes the products with the chosen experts; a CPU has no
    kernel for it and computes every expert's product with every token.

    The loss that keeps the experts' loads even, which transformers adds where `output_router_logits` asks for it, is
    left out.

    Args:
      width: Of tokens.
      hidden: Of an expert's hidden layer.
      experts: How many there are.
      chosen: How many of them a token is sent to.
      options: How to compute. With `options.shards` each device sorts and multiplies the tokens that it holds, for
        its part of every expert's hidden width, so that no sort goes across devices. Without, under a mesh, XLA sorts
        all tokens together.
      rngs: Keys of the random initial weights.
    """

    def __init__(self, width: int, hidden: int, experts: int, chosen: int, options: Options, *, rngs: nnx.Rngs):
        self.chosen, self.options = chosen, options
        self.router = nnx.Linear(width, experts, use_bias=False, dtype=options.dtype, rngs=rngs)
        matrices = functools.partial(Matrices, experts, dtype=options.dtype, rngs=rngs)
        self.gate, self.up, self.down = matrices(width, hidden), matrices(width, hidden), matrices(hidden, width)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        """Maps `[batch, length, width]` to the same shape and dtype."""
        logits_BLE = self.router(x_BLD)
        kernels = (self.gate.cast(), self.up.cast(), self.down.cast())
        mix = functools.partial(_mixed, chosen=self.chosen)
        if self.options.shards is None:
            return mix(x_BLD, logits_BLE, *kernels)
        batch, heads, length = map(_names, self.options.shards)
        length = _dividing(length, x_BLD.shape[1])
        # Where one axis of the mesh divides both hidden width and tokens from layer to layer, tokens are whole in here.
        gathered = bool(length) and length == heads

        def local(x_BLD: jax.Array, logits_BLE: jax.Array, *kernels: jax.Array) -> jax.Array:
            if not gathered:
                return mix(x_BLD, logits_BLE, *kernels)[None]
            whole = (jax.lax.all_gather(each, length, axis=1, tiled=True) for each in (x_BLD, logits_BLE))
            return jax.lax.psum_scatter(mix(*whole, *kernels), length, scatter_dimension=1, tiled=True)

        tokens = jax.P(_dividing(batch, x_BLD.shape[0]), length, None)
        mapped = jax.shard_map(
            local,
            in_specs=(tokens, tokens, jax.P(None, None, heads), jax.P(None, None, heads), jax.P(None, heads, None)),
            out_specs=tokens if gathered else jax.P(heads, *tokens),
            # Adapters' ragged products do not tell along which axes of the mesh they vary. So the devices' parts of the
            # hidden width are summed out here: a sum inside would have its gradient summed over devices once more.
            check_vma=False,
        )
        y = mapped(x_BLD, logits_BLE, *kernels)
        return y if gathered else jnp.sum(y, axis=0)


def _mixed(
    x_BLD: jax.Array,
    logits_BLE: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    chosen: int,
) -> jax.Array:
    """The experts' weighted outputs `[batch, length, width]` of tokens, all on one device."""
    x_TD, logits_TE = (x.reshape(-1, x.shape[-1]) for x in (x_BLD, logits_BLE))
    scores_TC, experts_TC = route(logits_TE, chosen)
    experts_R = experts_TC.reshape(-1)
    order_R = jnp.argsort(experts_R)
    places_R = jnp.argsort(order_R)
    sizes_E = jnp.sum(jax.nn.one_hot(experts_R, gate_EDF.shape[0], dtype=jnp.int32), axis=0)
    x_RD = _rows(x_TD, order_R, places_R)
    h_RF = jax.nn.silu(jax.lax.ragged_dot(x_RD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(x_RD, up_EDF, sizes_E)
    y_RD = _rows(jax.lax.ragged_dot(h_RF, down_EFD, sizes_E), places_R, order_R)
    y_TCD = y_RD.reshape(-1, chosen, x_TD.shape[-1]).astype(scores_TC.dtype)
    return jnp.sum(scores_TC[..., None] * y_TCD, axis=1).astype(x_BLD.dtype).reshape(x_BLD.shape)


def route(logits_TE: jax.Array, chosen: int) -> tuple[jax.Array, jax.Array]:
    """The experts that tokens are sent to, and their weights.

    Args:
      logits_TE: The router's, `[tokens, experts]`.
      chosen: How many experts a token is sent to.

    Returns:
      `float32[tokens, chosen]`, which sum to one, and `int32[tokens, chosen]`; the highest score is first.
    """
    scores_TC, experts_TC = jax.lax.top_k(jax.nn.softmax(logits_TE.astype(jnp.float32)), chosen)
    return scores_TC / jnp.sum(scores_TC, axis=-1, keepdims=True), experts_TC


@jax.custom_vjp
def _rows(x_TD: jax.Array, order_R: jax.Array, places_R: jax.Array) -> jax.Array:
    """The rows, each repeated R / T times, in another order.

    Its gradient is gathered and summed: JAX's own would be scattered row by row, which TPUs do slowly.

    Args:
      x_TD: `[tokens, width]`.
      order_R: A permutation: which of the repeated rows stands at each place.
      places_R: Its inverse.
    """
    del places_R
    return x_TD[order_R // (order_R.shape[0] // x_TD.shape[0])]


def _rows_forward(x_TD: jax.Array, order_R: jax.Array, places_R: jax.Array) -> tuple[jax.Array, Any]:
    return _rows(x_TD, order_R, places_R), (places_R, x_TD.shape[0])


def _rows_backward(kept: Any, y_RD: jax.Array) -> tuple[jax.Array, None, None]:
    places_R, tokens = kept
    return jnp.sum(y_RD[places_R].reshape(tokens, -1, y_RD.shape[-1]), axis=1), None, None


_rows.defvjp(_rows_forward, _rows_backward)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    """The axes of a mesh as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _dividing(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The axes of the mesh where they divide so many tokens; none where they cannot (a prompt alone, a last token)."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if size % math.prod(mesh.shape[name] for name in axes) else axes
