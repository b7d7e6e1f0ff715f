"""Measures the error of quantizing a model's weights: `python -m experiments.benchmarks.formats`.

For each format and block size, for all linear layers of an encoder:

  bits      bits per weight, including scales
  weights   the norm of the difference divided by the norm of the weight; the mean over matrices
  normal    the same for weights from a normal distribution
  vectors   the same for the encoder's sentence vectors, without training

Formats are sorted by bits, then by error. Takes about 3 minutes on 2 CPU cores.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments import flags, settings, startup
from experiments.errors import UserError
from experiments.models.weights import flatten_weights, is_quantized
from experiments.studies.problem import Problem, answers, load
from lora_jax.quantization import Format

LINEAR = r"(attention|feed_forward)/.*kernel"
FORMATS = (lora.NF4, lora.FP4, lora.Int4, lora.Int8)


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

    def __post_init__(self) -> None:
        settings.positive(self, "sentences")
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
            print(f"{row.name:26}{row.bits:8.3f}{row.weights:10.4f}{row.normal:10.4f}{row.vectors:10.4f}")
        print()
    return 0


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.formats"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
