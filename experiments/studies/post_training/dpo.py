"""Preferences: DPO and related objectives, and how often the chosen answer of held-out pairs is the likelier one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.configs.dpo import Config
from experiments.input import pipeline
from experiments.objectives.dpo import dpo
from experiments.objectives.kto import kto
from experiments.objectives.log_probabilities import LogProbabilities, Loss
from experiments.objectives.orpo import orpo
from experiments.objectives.simpo import simpo
from experiments.studies.decoder.program import Objective, Program
from experiments.studies.post_training import study
from experiments.studies.post_training.data import Data
from experiments.studies.post_training.report import Report
from experiments.studies.post_training.task import Aim, Measure, Measured, Task, Values
from experiments.training import mesh as meshes

ACCURACY = "chosen answer is likelier"
_SUMS, _COUNTS, _LABEL = "log-probability", "tokens", "label"
_AIM = 0.1


def run(config: Config) -> Report:
    """Runs or resumes the study; see :func:`study.run`."""
    curve = "desirable" if config.loss == "kto" else "accuracy"
    aim = Aim("reward has the right sign" if config.loss == "kto" else ACCURACY, _AIM)
    return study.run(config, Task(f"dpo ({config.loss})", make_objective, make_measure, aim, curve, compare=compare))


def make_objective(config: Config, data: Data) -> Objective:
    """Returns the objective of a config."""
    size = config.batch_size
    array = jax.ShapeDtypeStruct((size, 2, config.row_length), jnp.int32)
    batch = dict.fromkeys(("tokens", "segments", "labels"), array) | {"index": jax.ShapeDtypeStruct((size,), jnp.int32)}
    if config.loss == "kto":
        batch["desirable"] = jax.ShapeDtypeStruct((size,), jnp.bool_)
    return Objective(functools.partial(_loss, config=config, max_labels=data.max_labels), batch)


def _loss(apply: Callable, dropout: bool, config: Config, max_labels: int) -> Loss:
    log_probs = LogProbabilities(apply, max_labels, dropout, flatten=not config.mesh.sequence)
    if config.loss == "orpo":
        return orpo(LogProbabilities(apply, None, dropout, log_probs.flatten), beta=config.strength)
    if config.loss == "simpo":
        return simpo(log_probs, beta=config.strength, gamma=config.gamma, label_smoothing=config.smoothing)
    if config.loss == "kto":
        return kto(log_probs, beta=config.strength)
    return dpo(
        log_probs,
        beta=config.strength,
        kind=config.loss,
        label_smoothing=config.smoothing,
        length_normalized=config.length_normalized,
    )


def make_measure(config: Config, program: Program, data: Data) -> Measure:
    """Returns the function that computes the log-probabilities of the answers of all held-out records."""
    log_probs = LogProbabilities(program.apply, data.max_labels, flatten=not config.mesh.sequence)
    mesh, batches = program.mesh, data.held_out

    @functools.partial(jax.jit, out_shardings=meshes.replicated(mesh))
    def sums(base: Any, delta: Any, batch: Any) -> tuple[jax.Array, ...]:
        counts_N2 = jnp.sum(batch["labels"] >= 0, axis=-1)
        label_N = batch.get("desirable", jnp.ones(len(counts_N2), bool))
        return jnp.sum(log_probs(base, delta, batch), axis=-1), counts_N2, label_N, batch["index"]

    def measure(base: Any, delta: Any) -> Measured:
        rows = meshes.process_rows(mesh, batches.batch_size)
        iterator = pipeline.iterate(batches, batches.steps_per_epoch, rows=rows)
        results = [sums(base, delta, meshes.put_batch(mesh, batch, batches.batch_size)) for batch in iterator]
        sums_N2, counts_N2, label_N, index_N = (np.concatenate(list(map(np.asarray, one))) for one in zip(*results))
        used = index_N >= 0
        return Measured({_SUMS: sums_N2[used], _COUNTS: counts_N2[used], _LABEL: label_N[used]})

    return measure


def compare(config: Config, before: Values, after: Values) -> tuple[Values, Values]:
    """Returns accuracies and margins of base and adapter, of log-probabilities.

    The implicit reward is the log-ratio of the adapter to the base, times beta. That of the base itself is zero, and
    decides half of all pairs.
    """
    kto = config.loss == "kto"
    values = []
    for one in (before, after):
        sums_N2 = one[_SUMS].astype(np.float64)
        rewards_N2 = config.strength * (sums_N2 - before[_SUMS])
        if kto:  # the first row is the answer, the second one another record's
            signed_N = np.where(one[_LABEL], rewards_N2[:, 0], -rewards_N2[:, 0])
            values.append({"reward has the right sign": _wins(signed_N), "signed reward": signed_N})
            continue
        means_N2 = sums_N2 / one[_COUNTS]
        margin_N, reward_N = sums_N2[:, 0] - sums_N2[:, 1], rewards_N2[:, 0] - rewards_N2[:, 1]
        values.append(
            {
                ACCURACY: _wins(margin_N),
                "… per token": _wins(means_N2[:, 0] - means_N2[:, 1]),
                "chosen answer has the larger reward": _wins(reward_N),
                "margin of log-probabilities": margin_N,
                "margin of rewards": reward_N,
            }
        )
    return values[0], values[1]


def _wins(margins: np.ndarray) -> np.ndarray:
    """Returns 1 for positive margins, 0.5 for ties."""
    return (np.sign(margins) + 1) / 2
