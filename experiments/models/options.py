"""Options for how a model computes its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

Remat = Literal["none", "dots", "full", "offload"]
AttentionKernel = Literal["xla", "cudnn", "flash"]
Platform = Literal["cpu", "gpu", "tpu"]
MeshAxes = str | tuple[str, ...] | None
WeightAxes = Sequence[tuple[str, tuple[str | None, ...]]]
"""Pairs of a pattern of weight paths and the names of these weights' last axes; each model defines its own."""


class Shards(NamedTuple):
    """The axes of the mesh (of `jax.set_mesh`) that shard activations; None does not shard.

    Attributes:
      batch: For examples.
      heads: For the heads of attention and the hidden width of feed-forward layers.
      length: For the tokens of a sequence between layers. Attention gathers sequences.
    """

    batch: MeshAxes = None
    heads: MeshAxes = None
    length: MeshAxes = None


@dataclass(frozen=True)
class Options:
    """Options that change time and memory but, up to rounding, not the result.

    Attributes:
      scan: Whether layers are stacked along a leading axis and run by one scanned body, which has the compile time and
        the code size of one layer.
      remat: What the backward pass recomputes within a layer: nothing ('none'), everything but products with weights
        ('dots'), or everything ('full'). 'offload' is 'full' with the layers' inputs in the host's memory. It needs
        scanned layers: for unrolled layers on TPUs, XLA schedules the transfers so closely together that the inputs
        take the device's memory anyway.
      dtype: The dtype of activations; weights are cast to it at each use.
      attention: The kernel of attention: 'xla' on every platform, 'cudnn' on NVIDIA GPUs, 'flash' on TPUs.
      platform: The platform to compile for ahead of time; None is that of this process.
      shards: How activations are sharded on a mesh; None leaves it to XLA ('flash' then runs on one device).
      loss_chunk: The number of tokens of a sequence whose logits exist at a time when a model computes losses.
    """

    scan: bool = False
    remat: Remat = "none"
    dtype: Any = np.float32
    attention: AttentionKernel = "xla"
    platform: Platform | None = None
    shards: Shards | None = None
    loss_chunk: int = 512


DEFAULT = Options()
