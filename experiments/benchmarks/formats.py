"""What quantizing a real model's weights takes from them: `python -m experiments.benchmarks.formats`.

For each format and block, of all linear layers of an encoder:

  bits      a weight, scales included
  weights   the norm of the difference over the norm of the weight; the mean over matrices
  normal    the same of weights drawn from a normal distribution
  vectors   the same of the sentence vectors that the encoder gives, without any training

Formats with as many bits stand together, the best first. About 3 minutes on 2 CPU cores.
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
from experiments.studies.problem import Problem, answers, load
from lora_jax import paths
from lora_jax.quantization import Format, Quantized

LINEAR = r"(attention|feed_forward)/.*kernel"
FORMATS = (lora.NF4, lora.FP4, lora.Int4, lora.Int8)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "all-MiniLM-L6-v2"
    """The encoder: a directory in Hugging Face layout (BERT), a hub name, or all-MiniLM-L6-v2, which a package
    carries."""
    data: str = "debian_sections"
    """Where the sentences are from; see the quickstart."""
    sentences: int = 500
    """How many of the validation split."""
    lengths: tuple[int, ...] = (10, 14, 20, 40)
    """The lengths, in tokens, that sentences are padded to; longer ones are cut to the last."""
    blocks: tuple[int, ...] = (32, 64, 128, 384)
    """Weights that share a scale."""

    def __post_init__(self) -> None:
        settings.positive(self, "sentences")
        settings.lengths(self)
        for block in self.blocks:
            lora.NF4(block)  # says what a block is


@dataclasses.dataclass(frozen=True)
class Row:
    """One format; errors are relative norms."""

    name: str
    bits: float
    weights: float
    normal: float
    vectors: float


def measure(problem: Problem, form: Format, exact: np.ndarray) -> Row:
    """One format's errors."""
    quantized = problem.quantized(problem.base, {LINEAR: form})
    before, after = (paths.flatten(tree).as_dict() for tree in (problem.base, quantized))
    leaves = {path: leaf for path, leaf in after.items() if isinstance(leaf, Quantized)}
    errors = [relative(leaf.dequantize(), before[path]) for path, leaf in leaves.items()]
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
    """The sentence vectors of the validation split."""
    adapted = jax.jit(lora.adapt(problem.apply))
    return answers(lambda *inputs: adapted(base, {}, *inputs)[1], problem.splits["validation"], problem.lengths)


def relative(found: Any, exact: Any) -> float:
    """The norm of the difference over the norm of what is exact."""
    return float(jnp.linalg.norm(jnp.asarray(found) - exact) / jnp.linalg.norm(jnp.asarray(exact)))


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
