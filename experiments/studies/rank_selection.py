"""Ranks that differ by weight: AdaLoRA, EVA and truncation, beside uniform LoRA with as many parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optax

import lora_jax as lora
from experiments.baselines.specs import LINEAR
from experiments.configs.rank_selection import Config
from experiments.reports.findings import Finding
from experiments.studies.comparison import figures, program
from experiments.studies.comparison.description import Row, Study, Summary
from experiments.studies.comparison.judge import as_good
from experiments.studies.problem import HEAD, Problem

_PENALTY = 0.1  # the authors' weight of AdaLoRA's penalty
_ALL = 1 - 1e-9


@dataclass(frozen=True)
class Truncation:
    """Truncates adapters by one threshold for the singular values of all of them."""

    energy: float

    def __call__(self, delta: dict[str, Any]) -> dict[str, Any]:
        return lora.truncate(delta, energy=self.energy)


@dataclass(frozen=True)
class Allocation:
    """AdaLoRA's schedule: no pruning in the first tenth of the steps, a fixed selection in the last three tenths."""

    target_rank: int

    def __call__(self, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        return lora.optim.allocate_ranks(
            tx, self.target_rank, steps=steps, warmup=steps // 10, final=steps * 3 // 10, interval=max(1, steps // 50)
        )


def rows(config: Config, problem: Problem) -> list[Row]:
    """Returns uniform LoRA by rank, truncations of the largest rank, AdaLoRA and EVA."""
    largest, target, rates = max(config.ranks), config.target_rank, (config.lr,)

    def spec(recipe: lora.Recipe) -> dict[str, lora.Recipe]:
        return {LINEAR: recipe, HEAD: lora.Full()}

    uniform = [
        Row(f"LoRA, r = {rank}", spec(lora.LoRA(rank, config.alpha)), rates, "uniform LoRA") for rank in config.ranks
    ]
    parent = f"LoRA, r = {largest}"
    truncated = [
        Row(f"{parent}, truncated to {energy:g}", {}, series="truncation", parent=parent, finish=Truncation(energy))
        for energy in config.energies
    ]
    pruned = Row(
        f"AdaLoRA, r = {largest}, with pruned triplets",
        spec(lora.AdaLoRA(largest, config.alpha)),
        rates,
        "AdaLoRA, pruned triplets counted",
        optimizer=Allocation(target),
        penalty=_PENALTY,
    )
    eva = lora.LoRA(target, config.alpha, init=lora.initializers.EVA(rho=2.0))
    return [
        *uniform,
        *truncated,
        pruned,
        Row(f"AdaLoRA, r = {largest} to {target}", {}, series="AdaLoRA", parent=pruned.name, finish=Truncation(_ALL)),
        Row(f"EVA, mean r = {target}", spec(eva), rates, "EVA"),
    ]


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares a quarter of the parameters with all, and every choice with uniform ranks of as many parameters."""
    uniform = [row for row in summaries if row.row.series == "uniform LoRA"]
    truncated = [row for row in summaries if row.row.series == "truncation"]
    whole = max(uniform, key=lambda row: row.parameters)
    small = [row for row in truncated if row.parameters <= whole.parameters / 4]
    claim = "a quarter of the parameters is enough for half a point less"
    selected = [row for row in summaries if row.row.series in ("AdaLoRA", "EVA")]
    if small:
        quarter = max(small, key=lambda row: row.parameters)
        selected.insert(0, quarter)
        first = as_good(claim, quarter, whole, margin=0.5)
    else:
        first = Finding(claim, "not decided", "no energy leaves a quarter of them; add smaller --energies")
    return [
        first,
        *(
            as_good(f"{row.row.name} is as good as uniform ranks of as many parameters", row, _nearest(row, uniform))
            for row in selected
        ),
    ]


def _nearest(row: Summary, uniform: Sequence[Summary]) -> Summary:
    return min(uniform, key=lambda other: abs(other.parameters - row.parameters))


STUDY = Study(
    claim="Ranks that differ by weight need fewer parameters than uniform ones",
    source="AdaLoRA, EVA, and an open question of the LoRA paper (§8)",
    rows=rows,
    draw=figures.lines,
    findings=findings,
)


def run(config: Config) -> list[Summary]:
    """Runs the study; see :func:`experiments.studies.comparison.program.run`."""
    return program.run(config, STUDY)
