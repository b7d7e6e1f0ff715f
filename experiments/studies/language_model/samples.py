"""Generates a text for each prompt."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments import generation
from experiments.studies.language_model.problem import Problem
from experiments.tasks.continuations import encode_prompts


def generate(problem: Problem, step: generation.Step, params: Any, new_tokens: int) -> np.ndarray:
    """Continues every prompt by greedy decoding.

    Args:
      problem: The model and the prompts.
      step: See :func:`experiments.generation.make_step`.
      params: The first argument of `step`.
      new_tokens: Maximum number of tokens to add.

    Returns:
      `int32[prompts, new_tokens]`, -1 after the end of a text.
    """
    tokens, mask = encode_prompts(problem.tokenizer, problem.prompts, problem.end)
    cache = problem.model.cache(len(tokens), tokens.shape[1] + new_tokens)
    result = generation.greedy(
        step,
        params,
        jnp.asarray(tokens),
        jnp.asarray(mask),
        cache=cache,
        new_tokens=new_tokens,
        eos=problem.ends,
        pad=problem.end or 0,
    )
    generated = np.array(result)
    ended = np.isin(generated, problem.ends)
    return np.where(np.cumsum(ended, axis=1) - ended > 0, -1, generated)


def texts(problem: Problem, generated: np.ndarray) -> list[str]:
    """Decodes generated tokens, without the tokens that end a text."""
    return problem.tokenizer.decode_batch([row[row >= 0].tolist() for row in generated], skip_special_tokens=True)
