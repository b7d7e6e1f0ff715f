"""Measures the errors and the times of quantized weights: `python -m experiments.benchmarks.formats`.

For each format and block size, for all linear layers of an encoder:

  bits      bits per weight, including scales
  weights   the norm of the difference divided by the norm of the weight; the mean over matrices
  normal    the same for weights from a normal distribution
  vectors   the same for the encoder's sentence vectors, without training

Formats are sorted by bits, then by error; those of GGUF files, whose blocks have a fixed size, come last. Then follow
times relative to those of NF4 with double quantization in the same process:

  dequantize   the time of dequantizing a weight of 768 × 2,048: the median of alternating runs, and the minimum
  step         the same for the gradient of an adapter of that weight on 64 tokens, in which it is dequantized twice

Takes about 4 minutes on 2 CPU cores.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments import flags, settings, startup
from experiments.errors import UserError
from experiments.models.weights import flatten_weights, is_quantized
from experiments.studies.problem import Problem, answers, load
from lora_jax.quantization import Format, from_gguf

LINEAR = r"(attention|feed_forward)/.*kernel"
FORMATS = (lora.NF4, lora.FP4, lora.Int4, lora.Int8)
ENCODED = (lora.Q4_0(), lora.Q4_1(), lora.Q5_0(), lora.Q5_1(), lora.Q8_0())
"""The formats of GGUF files that weights can be quantized into."""
STORED = (*ENCODED, lora.Q4_K(), lora.Q5_K(), lora.Q6_K())
INPUTS, OUTPUTS, TOKENS = 768, 2048, 64
"""The shape of the weight that is timed, and the number of its inputs."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The formats and the model to measure."""

    model: str = "all-MiniLM-L6-v2"
    """The encoder: a directory in Hugging Face layout (BERT), a name on the Hugging Face Hub, or all-MiniLM-L6-v2,
    which is in an installed package."""
    data: str = "debian_sections"
    """The data; see the quickstart."""
    sentences: int = 500
    """Number of sentences of the validation split."""
    lengths: tuple[int, ...] = (10, 14, 20, 40)
    """The lengths, in tokens, that sentences are padded to. Longer sentences are truncated."""
    blocks: tuple[int, ...] = (32, 64, 128, 384)
    """Numbers of weights that share a scale."""
    repeats: int = 30
    """Number of runs of each format whose median time is reported."""

    def __post_init__(self) -> None:
        settings.positive(self, "sentences", "repeats")
        settings.lengths(self)
        for block in self.blocks:
            lora.NF4(block)  # validates the block


@dataclasses.dataclass(frozen=True)
class Row:
    """The bits and relative errors of a format."""

    name: str
    bits: float
    weights: float
    normal: float
    vectors: float

    def __str__(self) -> str:
        return f"{self.name:26}{self.bits:8.3f}{self.weights:10.4f}{self.normal:10.4f}{self.vectors:10.4f}"


def measure(problem: Problem, form: Format, exact: np.ndarray) -> Row:
    """Measures a format."""
    quantized = problem.quantize(problem.base, {LINEAR: form})
    base_leaves, quantized_base_leaves = (flatten_weights(tree) for tree in (problem.base, quantized))
    leaves = {path: leaf for path, leaf in quantized_base_leaves.items() if is_quantized(leaf)}
    errors = [relative(leaf.dequantize(), base_leaves[path]) for path, leaf in leaves.items()]
    drawn = jax.random.normal(jax.random.key(0), (form.block * 16, 1024))
    normal = lora.quantize({"w": drawn}, {"w": dataclasses.replace(form, axes=("in", "out"))})["w"]
    return Row(
        name=f"{form.name}{', double' if form.double else ''}, block {form.block}",
        bits=8.0 * sum(leaf.nbytes for leaf in leaves.values()) / sum(leaf.size for leaf in leaves.values()),
        weights=float(np.mean(errors)),
        normal=relative(normal.dequantize(), drawn),
        vectors=relative(vectors(problem, quantized), exact),
    )


def vectors(problem: Problem, base: Any) -> np.ndarray:
    """Returns the sentence vectors of the validation split."""
    adapted = jax.jit(lora.adapt(problem.apply))
    return answers(lambda *inputs: adapted(base, {}, *inputs)[1], problem.splits["validation"], problem.lengths)


def relative(value: Any, exact: Any) -> float:
    """Returns the norm of the difference divided by the norm of the exact value."""
    return float(jnp.linalg.norm(jnp.asarray(value) - exact) / jnp.linalg.norm(jnp.asarray(exact)))


def time_formats(repeats: int) -> dict[str, np.ndarray]:
    """Returns, by the name of the format, median and minimum of dequantizing and the same of a step, in seconds."""
    weight = jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS))
    x = jax.random.normal(jax.random.key(1), (TOKENS, INPUTS))
    leaves = {"NF4, double": lora.quantize({"w": weight}, {"w": lora.NF4(axes=("in", "out"))})["w"]}
    for form in STORED:  # times do not depend on the codes
        blocks = np.zeros((OUTPUTS, INPUTS // form.block * form.block_bytes), np.uint8)
        leaves[form.name] = from_gguf(blocks, form.name)
    delta = lora.init(jax.random.key(2), {"w": weight}, {"w": lora.LoRA(8, axes=("in", "out"))})
    adapted = lora.adapt(lambda base, x: jnp.tanh(x @ base["w"]))

    @jax.jit
    def step(leaf: Any, delta: Any, x: jax.Array) -> Any:
        return jax.grad(lambda delta, x: jnp.sum(adapted({"w": leaf}, delta, x)), (0, 1))(delta, x)

    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, leaf in leaves.items():
        runs[name, "dequantize"] = leaf.dequantize
        runs[name, "step"] = functools.partial(step, leaf, delta, x)
    seconds: dict[tuple[str, str], list[float]] = {run: [] for run in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for key, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[key].append(time.perf_counter() - start)
    return {
        name: np.array(
            [statistic(seconds[name, task]) for task in ("dequantize", "step") for statistic in (np.median, np.min)]
        )
        for name in leaves
    }


def main(config: Config) -> int:
    """Measures, prints, and returns the exit status."""
    limits: dict[str, int | None] = {"train": 1, "validation": config.sentences, "test": 1}
    try:
        problem = load(config.model, config.data, limits, config.lengths, report=print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    exact = vectors(problem, problem.base)
    print(f"\n{'':26}{'bits':>8}{'weights':>10}{'normal':>10}{'vectors':>10}")
    for block in config.blocks:
        kinds = [form(block, double) for form in FORMATS for double in (True, False)]
        rows = [measure(problem, form, exact) for form in kinds]
        for row in sorted(rows, key=lambda row: (round(row.bits), row.weights)):
            print(row)
        print()
    for form in ENCODED:
        print(measure(problem, form, exact))
    times = time_formats(config.repeats)
    print(f"\n{'':26}{'dequantize':>12}{'minimum':>10}{'step':>10}{'minimum':>10}")
    for name, seconds in times.items():
        print(f"{name:26}{{:12.2f}}{{:10.2f}}{{:10.2f}}{{:10.2f}}".format(*seconds / times["NF4, double"]))
    return 0


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.formats"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
