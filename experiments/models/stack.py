"""A sequence of equal layers, unrolled or stacked and scanned, with or without rematerialization."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from experiments.models.options import Options

Layers = Any
"""An `nnx.List` of layers, or one layer whose variables have a leading axis over layers."""

_INPUT = "layer_input"
_POLICIES = {
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def build(make: Callable[[nnx.Rngs], nnx.Module], count: int, options: Options, rngs: nnx.Rngs) -> Layers:
    """Builds `count` layers, stacked if `options.scan`."""
    if not options.scan:
        return nnx.List(make(rngs) for _ in range(count))
    return nnx.vmap(make)(rngs.split(count))


def stack_states(trees: Sequence[Any], options: Options) -> Any:
    """Converts one tree per layer to what :func:`run` takes: stacked trees for scanned layers, otherwise a tuple."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if options.scan else tuple(trees)


def unstack_states(stacked: Any, options: Options) -> Any:
    """Converts a tree with a leading axis of layers to what :func:`run` takes, as :func:`stack_states` does."""
    if options.scan:
        return stacked
    leaves, treedef = jax.tree.flatten(stacked)
    return tuple(treedef.unflatten(slices) for slices in zip(*leaves))


def run(
    layers: Layers, x: Any, *shared: Any, states: Any = None, inputs: jax.Array | None = None, options: Options
) -> tuple[Any, Any]:
    """Calls `layer(x, state, *shared) -> (x, state)` for one layer after another.

    Args:
      layers: From :func:`build`.
      x: The input of the first layer.
      *shared: Arguments that are the same for every layer.
      states: The state of each layer (its keys and values), from :func:`stack_states`; None passes None to every layer.
        A layer returns its state in the same form.
      inputs: `[layers, tokens, width]`, which replace the input of each layer at the first tokens of all examples; None
        replaces nothing.
      options: Whether to scan, and what to rematerialize.

    Returns:
      The output of the last layer, and the new states in the form of `states`: separate arrays for unrolled layers,
      slices of one array for scanned layers.
    """

    def call(layer: nnx.Module, x: Any, state: Any, first: jax.Array | None, *shared: Any) -> tuple[Any, Any]:
        x = x if first is None else _replace_first(x, first)
        x, state = layer(checkpoint_name(x, _INPUT), state, *shared)  # pyrefly: ignore[not-callable]
        return _constrain(x, options), state

    if options.remat != "none":
        call = nnx.remat(call, policy=_POLICIES[options.remat])
    x = _constrain(x, options)
    if options.scan:
        return _scan(call, layers, x, states, inputs, shared)
    nothing, new_states = [None] * len(layers), []
    for layer, state, first in zip(layers, states or nothing, nothing if inputs is None else inputs):
        x, state = call(layer, x, state, first, *shared)
        new_states.append(state)
    return x, tuple(new_states)


def _scan(
    call: Callable, layers: nnx.Module, x: Any, states: Any, inputs: jax.Array | None, shared: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Carries the states of all layers through the loop, so that XLA updates them in place instead of copying them."""

    def body(layer: nnx.Module, carry: Any, scanned: Any, *shared: Any) -> tuple[Any, None]:
        (x, states), (index, first) = carry, scanned
        state = jax.tree.map(lambda all_: jax.lax.dynamic_index_in_dim(all_, index, keepdims=False), states)
        x, state = call(layer, x, state, first, *shared)
        update = jax.lax.dynamic_update_index_in_dim
        return (x, jax.tree.map(lambda all_, one: update(all_, one, index, 0), states, state)), None

    leaves = jax.tree.leaves(states)
    indices = jnp.arange(len(leaves[0])) if leaves else None
    axes = (0, nnx.Carry, 0, *(None for _ in shared))
    scan = nnx.scan(body, in_axes=axes, out_axes=(nnx.Carry, 0))
    (x, states), _ = scan(layers, (x, states), (indices, inputs), *shared)
    return x, states


def _replace_first(x_BLD: jax.Array, first_PD: jax.Array) -> jax.Array:
    first_BPD = jnp.broadcast_to(first_PD.astype(x_BLD.dtype), (x_BLD.shape[0], *first_PD.shape))
    return jnp.concatenate([first_BPD, x_BLD[:, len(first_PD) :]], axis=1)


def _constrain(x: Any, options: Options) -> Any:
    """Constrains the sharding of activations between layers, `[batch, length, …]`, to that of the options."""
    if options.shards is None:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(options.shards.batch, options.shards.length))
