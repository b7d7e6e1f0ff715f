"""Adapts a language model with LoRA: trains, generates, merges, exports, reloads and reports."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from experiments import generation
from experiments.configs.language_model import Config
from experiments.reports import curves
from experiments.reports.agreement import Agreement, agreement_table
from experiments.reports.results import read_record, stored_bytes, write_json
from experiments.reports.table import size
from experiments.studies import provenance
from experiments.studies.language_model import exchange, samples, training
from experiments.studies.language_model.problem import Problem, load
from experiments.training import outputs, processes

_MODELS = {"base": "the base", "frequencies": "the frequency of each token alone", "adapted": "base and adapter"}
_LINE = 68  # maximum characters of a sample


@dataclass(frozen=True)
class Report:
    """The result of a run.

    Attributes:
      trained_parameters: Number of trained scalars.
      adapter_bytes: Size of the adapter in PEFT's format.
      merged_bytes: Size of the merged checkpoint.
      seconds: Time of training and evaluation, including compilation.
      perplexities: Perplexities of the test examples by model.
      losses: The loss of every training step.
      evaluations: Pairs (step, mean validation loss per token).
      texts: Triples (prompt, text of the base, text of base and adapter).
      agreements: Comparisons of merged and reloaded weights with base and adapter.
    """

    trained_parameters: int
    adapter_bytes: int
    merged_bytes: int
    seconds: float
    perplexities: dict[str, float]
    losses: list[float]
    evaluations: list[tuple[int, float]]
    texts: list[tuple[str, str, str]]
    agreements: list[Agreement]

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads a report that the study wrote."""

        def agreement(fields: dict[str, Any]) -> Agreement:
            return Agreement(**fields)

        return read_record(path, cls, {"evaluations": tuple, "texts": tuple, "agreements": agreement})


@outputs.exclusive
def run(config: Config) -> Report:
    """Runs or resumes the study, prints its result, and writes a JSON record and a plot.

    Raises:
      UserError: Model or data are missing or malformed.
    """
    outputs.claim(config.out, "run.json", "loss.png")
    console = processes.console()
    problem = load(config, report=lambda line: console.print(line, highlight=False, soft_wrap=True))
    directory = provenance.directory(config.out, f"seed{config.seed}", _settings(config, problem), fresh=config.fresh)
    stored = directory / "result.json"
    if stored.exists():
        report = Report.load(stored)
    else:
        report = _run(problem, config, directory, console)
        write_json(stored, asdict(report))
        outputs.clear(directory, "checkpoints")
    _show(report, config, console)
    title = f"{config.model} on {config.data}, LoRA of rank {config.rank}"
    curves.draw_losses(config.out / "loss.png", report.losses, report.evaluations, title)
    record = provenance.record(config, directory=directory.name, result=asdict(report))
    write_json(config.out / "run.json", record)
    console.print(f"written to {config.out}: run.json, loss.png; {directory.name}/merged, {directory.name}/peft")
    return report


def _run(problem: Problem, config: Config, directory: Path, console: Console) -> Report:
    prepared = training.prepare(problem, config)
    console.print()
    console.print(str(lora.summary(problem.base, prepared.delta)), highlight=False, soft_wrap=True)
    console.print()
    # A new adapter does not change the outputs: these are the losses of the base.
    base_loss = {split: prepared.loss(prepared.delta, split) for split in ("validation", "test")}
    step = generation.make_step(problem.apply)
    before = samples.generate(problem, step, problem.base, config.new_tokens)
    delta, history = training.run(prepared, config, directory, base_loss["validation"], console)
    test = problem.splits["test"].labels
    frequencies = training.frequency_loss(problem.splits["train"].labels, test, problem.model.config.vocab_size)
    losses = {"base": base_loss["test"], "frequencies": frequencies, "adapted": prepared.loss(delta, "test")}
    adapted = generation.make_step(lora.adapt(problem.apply))
    after = samples.generate(problem, adapted, (problem.base, delta), config.new_tokens)
    agreements = exchange.run(problem, delta, directory, step=step, generated=after, base_model=config.model)
    return Report(
        trained_parameters=sum(leaf.size for leaf in jax.tree.leaves(lora.partition(delta)[0])),
        adapter_bytes=stored_bytes(directory / exchange.PEFT),
        merged_bytes=stored_bytes(directory / exchange.MERGED),
        seconds=history.seconds,
        perplexities={name: float(np.exp(loss)) for name, loss in losses.items()},
        losses=history.losses,
        evaluations=history.evaluations,
        texts=list(zip(problem.prompts, samples.texts(problem, before), samples.texts(problem, after))),
        agreements=agreements,
    )


def _settings(config: Config, problem: Problem) -> dict[str, Any]:
    """Returns everything that affects the results."""
    excluded = ("out", "fresh", "model", "data", "samples", "checkpoint_every")
    settings = {name: value for name, value in asdict(config).items() if name not in excluded}
    return settings | {"digest": problem.digest}


def _show(report: Report, config: Config, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("test texts by")
    table.add_column("perplexity per token", justify="right")
    for name, words in _MODELS.items():
        table.add_row(words, f"{report.perplexities[name]:.1f}")
    console.print(table)
    indices = np.linspace(0, len(report.texts) - 1, min(config.samples, len(report.texts))).round().astype(int)
    for prompt, before, after in (report.texts[i] for i in indices):
        console.print(prompt, style="bold", highlight=False)
        console.print(f"  before: {_short(before)}\n  after:  {_short(after)}", highlight=False)
    console.print(agreement_table(report.agreements))
    console.print(
        f"{report.trained_parameters:,} trained parameters, {report.seconds:.0f} s of training; "
        f"adapter {size(report.adapter_bytes)}, merged checkpoint {size(report.merged_bytes)}",
        highlight=False,
    )


def _short(text: str) -> str:
    """Returns a quoted text, shortened to a line."""
    quoted = repr(text.strip())
    return quoted if len(quoted) <= _LINE else quoted[: _LINE - 2] + "…" + quoted[-1]
