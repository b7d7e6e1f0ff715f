"""The program of supervised fine-tuning: the loss of the tokens with labels."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax as lora
from experiments.configs.sft import Config
from experiments.models.options import Platform
from experiments.studies.decoder import program
from experiments.studies.decoder.program import Objective, Program


def abstract(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    platform: Platform | None = None,
    *,
    steps: int = 1000,
    max_labels: int | None = None,
) -> Program:
    """Returns the program of a config from shapes alone; see :func:`experiments.studies.decoder.program.abstract`.

    Args:
      config: The study's config. The model may be one of which only the shape is shipped.
      devices: The devices of the mesh; None uses all devices.
      platform: The platform of the devices, if it differs from this process's.
      steps: Total number of steps, for the learning rate schedule.
      max_labels: The largest number of labels in a row of a batch; None has no bound, so that logits are computed for
        every token.
    """
    array = jax.ShapeDtypeStruct((config.batch_size, config.row_length), jnp.int32)
    objective = Objective(
        functools.partial(_loss, config=config, max_labels=max_labels),
        dict.fromkeys(("tokens", "segments", "positions", "labels"), array),
        has_aux=False,
    )
    return program.abstract(config, objective, devices, platform, steps=steps)


def _loss(apply: Callable, dropout: bool, config: Config, max_labels: int | None) -> Callable:
    """Returns a loss function for `lora.train_step`: the sum over a batch's labels, and their number.

    Without a key, as in evaluation, there is no dropout, noise or label smoothing.
    """
    adapted = lora.adapt(apply, flatten=not config.mesh.sequence)

    def loss(base: Any, delta: Any, batch: Any, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        options: dict[str, Any] = {}
        if key is not None:
            dropout_key, noise_key = jax.random.split(key)
            options["dropout_key"] = dropout_key if dropout else None
            options["label_smoothing"] = config.label_smoothing
            if config.neftune:
                options["noise"] = (noise_key, config.neftune)
        losses = adapted(
            base,
            delta,
            batch["tokens"],
            batch["segments"],
            batch["positions"],
            labels_BL=batch["labels"],
            max_labels=max_labels,
            **options,
        )
        return jnp.sum(losses), jnp.sum(batch["labels"] >= 0)

    return loss
