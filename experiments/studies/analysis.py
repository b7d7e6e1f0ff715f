"""Analyzes how training changes weights: shared subspaces, amplification, direction and magnitude."""

import re
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from experiments.configs.analysis import Config
from experiments.errors import UserError
from experiments.reports.results import write_json
from experiments.studies import analysis_figures as figures
from experiments.studies import head, provenance
from experiments.studies.analysis_runs import Run, run_method
from experiments.studies.head import Start
from experiments.studies.methods import Method
from experiments.studies.problem import HEAD, Problem, load
from experiments.training import outputs, processes
from lora_jax import analysis

PARTS = ("query", "value")
_TRACKED = rf"attention/({'|'.join(PARTS)})/kernel"
_WARMUP, _CLIP, _LABEL_SMOOTHING = 0.06, 1.0, 0.1  # as in the quickstart


@dataclass(frozen=True)
class Findings:
    """The result of the study.

    Attributes:
      similarities: φ for all i and j, by path and comparison.
      amplifications: Amplifications by method and path.
      drifts: Drifts by method, step and path.
      correlations: Correlations of ΔD and ΔM over all steps and layers, by method and query or value.
      accuracies: Validation accuracies by run.
    """

    similarities: dict[str, dict[str, np.ndarray]]
    amplifications: dict[str, dict[str, analysis.Amplification]]
    drifts: dict[str, dict[int, dict[str, analysis.Drift]]]
    correlations: dict[str, dict[str, float]]
    accuracies: dict[str, float]


@outputs.exclusive
def run(config: Config) -> Findings:
    """Trains or resumes the runs of the config, analyzes them, and writes a JSON record and plots.

    Raises:
      UserError: Model or data are missing or malformed, or the model has no such layer or rank.
    """
    outputs.claim(config.out, "analysis.json", "subspaces.png", "amplification.png", "direction-magnitude.png")
    console = processes.console()
    evaluated = config.validation_examples
    limits = {"train": config.train_examples, "validation": evaluated, "test": evaluated}
    problem = load(config.model, config.data, limits, config.lengths, report=console.print)
    axes = _tracked_axes(problem, config)
    plotted = [path for path in axes if re.search(rf"\b{config.layer}\b", path)]
    if not plotted:
        raise UserError(f"--layer {config.layer}: expected a layer from 0 to {len(axes) // len(PARTS) - 1}")
    start = head.run(
        problem, provenance.directory(config.out, "head", _shared(config, problem), fresh=config.fresh), console
    )
    runs = [_train(start, method, seed, list(axes), config, console) for method, seed in _methods(config)]
    findings = _analyze(config, start, runs, axes)
    figures.similarities(config.out / "subspaces.png", {path: findings.similarities[path] for path in plotted})
    figures.amplifications(config.out / "amplification.png", findings.amplifications)
    figures.drifts(config.out / "direction-magnitude.png", findings.drifts, findings.correlations)
    write_json(config.out / "analysis.json", _record(config, findings))
    console.print(_table(findings))
    console.print(f"written to {config.out}: analysis.json, subspaces.png, amplification.png, direction-magnitude.png")
    return findings


def _tracked_axes(problem: Problem, config: Config) -> dict[str, tuple[str, ...]]:
    """Returns the roles of the axes of the analyzed weights by path; adapters of full fine-tuning lack them."""
    spec = {_TRACKED: lora.LoRA(config.rank)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), problem.base)
    delta = problem.delta(jax.random.key(0), shapes, spec)
    smallest = min(min(adapter.shape()) for adapter in delta.values())
    if config.large_rank > smallest:
        raise UserError(f"--large-rank {config.large_rank} exceeds the rank of the model's weights, {smallest}")
    return {path: adapter.axes for path, adapter in delta.items()}


def _methods(config: Config) -> list[tuple[Method, int]]:
    """Returns the methods to train, each with a seed."""

    def method(name: str, spec: dict[str, Any], lr: float) -> Method:
        return Method(name, spec, lr, config.epochs, config.batch_size, _WARMUP, _CLIP, _LABEL_SMOOTHING)

    def adapters(recipe: Any) -> dict[str, Any]:
        return {_TRACKED: recipe, HEAD: lora.Full()}

    small, large = (lora.LoRA(rank, alpha=config.alpha) for rank in (config.rank, config.large_rank))
    dora = lora.DoRA(config.rank, alpha=config.alpha)
    return [
        (method(_lora(config.rank), adapters(small), config.lora_lr), 0),
        *[(method(_lora(config.large_rank), adapters(large), config.lora_lr), seed) for seed in (0, 1)],
        (method(f"DoRA r={config.rank}", adapters(dora), config.lora_lr), 0),
        (method("full", {"": lora.Full()}, config.full_lr), 0),
    ]


