"""Configs of fine-tuning runs on TPU slices and GPU nodes; as in `experiments.configs`, a module is a name."""

from pathlib import Path
from typing import Any

from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.models.options import Remat
from experiments.training.mesh_sizes import MeshSizes


def pod_config(
    name: str, model: str, mesh: MeshSizes, batch: int, lr: float = 1e-4, remat: Remat = "full", **fields: Any
) -> Config:
    """Returns a config in bfloat16 for sequences of 2,048 tokens, with a checkpoint every 200 steps.

    Args:
      name: Of the directory under `runs`.
      model: A name on the hub.
      mesh: The devices.
      batch: Sequences a step, over all devices.
      lr: Peak learning rate.
      remat: What the backward pass recomputes.
      **fields: Other fields of the config.
    """
    return Config(
        model=model,
        out=Path("runs", name),
        mesh=mesh,
        batch=BatchSizes(batch),
        lr=lr,
        dtype="bfloat16",
        length=2048,
        checkpoint_every=200,
        test_examples=0,
        remat=remat,
        **fields,
    )
