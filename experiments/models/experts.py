"""A sparse feed-forward layer, in which a router sends each token to a few of several SwiGLU experts.

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
      experts: The number of experts.
      in_size: The size of the contracted axis.
      out_size: The size of the output axis.
      dtype: The dtype of the computation.
      rngs: Keys of the random initial weights.
    """

    def __init__(self, experts: int, in_size: int, out_size: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dtype = dtype
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (experts, in_size, out_size)))

    def cast(self) -> jax.Array:
        """Returns the kernel in the dtype of the computation."""
        return self.kernel[...].astype(self.dtype)


class SparseFeedForward(nnx.Module):
    """The sum of the outputs of the experts with the highest router scores for a token, weighted by these scores.

    The scores are the softmax of the router's logits; the highest are scaled to sum to one. Experts have no capacity,
    so no token is dropped. Tokens are sorted by expert and multiplied by :func:`jax.lax.ragged_dot`. Compiled for a
    TPU, it computes the products with the chosen experts only; compiled for a CPU, it computes the product of every
    expert with every token.

    The load-balancing loss, which transformers adds with `output_router_logits`, is not computed.

    Args:
      width: The width of tokens.
      hidden: The hidden width of an expert.
      experts: The number of experts.
      chosen: The number of experts per token.
      options: How the model computes. With `options.shards` each device sorts and multiplies the tokens that it holds,
        for its shard of every expert's hidden width, so no sort crosses devices. Without, XLA sorts all tokens of the
        mesh together.
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
        mix = functools.partial(_mix, chosen=self.chosen)
        if self.options.shards is None:
            return mix(x_BLD, logits_BLE, *kernels)
        batch, heads, length = map(_names, self.options.shards)
        length = _dividing(length, x_BLD.shape[1])
        # If the same mesh axis shards the hidden width and the tokens between layers, tokens are gathered here.
        gather = bool(length) and length == heads

        def local(x_BLD: jax.Array, logits_BLE: jax.Array, *kernels: jax.Array) -> jax.Array:
            if not gather:
                return mix(x_BLD, logits_BLE, *kernels)[None]
            gathered = (jax.lax.all_gather(array, length, axis=1, tiled=True) for array in (x_BLD, logits_BLE))
            return jax.lax.psum_scatter(mix(*gathered, *kernels), length, scatter_dimension=1, tiled=True)

        tokens = jax.P(_dividing(batch, x_BLD.shape[0]), length, None)
        mapped = jax.shard_map(
            local,
            in_specs=(tokens, tokens, jax.P(None, None, heads), jax.P(None, None, heads), jax.P(None, heads, None)),
            out_specs=tokens if gather else jax.P(heads, *tokens),
            # Adapters' ragged products have no information about the mesh axes along which they vary. So the devices'
            # shards of the hidden width are summed outside: the gradient of a sum inside would be summed twice.
            check_vma=False,
        )
        y = mapped(x_BLD, logits_BLE, *kernels)
        return y if gather else jnp.sum(y, axis=0)


def _mix(
    x_BLD: jax.Array,
    logits_BLE: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    chosen: int,
) -> jax.Array:
    """Returns the experts' weighted outputs `[batch, length, width]`, on one device."""
    x_TD, logits_TE = (x.reshape(-1, x.shape[-1]) for x in (x_BLD, logits_BLE))
    scores_TC, experts_TC = route(logits_TE, chosen)
    experts_R = experts_TC.reshape(-1)
    order_R = jnp.argsort(experts_R)
    inverse_R = jnp.argsort(order_R)
    sizes_E = jnp.sum(jax.nn.one_hot(experts_R, gate_EDF.shape[0], dtype=jnp.int32), axis=0)
    x_RD = _rows(x_TD, order_R, inverse_R)
    h_RF = jax.nn.silu(jax.lax.ragged_dot(x_RD, gate_EDF, sizes_E)) * jax.lax.ragged_dot(x_RD, up_EDF, sizes_E)
    y_RD = _rows(jax.lax.ragged_dot(h_RF, down_EFD, sizes_E), inverse_R, order_R)
    y_TCD = y_RD.reshape(-1, chosen, x_TD.shape[-1]).astype(scores_TC.dtype)
    return jnp.sum(scores_TC[..., None] * y_TCD, axis=1).astype(x_BLD.dtype).reshape(x_BLD.shape)


def route(logits_TE: jax.Array, chosen: int) -> tuple[jax.Array, jax.Array]:
    """Returns the weights and the indices of the experts of each token.

    Args:
      logits_TE: The router's logits, `[tokens, experts]`.
      chosen: The number of experts per token.

    Returns:
      Weights `float32[tokens, chosen]`, which sum to one, and indices `int32[tokens, chosen]`, in descending order.
    """
    scores_TC, experts_TC = jax.lax.top_k(jax.nn.softmax(logits_TE.astype(jnp.float32)), chosen)
    return scores_TC / jnp.sum(scores_TC, axis=-1, keepdims=True), experts_TC


@jax.custom_vjp
def _rows(x_TD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> jax.Array:
    """Repeats each row R / T times and permutes the result.

    Its gradient gathers and sums; JAX's default gradient would scatter row by row, which is slow on TPUs.

    Args:
      x_TD: `[tokens, width]`.
      order_R: A permutation: the index of the repeated row at each position.
      inverse_R: Its inverse.
    """
    del inverse_R
    return x_TD[order_R // (order_R.shape[0] // x_TD.shape[0])]


def _rows_forward(x_TD: jax.Array, order_R: jax.Array, inverse_R: jax.Array) -> tuple[jax.Array, Any]:
    return _rows(x_TD, order_R, inverse_R), (inverse_R, x_TD.shape[0])


def _rows_backward(residuals: Any, y_RD: jax.Array) -> tuple[jax.Array, None, None]:
    inverse_R, tokens = residuals
    return jnp.sum(y_RD[inverse_R].reshape(tokens, -1, y_RD.shape[-1]), axis=1), None, None


_rows.defvjp(_rows_forward, _rows_backward)


def _names(axes: MeshAxes) -> tuple[str, ...]:
    """Returns mesh axes as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def _dividing(axes: tuple[str, ...], size: int) -> tuple[str, ...]:
    """Returns the mesh axes if they divide `size` tokens, otherwise none (for a single prompt or token)."""
    mesh = jax.sharding.get_abstract_mesh()
    return () if size % math.prod(mesh.shape[name] for name in axes) else axes
