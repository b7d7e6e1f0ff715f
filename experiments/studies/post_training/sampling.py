"""Answers that are sampled in training and on held-out problems, and their rewards."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax as lora
from experiments import generation
from experiments.evaluation.rewards import RewardName, reward
from experiments.input.records import Problem
from experiments.input.sources import Records
from experiments.models.options import Options
from experiments.objectives.rollouts import join_answers, sample_group
from experiments.studies.decoder.program import Program
from experiments.training import mesh as meshes

Rows = dict[str, np.ndarray]
"""A batch of prompts with answers; see :func:`experiments.objectives.rollouts.rollouts`."""


class Sampler:
    """Samples answers. Every process computes all of them.

    Args:
      program: The program, whose mesh holds the weights.
      decode: Returns the text of tokens.
      ends: The tokens that end an answer.
      new_tokens: Maximum number of tokens per answer.
      temperature: The temperature of sampling.
    """

    def __init__(
        self,
        program: Program,
        decode: Callable[[list[int]], str],
        ends: tuple[int, ...],
        new_tokens: int,
        temperature: float,
    ):
        self._decode, self.ends, self.pad = decode, ends, ends[0] if ends else 0
        self._new_tokens, self._temperature = new_tokens, temperature
        # A batch is not sharded; only the weights are.
        options = Options(scan=program.model.options.scan, dtype=jnp.dtype(program.config.dtype))
        self._model = nnx.eval_shape(lambda: program.family.build(program.shape, options, rngs=nnx.Rngs(0)))
        self._step = generation.make_step(lora.adapt(lora.nnx.functional(self._model)[0]))

    def __call__(
        self, key: jax.Array, base: Any, delta: Any, tokens: np.ndarray, mask: np.ndarray, group: int, shared: int = 0
    ) -> tuple[Rows, list[list[str]]]:
        """Returns the prompts with answers, `[prompts * group, …]`, and the texts of the answers to each prompt.

        A row of the mask without tokens is one of the last batch that holds no prompt; its answer has no labels. The
        `shared` tokens with which all prompts begin are read once.
        """
        has_prompt = np.any(mask, axis=1, keepdims=True)
        tokens, mask = (np.where(has_prompt, array, array[:1]) for array in (tokens, mask))
        params = base, delta
        with jax.default_device(jax.local_devices()[0]):
            slots = tokens.shape[1] + self._new_tokens
            cache = jax.tree.map(np.asarray, self._model.cache(1 if shared else len(tokens), slots))
        if shared:
            begin = jnp.asarray(tokens[:1, :shared])
            cache = generation.prefill(self._step, params, begin, cache=cache, copies=len(tokens))
        new = sample_group(
            key,
            self._step,
            params,
            jnp.asarray(tokens[:, shared:]),
            jnp.asarray(mask[:, shared:]),
            cache=cache,
            group=group,
            new_tokens=self._new_tokens,
            eos=self.ends,
            pad=self.pad,
            temperature=self._temperature,
        )
        tokens_BL, mask_BL = (jnp.asarray(np.repeat(array, group, axis=0)) for array in (tokens, mask))
        sampled = join_answers(tokens_BL, mask_BL, meshes.gather(new), self.ends, self.pad)
        rows = {name: np.asarray(array) for name, array in sampled.items()}
        rows["labels"] = np.where(np.repeat(has_prompt, group, axis=0), rows["labels"], -1)
        first = tokens.shape[1]
        texts = [
            self._decode(row[first:][part[first:] > 0].tolist()).strip()
            for row, part in zip(rows["tokens"], rows["segments"])
        ]
        return rows, [texts[start : start + group] for start in range(0, len(texts), group)]


def gather_prompts(batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tokens, masks and indices of all prompts of a batch on every process."""
    arrays = {name: meshes.gather(jnp.asarray(batch[name])) for name in ("tokens", "segments", "index")}
    return arrays["tokens"], arrays["segments"] > 0, arrays["index"]


class Rewards:
    """The rewards of answers to problems.

    Args:
      problems: The problems.
      rule: What earns a reward.
    """

    def __init__(self, problems: Records, rule: RewardName):
        self._answers = [problem.answer for problem in problems if isinstance(problem, Problem)]
        self._choices, self._rule = frozenset(self._answers), rule

    def __call__(self, groups: list[list[str]], index: np.ndarray) -> np.ndarray:
        """Returns the rewards of the answers to each problem, `float32[prompts, group]`; 0 without a problem."""
        rewards = np.zeros((len(groups), len(groups[0])), np.float32)
        for row, (texts, number) in enumerate(zip(groups, index.tolist())):
            if number >= 0:
                answer = self._answers[number]
                rewards[row] = [reward(text, answer, self._rule, self._choices) for text in texts]
        return rewards
