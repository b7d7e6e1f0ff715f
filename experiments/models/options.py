"""How a model computes, beside what it computes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp

Remat = Literal["none", "dots", "full", "offload"]
AttentionKernel = Literal["xla", "cudnn", "flash"]
Platform = Literal["cpu", "gpu", "tpu"]
MeshAxes = str | tuple[str, ...] | None
WeightAxes = Sequence[tuple[str, tuple[str | None, ...]]]
"""Pairs of a pattern of weight paths and the names of these weights' last axes; each model defines its own."""


class Shards(NamedTuple):
    """The axes of the mesh (of `jax.set_mesh`) that divide activations; None leaves an axis whole.

    Attributes:
      batch: Examples.
      heads: Heads within attention, hidden width within a feed-forward layer.
      length: Tokens of a sequence, from layer to layer; within attention a sequence is whole.
    """

    batch: MeshAxes = None
    heads: MeshAxes = None
    length: MeshAxes = None


@dataclass(frozen=True)
class Options:
    """Choices that change time and memory but, up to rounding, no result.

    Attributes:
      scan: Layers are stacked along a leading axis and run by one scanned body: compile time and code size
        of one layer.
      remat: What the backward pass computes again within a layer: nothing, all but products with weights
        ('dots'), everything ('full'); 'offload' is 'full' with the layers' inputs kept in the host's memory
        until then. That is for scanned layers: the inputs of unrolled ones go to the host and back so close
        together, as XLA schedules them for TPUs, that they take the device's memory all the same.
      dtype: Of activations; weights are cast to it at each use.
      attention: 'xla' anywhere, 'cudnn' on NVIDIA GPUs, 'flash' on TPUs.
      platform: What the model is compiled for, where it is not what this process runs on (ahead of time).
      shards: What divides activations on a mesh; None leaves it to XLA ('flash' runs on one device then).
      loss_chunk: How many tokens of a sequence have logits at the same time, where a model gives losses.
    """

    scan: bool = False
    remat: Remat = "none"
    dtype: Any = jnp.float32
    attention: AttentionKernel = "xla"
    platform: Platform | None = None
    shards: Shards | None = None
    loss_chunk: int = 512


DEFAULT = Options()
