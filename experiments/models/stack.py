"""Equal layers one after another: unrolled, or stacked and scanned; with or without rematerialization."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from experiments.models.options import Options

Layers = Any
"""An `nnx.List` of layers, or one layer whose variables have a leading axis that runs over layers."""

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
    """Makes `count` layers, stacked where they are to be scanned."""
    if not options.scan:
        return nnx.List(make(rngs) for _ in range(count))
    return nnx.vmap(make)(rngs.split(count))


def per_layer(trees: Sequence[Any], options: Options) -> Any:
    """One tree a layer in the form that :func:`run` takes: stacked where layers are scanned, else a tuple."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if options.scan else tuple(trees)


def run(layers: Layers, x: Any, *shared: Any, each: Any = None, options: Options) -> tuple[Any, Any]:
    """Calls `layer(x, own, *shared) -> (x, kept)` for one layer after another.

    Args:
      layers: From :func:`build`.
      x: What goes from layer to layer.
      *shared: What every layer is given.
      each: What each layer is given of its own (its keys and values), from :func:`per_layer`; None is None for all.
      options: Whether to scan and what to rematerialize.

    Returns:
      What the last layer gives, and what the layers give to keep, in the form of `each`: unrolled layers have
      arrays of their own, which nothing stacks; scanned ones read and write parts of one array.
    """

    def call(layer: nnx.Module, x: Any, own: Any, *shared: Any) -> tuple[Any, Any]:
        x, kept = layer(checkpoint_name(x, _INPUT), own, *shared)  # pyrefly: ignore[not-callable]
        return _placed(x, options), kept

    if options.remat != "none":
        call = nnx.remat(call, policy=_POLICIES[options.remat])
    x = _placed(x, options)
    if options.scan:
        axes = (0, nnx.Carry, 0, *(None for _ in shared))
        return nnx.scan(call, in_axes=axes, out_axes=(nnx.Carry, 0))(layers, x, each, *shared)
    kept = []
    for layer, own in zip(layers, [None] * len(layers) if each is None else each):
        x, mine = call(layer, x, own, *shared)
        kept.append(mine)
    return x, tuple(kept)


def _placed(x: Any, options: Options) -> Any:
    """What goes from layer to layer, `[batch, length, …]`, where the options say that it lies on the mesh."""
    if options.shards is None:
        return x
    return jax.lax.with_sharding_constraint(x, jax.P(options.shards.batch, options.shards.length))