def _lora(rank: int) -> str:
    return f"LoRA r={rank}"


def _shared(config: Config, problem: Problem) -> list[Any]:
    """Returns the inputs that determine the results of all runs."""
    return [problem.digest, config.lengths]


def _train(start: Start, method: Method, seed: int, tracked: list[str], config: Config, console: Console) -> Run:
    settings = {**asdict(method), "spec": repr(method.spec), "seed": seed}
    title = f"{method.name.replace(' r=', '-r').lower()}-seed{seed}"
    console.print(f"{method.name}, seed {seed}", highlight=False)
    directory = provenance.directory(config.out, title, [_shared(config, start.problem), settings], fresh=config.fresh)
    every = config.checkpoint_every
    return run_method(start, method, seed, tracked, directory=directory, checkpoint_every=every, console=console)


def _analyze(config: Config, start: Start, runs: list[Run], axes: dict[str, tuple[str, ...]]) -> Findings:
    by_run = {(run.name, run.seed): run for run in runs}
    small, large = _lora(config.rank), _lora(config.large_rank)
    first = [run for run in runs if run.seed == 0]
    drifts = {
        run.name: {step: analysis.drift(delta, start.base, axes=axes) for step, delta in run.deltas.items()}
        for run in first
    }
    return Findings(
        # Different seeds: with the same key, the rows of the smaller factor are the first rows of the larger one.
        similarities=_similarities(start, by_run[small, 0], by_run[large, 1], by_run[large, 0], config.large_rank),
        # Changes of full rank are truncated to LoRA's number of directions.
        amplifications={
            run.name: analysis.amplification(
                run.last, start.base, rank=config.large_rank if run.name == large else config.rank, axes=axes
            )
            for run in first
        },
        drifts=drifts,
        correlations={
            name: {
                part: analysis.correlation(
                    drift for paths in steps.values() for path, drift in paths.items() if f"/{part}/" in path
                )
                for part in PARTS
            }
            for name, steps in drifts.items()
        },
        accuracies={f"{run.name} seed {run.seed}": run.accuracy for run in runs},
    )


def _similarities(start: Start, small: Run, large: Run, reseeded: Run, count: int) -> dict[str, dict[str, np.ndarray]]:
    """Computes φ between runs, between random matrices, and between a run and the weight."""
    runs = (small, large, reseeded)
    small_directions, large_directions, reseeded_directions = (analysis.factor_directions(run.last) for run in runs)
    weights, change = analysis.decompose_weights(start.base, large.last), analysis.decompose(large.last)
    rng, similarities = np.random.default_rng(0), {}
    for path in large.last:
        random = [np.linalg.qr(rng.normal(size=large_directions[path].shape))[0] for _ in range(2)]
        pairs = {
            f"{small.name} and {large.name}": (small_directions[path], large_directions[path]),
            f"{large.name}, two seeds": (large_directions[path], reseeded_directions[path]),
            "two random matrices": random,
            f"W and ΔW of {large.name}": (weights[path].inputs[:, :count], change[path].inputs),
        }
        similarities[path] = {name: analysis.similarity(*pair) for name, pair in pairs.items()}
    return similarities


def _table(findings: Findings) -> Table:
    """Returns a table of medians over the weights, and the correlation of ΔD and ΔM, by method."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("‖ΔW‖", "UᵀWV\nof ΔW", "of W", "random", "ampli-\nfied", "un-\nscaled")
    table.add_column("method", no_wrap=True)
    for name in (*columns, *(f"ΔD, ΔM\n{part}" for part in PARTS)):
        table.add_column(name, justify="right")
    for name, weights in findings.amplifications.items():
        rows = [[x.change, x.projected, x.largest, x.random, x.factor, x.unscaled_factor] for x in weights.values()]
        numbers = [f"{number:.2f}" for number in np.median(np.array(rows, float), axis=0)]
        table.add_row(name, *numbers, *(f"{value:+.2f}" for value in findings.correlations[name].values()))
    return table


def _record(config: Config, findings: Findings) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(inner) for key, inner in value.items()}
        if isinstance(value, analysis.Amplification | analysis.Drift):
            return plain(asdict(value))
        return np.round(value, 6).tolist() if isinstance(value, np.ndarray) else value

    return {
        "config": asdict(config),
        "versions": provenance.versions(),
        **{name: plain(value) for name, value in vars(findings).items()},
    }
