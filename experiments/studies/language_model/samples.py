"""Texts that a model writes after each prompt."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import generation
from experiments.studies.language_model.problem import Problem
from experiments.tasks.continuations import encode_prompts


def generate(problem: Problem, step: generation.Step, params: Any, new_tokens: int) -> np.ndarray:
    """The likeliest tokens after every prompt, `int32[prompts, new_tokens]`; -1 behind a text's end.

    Args:
      problem: Has the prompts.
      step: See :func:`experiments.generation.make_step`.
      params: What it is given first.
      new_tokens: The most tokens to add.
    """
    tokens, mask = encode_prompts(problem.tokenizer, problem.prompts, problem.end)
    cache = problem.model.cache(len(tokens), tokens.shape[1] + new_tokens)
    found = generation.greedy(
        step,
        params,
        jnp.asarray(tokens),
        jnp.asarray(mask),
        cache=cache,
        new_tokens=new_tokens,
        eos=problem.ends,
        pad=problem.end or 0,
    )
    found = np.array(found)
    ended = np.isin(found, problem.ends)
    return np.where(np.cumsum(ended, axis=1) - ended > 0, -1, found)


def texts(problem: Problem, generated: np.ndarray) -> list[str]:
    """What was generated, without the tokens that end it."""
    return problem.tokenizer.decode_batch([row[row >= 0].tolist() for row in generated], skip_special_tokens=True)
