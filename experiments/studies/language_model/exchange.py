"""Merges, exports and reloads a trained adapter, and compares the outputs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lora
from experiments import generation
from experiments.models import checkpoint
from experiments.reports.agreement import Agreement
from experiments.studies.language_model import samples
from experiments.studies.language_model.problem import Problem
from experiments.training import outputs

MERGED, PEFT = "merged", "peft"


def run(
    problem: Problem,
    delta: dict[str, Any],
    directory: Path,
    *,
    step: generation.Step,
    generated: np.ndarray,
    base_model: str,
) -> list[Agreement]:
    """Writes and reloads `merged/`, a checkpoint for transformers, and `peft/`, an adapter for PEFT.

    Args:
      problem: The model and the task.
      delta: The adapter.
      directory: The directory of both. Files of an interrupted run are replaced.
      step: The generation step of parameters without an adapter.
      generated: The tokens that base and adapter generate for each prompt.
      base_model: The name of the base, for PEFT.

    Returns:
      Comparisons with base and adapter.
    """
    merged = lora.merge(problem.base, delta)
    outputs.clear(directory, MERGED)
    config = checkpoint.read_config(problem.directory)
    # The names in newer and older versions of transformers.
    config |= {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    checkpoint.save(directory / MERGED, merged, problem.names, config, tokenizer=problem.directory)
    lora.peft.save(directory / PEFT, delta, problem.names, base_model=base_model, task_type="CAUSAL_LM")

    reread = problem.reload(directory / MERGED)
    reloaded = lora.peft.load(directory / PEFT, problem.base, problem.names)
    plain, adapted = jax.jit(problem.apply), jax.jit(lora.adapt(problem.apply))
    merged_tokens = samples.generate(problem, step, merged, generated.shape[1])
    valid = generated >= 0
    differences: dict[str, float] = dict.fromkeys(("merged", "checkpoint", "adapter"), 0.0)
    largest = 0.0
    for batch in problem.batches("test"):
        tokens, mask = batch["tokens"], batch["mask"]
        logits = np.asarray(adapted(problem.base, delta, tokens))[mask]
        others = {
            "merged": plain(merged, tokens),
            "checkpoint": plain(reread, tokens),
            "adapter": adapted(problem.base, reloaded, tokens),
        }
        for name, array in others.items():
            differences[name] = max(differences[name], float(np.abs(np.asarray(array)[mask] - logits).max()))
        largest = max(largest, float(np.abs(logits).max()))
    logits = f"logits (largest {largest:.1f})"
    return [
        Agreement("merged weights", "tokens after the prompts", *_equal([generated[valid]], [merged_tokens[valid]])),
        Agreement("merged weights", logits, difference=differences["merged"]),
        Agreement("merged checkpoint, reloaded", "weights", *_equal(*map(jax.tree.leaves, (merged, reread)))),
        Agreement("merged checkpoint, reloaded", logits, difference=differences["checkpoint"]),
        Agreement("PEFT adapter, reloaded", "arrays", *_equal(*_arrays(delta, reloaded))),
        Agreement("PEFT adapter, reloaded", logits, difference=differences["adapter"]),
    ]


def _arrays(delta: dict[str, Any], other: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Returns the leaves of two deltas in the order of their paths."""
    if delta.keys() != other.keys():
        raise ValueError(f"the adapters hold different paths: {sorted(delta.keys() ^ other.keys())}")
    leaves = [[leaf for path in delta for leaf in jax.tree.leaves(tree[path])] for tree in (delta, other)]
    return leaves[0], leaves[1]


def _equal(left: list[Any], right: list[Any]) -> tuple[int, int]:
    """Returns the number of equal values in two lists of arrays, and the number of values."""
    pairs = [(np.asarray(first), np.asarray(second)) for first, second in zip(left, right, strict=True)]
    return sum(int(np.sum(first == second)) for first, second in pairs), sum(first.size for first, _ in pairs)
