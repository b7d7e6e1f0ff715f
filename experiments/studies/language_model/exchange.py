"""The trained adapter merged, written, read back; and by how much what it then computes differs."""

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
    """Writes `merged/`, a checkpoint that transformers opens, and `peft/`, an adapter that PEFT opens; reads both.

    Args:
      problem: What was learned.
      delta: The adapter.
      directory: Where both go; what an interrupted run left of them is replaced.
      step: Of generation, from parameters that nothing adapts.
      generated: What base and adapter write after each prompt.
      base_model: What PEFT is told the base is.
    """
    merged = lora.merge(problem.base, delta)
    outputs.clear(directory, MERGED)
    config = checkpoint.read_config(problem.directory)
    # both spellings, of older transformers and of newer ones
    config |= {name: "float32" for name in ("dtype", "torch_dtype") if name in config}
    checkpoint.save(directory / MERGED, merged, problem.names, config, tokenizer=problem.directory)
    lora.peft.save(directory / PEFT, delta, problem.names, base_model=base_model, task_type="CAUSAL_LM")

    reread = problem.reload(directory / MERGED)
    reloaded = lora.peft.load(directory / PEFT, problem.base, problem.names)
    plain, adapted = jax.jit(problem.apply), jax.jit(lora.adapt(problem.apply))
    again = samples.generate(problem, step, merged, generated.shape[1])
    written = generated >= 0
    apart: dict[str, float] = dict.fromkeys(("merged", "checkpoint", "adapter"), 0.0)
    largest = 0.0
    for batch in problem.batches("test"):
        tokens, real = batch["tokens"], batch["mask"]
        logits = np.asarray(adapted(problem.base, delta, tokens))[real]
        others = {
            "merged": plain(merged, tokens),
            "checkpoint": plain(reread, tokens),
            "adapter": adapted(problem.base, reloaded, tokens),
        }
        for name, other in others.items():
            apart[name] = max(apart[name], float(np.abs(np.asarray(other)[real] - logits).max()))
        largest = max(largest, float(np.abs(logits).max()))
    logits = f"logits, {largest:.1f} at most"
    return [
        Agreement("merged weights", "tokens after the prompts", *_equal([generated[written]], [again[written]])),
        Agreement("merged weights", logits, difference=apart["merged"]),
        Agreement("merged checkpoint, reloaded", "weights", *_equal(*map(jax.tree.leaves, (merged, reread)))),
        Agreement("merged checkpoint, reloaded", logits, difference=apart["checkpoint"]),
        Agreement("PEFT adapter, reloaded", "its arrays", *_equal(*_arrays(delta, reloaded))),
        Agreement("PEFT adapter, reloaded", logits, difference=apart["adapter"]),
    ]


def _arrays(one: dict[str, Any], other: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The leaves of two deltas, path by path."""
    if one.keys() != other.keys():
        raise ValueError(f"the adapters hold different paths: {sorted(one.keys() ^ other.keys())}")
    return [x for path in one for x in jax.tree.leaves(one[path])], [
        x for path in one for x in jax.tree.leaves(other[path])
    ]


def _equal(some: list[Any], others: list[Any]) -> tuple[int, int]:
    """How many numbers of two lists of arrays are the same bits, and how many there are."""
    pairs = [(np.asarray(one), np.asarray(other)) for one, other in zip(some, others, strict=True)]
    return sum(int(np.sum(one == other)) for one, other in pairs), sum(one.size for one, _ in pairs)
