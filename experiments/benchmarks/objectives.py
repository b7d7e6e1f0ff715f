"""What the log-probabilities of a DPO step add to its memory on a TPU v5p, and the rounding of its reference.

`python -m experiments.benchmarks.objectives`

The step of Llama-3-8B's shape on 8 pairs of 1,024 tokens is compiled for one chip, without a TPU (extra `tpu`), in
three forms: log-probabilities in chunks, from whole logits, and without a head. Then the shipped tiny Llama computes
log-probabilities in bfloat16: by two compilations of the base, and by a fresh adapter and the base in one program.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments import startup
from experiments.aot import topology
from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.models import families, location
from experiments.models.options import Options
from experiments.objectives.dpo import dpo
from experiments.objectives.log_probabilities import Batch, LogProbabilities, LogProbs
from experiments.objectives.reference import log_ratios
from experiments.studies.sft import program
from experiments.training import mesh as meshes

PAIRS, LENGTH = 8, 1024


def main(args: Sequence[str] | None = None) -> int:
    """Prints both tables; returns 0, or 2 for errors of the user."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="Meta-Llama-3-8B", help="a model of which the shape is shipped")
    parser.add_argument("--chunk", type=int, default=32, help="tokens per row whose logits exist at a time")
    options = parser.parse_args(args)
    try:
        print_memory(options.model, options.chunk)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_rounding()
    return 0


def print_memory(model: str, chunk: int) -> None:
    """Prints the temporaries of the three steps in GB, and the ratio of what the log-probabilities add."""
    device = topology.describe("v5p:2x2x1").devices[0]
    config = Config(
        model=model,
        dtype="bfloat16",
        length=LENGTH,
        batch=BatchSizes(2 * PAIRS),
        remat="full",
        loss_chunk=chunk,
    )
    parts = program.abstract(config, [device], "tpu")
    forms = {
        "no head": with_readout(parts.apply, lambda head, x, labels: jnp.mean(x.astype(jnp.float32), axis=-1)),
        "log-probabilities in chunks": LogProbabilities(parts.apply),
        "whole logits": with_readout(parts.apply, from_logits),
    }
    used = {}
    print(f"{model}, {PAIRS} pairs of {LENGTH:,} tokens, one v5p chip\n\n| | temporaries, GB | more than no head |")
    print("|---|---|---|")
    for name, log_probs in forms.items():
        used[name] = temporaries(parts, log_probs) / 1e9
        print(f"| {name} | {used[name]:.3f} | {used[name] - used['no head']:.3f} |", flush=True)
    first, chunks, whole = used.values()
    print(f"\nratio: {(chunks - first) / (whole - first):.3f} (at most 0.2)\n", flush=True)


def temporaries(parts: program.Program, log_probs: LogProbs) -> int:
    """Returns the bytes of temporaries of a DPO step."""
    array = jax.ShapeDtypeStruct((PAIRS, 2, LENGTH), jnp.int32, sharding=meshes.batch_sharding(parts.mesh))
    step = lora.train_step(dpo(log_probs), parts.tx, has_aux=True)
    with jax.set_mesh(parts.mesh):
        lowered = step.lower(parts.state(), {"tokens": array, "labels": array})
        return lowered.compile().memory_analysis().temp_size_in_bytes


def with_readout(apply: Callable, readout: Callable) -> LogProbs:
    """Returns a function like `LogProbabilities` of values that are read from the head's input, or from its logits."""
    adapted = lora.adapt(apply)

    def log_probs(base: Any, delta: Any, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        tokens_BL, labels_BL = (batch[name].reshape(-1, LENGTH) for name in ("tokens", "labels"))
        values = adapted(base, delta, tokens_BL, readout=lambda head, x: readout(head, x, labels_BL))
        return values.reshape(batch["labels"].shape)

    return log_probs


def from_logits(head: Callable, x_BLD: jax.Array, labels_BL: jax.Array) -> jax.Array:
    """Returns log-probabilities from the logits of all tokens at once."""
    logp_BLV = jax.nn.log_softmax(head(x_BLD).astype(jnp.float32), axis=-1)
    picked_BL = jnp.take_along_axis(logp_BLV, jnp.maximum(labels_BL, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels_BL >= 0, picked_BL, 0)


def print_rounding() -> None:
    """Prints the largest differences of log-probabilities at the first step, by dtype."""
    print("| tiny-llama | two compilations of the base | LoRA and the base | DoRA and the base |\n|---|---|---|---|")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 2, 33)), jnp.int32)
    batch = {"tokens": tokens[..., :-1], "labels": tokens[..., 1:]}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = families.LLAMA.load(location.find("tiny-llama"), Options(dtype=dtype, scan=True))
        apply, base = lora.nnx.functional(model)
        log_probs = LogProbabilities(apply)
        lowered = jax.jit(lambda base, batch, log_probs=log_probs: log_probs(base, {}, batch)).lower(base, batch)
        # With excess precision, XLA leaves out roundings to bfloat16 between operations that it fuses.
        one, other = (
            lowered.compile(compiler_options={"xla_allow_excess_precision": excess})(base, batch)
            for excess in (True, False)
        )
        differences = [one - other]
        for recipe in (lora.LoRA(8), lora.DoRA(8)):
            delta = lora.init(jax.random.key(0), base, lora.all_linear(recipe), apply, batch["tokens"][0])
            ratios = jax.jit(lambda base, delta, log_probs=log_probs: log_ratios(log_probs, base, delta, batch, None))
            differences.append(ratios(base, delta))
        numbers = " | ".join(f"{float(jnp.max(jnp.abs(difference))):.1e}" for difference in differences)
        print(f"| {jnp.dtype(dtype).name} | {numbers} |", flush=True)


if __name__ == "__main__":
    sys.exit(startup.run("python -m experiments.benchmarks.objectives", main))
