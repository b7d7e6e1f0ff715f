"""The accuracy of training in random subspaces by their dimension (Aghajanyan et al., 2020, §3; Li et al., 2018)."""

import math
from dataclasses import dataclass, replace
from functools import partial

import jax

import lora_jax as lora
from experiments.baselines import intrinsic
from experiments.configs.intrinsic import Config
from experiments.errors import UserError
from experiments.studies import intrinsic_dimension
from experiments.studies.comparison import program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.head import Start
from experiments.studies.intrinsic_dimension import PLAIN, SAID
from experiments.studies.problem import Problem

_MOVED = "/layers/|^classifier/"


@dataclass(frozen=True)
class InSubspace:
    """Moves layers and head within a random subspace.

    Attributes:
      dimension: The number of coordinates.
      layers: Whether each layer has a trained scale, which counts as a coordinate.
    """

    dimension: int
    layers: bool

    def __call__(self, start: Start, seed: int) -> Start:
        key = jax.random.key(seed)
        entry = intrinsic.init(key, start.base, self.dimension, pattern=_MOVED, layers=self.layers)
        problem, added = start.problem, {intrinsic.NAME: entry}
        problem = replace(problem, apply=intrinsic.adapt(problem.apply), base=problem.base | added)
        result = replace(start.result, trained_parameters=0)  # the head moves with the layers
        return replace(start, problem=problem, base=start.base | added, result=result)


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns the head alone, both forms at each dimension, and full fine-tuning.

    Raises:
      UserError: The smallest dimension is too small for the scales of all layers.
    """
    smallest = partial(intrinsic.init, dimension=min(config.dimensions), pattern=_MOVED, layers=True)
    try:
        jax.eval_shape(smallest, jax.random.key(0), problem.base)
    except ValueError as error:
        raise UserError(f"dimensions: {error}") from None
    subspaces = [
        Row(
            f"{form}, d = {dimension:,}",
            {intrinsic.TRAINED: lora.Full()},
            tuple(rate / math.sqrt(dimension) for rate in config.lr),
            series=form,
            position=dimension,
            change=InSubspace(dimension, layers),
        )
        for form, layers in ((SAID, True), (PLAIN, False))
        for dimension in config.dimensions
    ]
    full = Row("full fine-tuning", {"": lora.Full()}, config.full_lr, "full fine-tuning")
    return [Row("head alone", {}, series="head alone", position=0), *subspaces, full]


STUDY = Study(
    claim="A few hundred coordinates of a random subspace are enough for 90 % of full fine-tuning's score",
    source="Aghajanyan et al., 2020 (RoBERTa on MRPC), and Li et al., 2018 (MNIST)",
    rows=rows,
    draw=intrinsic_dimension.draw,
    findings=intrinsic_dimension.findings,
    grid=intrinsic_dimension.grid,
    entries=lambda summaries: {"d90": intrinsic_dimension.d90(summaries)},
    note="From the converged head on, head and layers move within the subspace. d₉₀ is the smallest d whose mean test "
    "accuracy reaches 90 % of full fine-tuning's, or the head's with 90 % of what full fine-tuning gains over it; 0 if "
    "the head alone does.",
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
