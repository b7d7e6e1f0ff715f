"""Compares LoRA with a converged head and full fine-tuning, in a table and a plot."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

import lora_jax as lora
from experiments.configs.quickstart import Config
from experiments.reports import curves
from experiments.reports.results import Result, write_json
from experiments.reports.table import merged_line, table
from experiments.studies import encoder_export, head, methods, provenance, sentences
from experiments.studies.head import Start
from experiments.studies.methods import Method
from experiments.studies.problem import HEAD, Problem, accuracy, answers, load
from experiments.tasks import examples
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.run import TrainingRun

_LINEAR = r"(attention|feed_forward)/.*kernel"
_QUERY_VALUE = r"attention/(query|value)/kernel"


@outputs.exclusive
def run(config: Config) -> list[Result]:
    """Runs or resumes the methods of the config, prints a table, and writes a JSON record and a plot.

    Raises:
      UserError: Model or data are missing or malformed.
    """
    console = processes.console()
    meshes.make_mesh(config.mesh)
    meshes.check_batch(config.batch_size, config.mesh, "batch_size")
    with processes.first_before_others():
        if processes.is_first():
            outputs.claim(config.out, "run.json", "curves.png")
    problem = load(config.model, config.data, examples.limits(config), config.lengths, report=console.print)
    for name in config.methods:
        if name != "head":
            problem.check(name, make_method(name, config).spec)
    directory = _directory(config, "head", 0, problem.digest, {})
    with processes.first_before_others():
        start = head.run(problem, directory, console)
        if processes.is_first():
            sentences.describe(directory, config.model, problem)
    results = [start.result] if "head" in config.methods else []
    with meshes.use_mesh(config.mesh) as mesh:
        for name in config.methods:
            if name != "head":
                for seed in range(config.seeds):
                    directory, result = _train(start, name, seed, config, mesh, console)
                    results.append(result)
    if processes.is_first():
        _report(config, results, directory, console)
    return results


def _report(config: Config, results: list[Result], last: Path, console: Console) -> None:
    console.print()
    console.print(table(results))
    if with_adapters := [result for result in results if result.losses]:
        console.print(merged_line(with_adapters))
    curves.draw(config.out / "curves.png", results, f"{config.model} on {config.data}")
    write_json(config.out / "run.json", provenance.record(config, results=[asdict(result) for result in results]))
    console.print(f"written to {config.out}: run.json, curves.png and an adapter for each run")
    console.print("in Python, from here:")
    for line in (
        "from experiments.studies import sentences",
        f"print(sentences.load({str(last)!r})('a chess engine that plays over the internet'))",
    ):
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def make_method(name: str, config: Config) -> Method:
    """Returns a method by its name in the config's `methods`."""
    low_rank = lora.LoRA(rank=config.rank, alpha=config.alpha)
    decomposed = lora.DoRA(rank=config.rank, alpha=config.alpha)
    quantized = {_LINEAR: lora.NF4()}
    spec, rules, lr = {
        "lora": ({_QUERY_VALUE: low_rank, HEAD: lora.Full()}, {}, config.lora_lr),
        "qlora": ({_QUERY_VALUE: low_rank, HEAD: lora.Full()}, quantized, config.lora_lr),
        "qdora": ({_QUERY_VALUE: decomposed, HEAD: lora.Full()}, quantized, config.lora_lr),
        "all-linear": ({_LINEAR: low_rank, HEAD: lora.Full()}, {}, config.all_linear_lr),
        "full": ({r"": lora.Full()}, {}, config.full_lr),
    }[name]
    return Method(
        name,
        spec,
        lr,
        epochs=config.epochs,
        batch_size=config.batch_size,
        warmup=config.warmup,
        clip=config.clip,
        label_smoothing=config.label_smoothing,
        rules=rules,
    )


def _train(start: Start, name: str, seed: int, config: Config, mesh: Mesh, console: Console) -> tuple[Path, Result]:
    """Trains a method and returns the directory and the result of the run."""
    method = make_method(name, config)
    settings = {key: value for key, value in asdict(method).items() if key not in ("spec", "rules")}
    settings |= {"spec": repr(method.spec), "rules": repr(method.rules)}
    directory = _directory(config, name, seed, start.problem.digest, settings)
    run = TrainingRun(directory, mesh, asdict(config), config.checkpoint_every, profile=config.profiled_steps())
    result = methods.run(start, method, seed, run, console)
    if processes.is_first():
        sentences.describe(directory, config.model, start.problem)
        if config.export == "peft":
            _export(start.problem, method, config.model, directory, console)
    return directory, result


def _export(problem: Problem, method: Method, model: str, directory: Path, console: Console) -> None:
    """Writes the adapter of a finished run in PEFT's format, unless the method has none."""
    if method.name == "full":
        console.print("PEFT: full fine-tuning has no adapter; its weights are in adapter/", highlight=False)
        return
    delta, apply = lora.load(directory / "adapter", problem.base), jax.jit(lora.adapt(problem.apply))
    logits = answers(lambda *inputs: apply(problem.base, delta, *inputs)[0], problem.splits["test"], problem.lengths)
    encoder_export.export(problem, delta, model, directory, logits, quantized=bool(method.rules))
    line = f"PEFT: {directory / encoder_export.DIRECTORY}"
    if method.rules:
        right = accuracy(logits, problem.splits["test"])
        line += f" (trained with NF4 weights; accuracy with the published float weights: {right:.1%})"
    console.print(line, highlight=False, soft_wrap=True)


def _directory(config: Config, name: str, seed: int, digest: str, settings: dict[str, Any]) -> Path:
    title = name if name == "head" else f"{name}-seed{seed}"
    return provenance.directory(config.out, title, [name, seed, digest, config.lengths, settings], fresh=config.fresh)
