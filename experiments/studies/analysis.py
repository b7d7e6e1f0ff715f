"""What training did to the weights: shared subspaces, amplification, changes of direction and magnitude."""

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
from experiments.studies.analysis_runs import Run, trained
from experiments.studies.head import Start
from experiments.studies.methods import Method
from experiments.studies.problem import HEAD, Problem, load
from experiments.training import outputs, processes
from lora_jax import analysis

PARTS = ("query", "value")
_WATCHED = rf"attention/({'|'.join(PARTS)})/kernel"
_WARMUP, _CLIP, _LABEL_SMOOTHING = 0.06, 1.0, 0.1  # the quickstart's


@dataclass(frozen=True)
class Findings:
    """What the study found.

    Attributes:
      similarities: Path, then comparison, to φ for all i and j.
      amplifications: Method, then path.
      drifts: Method, then step, then path.
      correlations: Of ΔD and ΔM over all steps and layers; method, then query or value.
      accuracies: On validation, by run.
    """

    similarities: dict[str, dict[str, np.ndarray]]
    amplifications: dict[str, dict[str, analysis.Amplification]]
    drifts: dict[str, dict[int, dict[str, analysis.Drift]]]
    correlations: dict[str, dict[str, float]]
    accuracies: dict[str, float]


@outputs.exclusive
def run(config: Config) -> Findings:
    """Trains what the config asks for, analyses it, writes JSON and pictures.

    Raises:
      UserError: The model or the data are missing or malformed, or have no such layer or rank.
    """
    outputs.claim(config.out, "analysis.json", "subspaces.png", "amplification.png", "direction-magnitude.png")
    console = processes.console()
    judged = config.validation_examples
    limits = {"train": config.train_examples, "validation": judged, "test": judged}
    problem = load(config.model, config.data, limits, config.lengths, report=console.print)
    axes = _watched(problem, config)
    drawn = [path for path in axes if re.search(rf"\b{config.layer}\b", path)]
    if not drawn:
        raise UserError(f"--layer {config.layer}: the model has layers 0 to {len(axes) // len(PARTS) - 1}")
    start = head.run(
        problem, provenance.directory(config.out, "head", _shared(config, problem), fresh=config.fresh), console
    )
    runs = [_trained(start, method, seed, list(axes), config, console) for method, seed in _methods(config)]
    findings = _analyzed(config, start, runs, axes)
    figures.similarities(config.out / "subspaces.png", {path: findings.similarities[path] for path in drawn})
    figures.amplifications(config.out / "amplification.png", findings.amplifications)
    figures.drifts(config.out / "direction-magnitude.png", findings.drifts, findings.correlations)
    write_json(config.out / "analysis.json", _record(config, findings))
    console.print(_table(findings))
    console.print(f"written to {config.out}: analysis.json, subspaces.png, amplification.png, direction-magnitude.png")
    return findings


def _watched(problem: Problem, config: Config) -> dict[str, tuple[str, ...]]:
    """The paths that are analyzed, with the roles of their axes, which full fine-tuning does not know."""
    spec = {_WATCHED: lora.LoRA(config.rank)}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), problem.base)
    found = problem.delta(jax.random.key(0), shapes, spec)
    smallest = min(min(node.shape()) for node in found.values())
    if config.large_rank > smallest:
        raise UserError(f"--large-rank {config.large_rank} is above the rank of the model's weights, {smallest}")
    return {path: node.axes for path, node in found.items()}


def _methods(config: Config) -> list[tuple[Method, int]]:
    """What is trained, with a seed each."""

    def method(name: str, spec: dict[str, Any], lr: float) -> Method:
        return Method(name, spec, lr, config.epochs, config.batch_size, _WARMUP, _CLIP, _LABEL_SMOOTHING)

    def adapters(recipe: Any) -> dict[str, Any]:
        return {_WATCHED: recipe, HEAD: lora.Full()}

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
    """What decides the numbers of every run."""
    return [problem.digest, config.lengths]


def _trained(start: Start, method: Method, seed: int, watched: list[str], config: Config, console: Console) -> Run:
    settings = {**asdict(method), "spec": repr(method.spec), "seed": seed}
    title = f"{method.name.replace(' r=', '-r').lower()}-seed{seed}"
    console.print(f"{method.name}, seed {seed}", highlight=False)
    directory = provenance.directory(config.out, title, [_shared(config, start.problem), settings], fresh=config.fresh)
    every = config.checkpoint_every
    return trained(start, method, seed, watched, directory=directory, checkpoint_every=every, console=console)


def _analyzed(config: Config, start: Start, runs: list[Run], axes: dict[str, tuple[str, ...]]) -> Findings:
    by_run = {(run.name, run.seed): run for run in runs}
    small, large = _lora(config.rank), _lora(config.large_rank)
    first = [run for run in runs if run.seed == 0]
    drifts = {
        run.name: {step: analysis.drift(delta, start.base, axes=axes) for step, delta in run.deltas.items()}
        for run in first
    }
    return Findings(
        # Not of one seed: the rows of a smaller factor are the first ones of a larger, drawn from the same key.
        similarities=_similarities(start, by_run[small, 0], by_run[large, 1], by_run[large, 0], config.large_rank),
        # What is of full rank is cut to the directions that LoRA has.
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


def _similarities(start: Start, small: Run, large: Run, again: Run, count: int) -> dict[str, dict[str, np.ndarray]]:
    """φ between runs, between random matrices, and between a run and the weight."""
    of_small, of_large, of_again = (analysis.factor_directions(run.last) for run in (small, large, again))
    weights, change = analysis.decompose_weights(start.base, large.last), analysis.decompose(large.last)
    rng, found = np.random.default_rng(0), {}
    for path in large.last:
        random = [np.linalg.qr(rng.normal(size=of_large[path].shape))[0] for _ in range(2)]
        pairs = {
            f"{small.name} and {large.name}": (of_small[path], of_large[path]),
            f"{large.name}, two seeds": (of_large[path], of_again[path]),
            "two random matrices": random,
            f"W and ΔW of {large.name}": (weights[path].inputs[:, :count], change[path].inputs),
        }
        found[path] = {name: analysis.similarity(*pair) for name, pair in pairs.items()}
    return found


def _table(findings: Findings) -> Table:
    """Medians over the weights, and the correlation of ΔD and ΔM; a line a method."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("‖ΔW‖", "UᵀWV\nof ΔW", "of W", "random", "ampli-\nfied", "un-\nscaled")
    shown.add_column("method", no_wrap=True)
    for name in (*columns, *(f"ΔD, ΔM\n{part}" for part in PARTS)):
        shown.add_column(name, justify="right")
    for name, found in findings.amplifications.items():
        rows = [[x.change, x.projected, x.largest, x.random, x.factor, x.unscaled_factor] for x in found.values()]
        numbers = [f"{number:.2f}" for number in np.median(np.array(rows, float), axis=0)]
        shown.add_row(name, *numbers, *(f"{found:+.2f}" for found in findings.correlations[name].values()))
    return shown


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
