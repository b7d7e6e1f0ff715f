"""A reward model, and how often it ranks held-out pairs correctly."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.reward import Config
from experiments.input import pipeline
from experiments.models import decoder_heads
from experiments.models.families import Family
from experiments.objectives import reward
from experiments.objectives.log_probabilities import Loss
from experiments.studies.decoder.program import Objective, Program
from experiments.studies.post_training import study
from experiments.studies.post_training.data import Data
from experiments.studies.post_training.report import Report
from experiments.studies.post_training.task import Aim, Measure, Measured, Task
from experiments.training import mesh as meshes

ACCURACY = "chosen answer has the larger score"
_AIM = Aim(ACCURACY, 0.1)


def run(config: Config) -> Report:
    """Runs or resumes the study; see :func:`study.run`."""
    task = Task("reward", make_objective, make_measure, _AIM, "accuracy", task_type="SEQ_CLS")
    return study.run(config, task)


def make_objective(config: Config, data: Data) -> Objective:
    """Returns the objective of a config."""
    size = config.batch_size
    array = jax.ShapeDtypeStruct((size, 2, config.row_length), jnp.int32)
    batch = dict.fromkeys(("tokens", "segments", "labels"), array) | {"index": jax.ShapeDtypeStruct((size,), jnp.int32)}
    return Objective(functools.partial(_loss, config=config), batch, spec=reward.SPEC, adapt_family=with_score)


def _loss(apply: Callable, dropout: bool, config: Config) -> Loss:
    loss = reward.reward(reward.scores(apply, dropout=dropout), center=config.center)
    return lambda base, delta, batch, key: loss(base, delta, _with_mask(batch), key)


def with_score(family: Family, description: Mapping[str, Any]) -> Family:
    """Returns the family of decoders with a score instead of the head of a language model."""
    parts: dict[str, Any] = {
        "shape": lambda content: family.shape(decoder_heads.headless(content)),
        "build": lambda shape, options, rngs: decoder_heads.build(family, shape, 1, options, rngs=rngs),
        "load": functools.partial(decoder_heads.load, classes=1),
        "names": lambda shape: decoder_heads.names(description),
        "axes": tuple((re.sub(r"^\^", "^decoder/", pattern), names) for pattern, names in family.axes),
    }
    return dataclasses.replace(family, **parts)


def make_measure(config: Config, program: Program, data: Data) -> Measure:
    """Returns the function that scores the answers of all held-out records."""
    score, mesh, batches = reward.scores(program.apply), program.mesh, data.held_out

    @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
    def scores(base: Any, delta: Any, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return score(base, delta, _with_mask(batch)), batch["index"]

    def measure(base: Any, delta: Any) -> Measured:
        rows = meshes.process_rows(mesh, batches.batch_size)
        iterator = pipeline.iterate(batches, batches.steps_per_epoch, rows=rows)
        results = [scores(base, delta, meshes.put_batch(mesh, batch, batches.batch_size)) for batch in iterator]
        scores_N2, index_N = (np.concatenate(list(map(np.asarray, one))) for one in zip(*results))
        margin_N = np.diff(scores_N2[index_N >= 0][:, ::-1], axis=1)[:, 0]
        return Measured({ACCURACY: (np.sign(margin_N) + 1) / 2, "margin of scores": margin_N})

    return measure


def _with_mask(batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {**batch, "mask": batch["segments"]}
