"""Rewards of sampled answers: GRPO, and the mean reward on held-out problems."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments.configs.grpo import Config
from experiments.objectives.grpo import advantages, grpo
from experiments.objectives.log_probabilities import LogProbabilities, Loss
from experiments.studies.decoder.program import Objective, Program
from experiments.studies.post_training import study
from experiments.studies.post_training.data import Data
from experiments.studies.post_training.report import Report
from experiments.studies.post_training.sampling import Rewards, Sampler, gather_prompts
from experiments.studies.post_training.task import Aim, Measure, Measured, Step, Task
from experiments.training import mesh as meshes

REWARD = "reward"
_SAMPLED = 4  # answers to each held-out problem


def run(config: Config) -> Report:
    """Runs or resumes the study; see :func:`study.run`."""
    task = Task(
        config.form,
        make_objective,
        make_measure,
        Aim(REWARD, None),
        REWARD,
        make_step,
        new_tokens=lambda config: config.new_tokens,
    )
    return study.run(config, task)


def make_objective(config: Config, data: Data) -> Objective:
    """Returns the objective of a config."""
    rows = config.batch_size * config.group
    array = jax.ShapeDtypeStruct((rows, config.row_length), jnp.int32)
    batch = dict.fromkeys(("tokens", "segments", "labels"), array)
    batch["advantages"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return Objective(functools.partial(_loss, config=config), batch)


def _loss(apply: Callable, dropout: bool, config: Config) -> Loss:
    log_probs = LogProbabilities(apply, config.new_tokens, dropout, flatten=not config.mesh.sequence)
    if config.form == "dapo":
        return grpo(log_probs, clip_high=0.28, normalize="tokens", beta=config.beta)
    if config.form == "dr-grpo":
        return grpo(log_probs, normalize="constant", max_tokens=config.new_tokens, beta=config.beta)
    return grpo(log_probs, beta=config.beta)


def make_step(config: Config, program: Program, data: Data) -> Step:
    """Returns the step of the training loop: it samples answers to a batch of prompts, and trains on their rewards."""
    sampler = Sampler(program, data.decode, data.ends, config.new_tokens, config.temperature)
    rewards, key = Rewards(data.problems, config.reward), jax.random.key(config.seed + 1)
    scale = "none" if config.form == "dr-grpo" else "group"

    def step(state: lora.TrainState, batch: Mapping[str, Any]) -> tuple[lora.TrainState, dict[str, Any]]:
        tokens, mask, index = gather_prompts(batch)
        key_of_step = jax.random.fold_in(key, int(state.step))
        rows, texts = sampler(key_of_step, state.base.base, state.delta, tokens, mask, config.group)
        rewards_PG = rewards(texts, index)
        rows["advantages"] = np.asarray(advantages(jnp.asarray(rewards_PG), scale=scale)).reshape(-1)
        state, metrics = program.step(state, meshes.put_rows(program.mesh, rows))
        return state, metrics | {"means": {REWARD: float(rewards_PG[index >= 0].mean())}}

    return step


def make_measure(config: Config, program: Program, data: Data) -> Measure:
    """Returns the function that samples answers to all held-out problems and returns their mean rewards."""
    sampler = Sampler(program, data.decode, data.ends, config.new_tokens, config.temperature)
    rewards, key = Rewards(data.records, config.reward), jax.random.key(config.seed + 2)

    def measure(base: Any, delta: Any) -> Measured:
        means, texts = [], []
        for step in range(data.held_out.steps_per_epoch):
            tokens, mask, index = gather_prompts(data.held_out.rows(step, slice(None)))
            _, groups = sampler(jax.random.fold_in(key, step), base, delta, tokens, mask, _SAMPLED)
            used = index >= 0
            means.append(rewards(groups, index)[used].mean(axis=1))
            prompts = [data.decode(row[part].tolist()).strip() for row, part in zip(tokens[used], mask[used])]
            texts += [(prompt, answers[0]) for prompt, answers in zip(prompts, groups)]
        return Measured({REWARD: np.concatenate(means)}, texts[: config.samples])

    return measure
