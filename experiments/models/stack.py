"""Equal layers one after another: unrolled, or stacked and scanned; with or without rematerialisation."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from experiments.models.options import Options

Layers = Any
"""An `nnx.List` of layers, or one layer whose variables have a leading axis that runs over layers."""

_POLICIES = {"dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims, "full": None}


def build(make: Callable[[nnx.Rngs], nnx.Module], count: int, options: Options, rngs: nnx.Rngs) -> Layers:
    """Makes `count` layers, stacked where they are to be scanned."""
    if not options.scan:
        return nnx.List(make(rngs) for _ in range(count))
    return nnx.vmap(make)(rngs.fork(split=count))


def run(layers: Layers, x: Any, *shared: Any, each: Any = None, options: Options) -> tuple[Any, Any]:
    """Calls `layer(x, each_of_layer, *shared) -> (x, kept_of_layer)` for one layer after another.

    Args:
      layers: From :func:`build`.
      x: What goes from layer to layer.
      *shared: What every layer is given.
      each: A tree of arrays with a leading axis over layers (a cache of keys and values); a layer gets its own.
      options: Whether to scan and what to rematerialise.

    Returns:
      What the last layer gives, and what the layers give to keep, stacked along a leading axis like `each`.
    """

    def call(layer: nnx.Module, x: Any, own: Any, *shared: Any) -> tuple[Any, Any]:
        return layer(x, own, *shared)  # pyrefly: ignore[not-callable]

    if options.remat != "none":
        call = nnx.remat(call, policy=_POLICIES[options.remat])
    if options.scan:
        axes = (0, nnx.Carry, 0, *(None for _ in shared))
        return nnx.scan(call, in_axes=axes, out_axes=(nnx.Carry, 0))(layers, x, each, *shared)
    kept = []
    for number, layer in enumerate(layers):
        own = jax.tree.map(lambda array: array[number], each)  # noqa: B023
        x, mine = call(layer, x, own, *shared)
        kept.append(mine)
    return x, jax.tree.map(lambda *arrays: jax.numpy.stack(arrays), *kept)
