"""Distillation of an instruction, and the share of its gain that the adapter has without it."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments import user_cache
from experiments.configs.distill import Config
from experiments.errors import UserError
from experiments.input import sources
from experiments.input.records import Problem
from experiments.input.sources import Records
from experiments.input.tokenized import Tokenized, tokenize
from experiments.objectives.distillation import distillation
from experiments.objectives.log_probabilities import Loss
from experiments.objectives.rollouts import join_answers
from experiments.studies.decoder.choices import longest_sequence
from experiments.studies.decoder.program import Objective, Program, read_description
from experiments.studies.post_training import study
from experiments.studies.post_training.data import Data
from experiments.studies.post_training.instructed import InstructedEncoder, Prompts
from experiments.studies.post_training.report import Report
from experiments.studies.post_training.sampling import Rewards, Rows, Sampler, gather_prompts
from experiments.studies.post_training.task import Aim, Measure, Measured, Step, Task, Values
from experiments.training import mesh as meshes

REWARD, INSTRUCTED, SHARE = "reward", "reward with the instruction", "share of the instruction's gain"
_SAMPLED = 4  # answers to each held-out problem


def run(config: Config) -> Report:
    """Runs or resumes the study; see :func:`study.run`."""
    task = Task(
        "distill",
        make_objective,
        make_measure,
        Aim(SHARE, 0.8),
        "agreement",
        make_step,
        compare=compare,
        new_tokens=lambda config: config.new_tokens,
    )
    return study.run(config, task)


def make_objective(config: Config, data: Data) -> Objective:
    """Returns the objective of a config."""
    array = jax.ShapeDtypeStruct((config.batch_size, config.row_length), jnp.int32)
    longest = Prompts(_instructed(config, data, data.problems)).length + config.new_tokens
    other = jax.ShapeDtypeStruct((config.batch_size, longest), jnp.int32)
    names = ("tokens", "segments", "labels")
    batch = dict.fromkeys(names, array) | dict.fromkeys((f"teacher_{name}" for name in names), other)
    return Objective(functools.partial(_loss, config=config), batch)


def _loss(apply: Callable, dropout: bool, config: Config) -> Loss:
    return distillation(apply, mix=config.mix, max_labels=config.new_tokens, dropout=dropout)


def make_step(config: Config, program: Program, data: Data) -> Step:
    """Returns the step of the training loop: it samples answers, for whose tokens the adapter learns distributions."""
    sampler = Sampler(program, data.decode, data.ends, config.new_tokens, config.temperature)
    instructed = Prompts(_instructed(config, data, data.problems))
    key = jax.random.key(config.seed + 1)

    def step(state: lora.TrainState, batch: Mapping[str, Any]) -> tuple[lora.TrainState, dict[str, Any]]:
        tokens, mask, index = gather_prompts(batch)
        frozen, key_of_step = state.base, jax.random.fold_in(key, int(state.step))
        prompts = {"": (tokens, mask), "teacher_": instructed.rows(index)}
        asked = "" if config.on_policy else "teacher_"
        delta = state.delta if config.on_policy else frozen.reference
        shared = 0 if config.on_policy else instructed.shared
        rows, _ = sampler(key_of_step, frozen.base, delta, *prompts[asked], 1, shared)
        new = rows["tokens"][:, prompts[asked][0].shape[1] :]
        joined: Rows = {}
        for prefix, (prompt, part) in prompts.items():
            one = join_answers(jnp.asarray(prompt), jnp.asarray(part), jnp.asarray(new), sampler.ends, sampler.pad)
            joined |= {f"{prefix}{name}": np.asarray(array) for name, array in one.items()}
        for name in ("labels", "teacher_labels"):
            joined[name] = np.where(index[:, None] < 0, -1, joined[name])
        return program.step(state, meshes.put_rows(program.mesh, joined))

    return step


def make_measure(config: Config, program: Program, data: Data) -> Measure:
    """Returns the function that samples answers to all held-out problems, and rewards those of model and teacher."""
    sampler = Sampler(program, data.decode, data.ends, config.new_tokens, config.temperature)
    rewards, key = Rewards(data.records, config.reward), jax.random.key(config.seed + 2)
    instructed = Prompts(_instructed(config, data, data.records))
    teacher: list[np.ndarray] = []

    def measure(base: Any, delta: Any) -> Measured:
        means, others, texts = [], [], []
        for step in range(data.held_out.steps_per_epoch):
            tokens, mask, index = gather_prompts(data.held_out.rows(step, slice(None)))
            key_of_step, used = jax.random.fold_in(key, step), index >= 0
            _, groups = sampler(key_of_step, base, delta, tokens, mask, _SAMPLED)
            means.append(rewards(groups, index)[used].mean(axis=1))
            if not teacher:  # the first model that is measured is the reference
                prompts = instructed.rows(index)
                _, answers = sampler(key_of_step, base, delta, *prompts, _SAMPLED, instructed.shared)
                others.append(rewards(answers, index)[used].mean(axis=1))
            prompts = [data.decode(row[part].tolist()).strip() for row, part in zip(tokens[used], mask[used])]
            texts += [(prompt, answers[0]) for prompt, answers in zip(prompts, groups)]
        if not teacher:
            teacher.append(np.concatenate(others))
        return Measured({REWARD: np.concatenate(means), INSTRUCTED: teacher[0]}, texts[: config.samples])

    return measure


def compare(config: Config, before: Values, after: Values) -> tuple[Values, Values]:
    """Returns rewards, and the share of the instruction's gain: 0 for the base, 1 for the base with the instruction."""
    start = before[REWARD].mean()
    gain = before[INSTRUCTED].mean() - start
    shares = [np.full(len(one[REWARD]), np.nan) for one in (before, after)]  # without a gain
    if gain > 0:
        shares = [(one[REWARD] - start) / gain for one in (before, after)]
    return {**before, SHARE: shares[0]}, {**after, SHARE: shares[1]}


def _instructed(config: Config, data: Data, records: Records) -> Tokenized:
    """Returns the tokenized prompts of records with the instruction and examples.

    Raises:
      UserError: With an answer, the longest of them is longer than the model supports.
    """
    first = sources.first(data.problems, min(config.examples, len(data.problems)))
    examples = tuple(record for record in first if isinstance(record, Problem))
    encoder = InstructedEncoder(data.encoder, config.instruction, examples)
    tokens = tokenize(records, encoder, user_cache.directory("tokens"), on_bad=config.on_bad)
    longest = longest_sequence(read_description(config.model))
    length = int(tokens.lengths.max()) + config.new_tokens
    if longest is not None and length > longest:
        raise UserError(
            f"the prompts of the teacher with {config.examples} examples and an answer have up to {length:,} tokens, "
            f"{config.model} supports {longest:,}; set fewer --examples or a shorter --instruction"
        )
    return tokens
