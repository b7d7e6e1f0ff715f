"""Runs or resumes a study of post-training."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

import lora_jax as lora
from experiments.configs.post_training import PostTraining
from experiments.objectives.reference import Frozen
from experiments.reports.results import write_json
from experiments.studies.decoder import program as programs
from experiments.studies.decoder import runs
from experiments.studies.decoder.adapters import save_peft
from experiments.studies.decoder.choices import longest_sequence
from experiments.studies.decoder.program import Program
from experiments.studies.decoder.report import show_not_exported
from experiments.studies.post_training.data import Data, read_data
from experiments.studies.post_training.report import (
    ADAPTER,
    FIGURE,
    PEFT,
    RESULT,
    Report,
    draw,
    mean_error,
    show,
)
from experiments.studies.post_training.task import Task
from experiments.studies.sft.recorded import write_run
from experiments.training import loop, outputs, processes
from experiments.training import mesh as meshes
from experiments.training.progress import bar
from experiments.training.run import Limits, TrainingRun

_WRITTEN = (ADAPTER, PEFT, RESULT, FIGURE, "checkpoints", "config.json", "metrics.jsonl", "tensorboard", "profile")
_NOT_NUMBERS = (
    *("out", "fresh", "model", "data", "data_form", "on_bad", "validation", "mesh", "distributed", "profile", "remat"),
    *("attention", "loss_chunk", "optimizer_on_host", "samples", "checkpoint_every", "log_every", "fast"),
)
"""Settings that do not affect the results except by rounding, or that a digest covers."""


@outputs.exclusive
def run(config: PostTraining, task: Task) -> Report:
    """Runs or resumes a study, shows its result, and writes the adapter, a JSON record and a figure.

    Raises:
      UserError: Model or data are missing, malformed or incompatible with the mesh, or the directory contains a run
        with other settings.
    """
    console = processes.console()
    config, directory, description = runs.begin(config, _WRITTEN, console)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    data = read_data(config, directory, say, longest_sequence(description), task.new_tokens(config))
    config = replace(config, length=data.length)
    programs.check(config)
    total, due = loop.plan_steps(config.epochs, data.train.steps_per_epoch, config.steps, config.eval_every)
    due = due - {total} if config.eval_every else set()
    program = programs.abstract(config, task.objective(config, data), steps=total)
    settings = runs.result_settings(config, directory, data.digests, _NOT_NUMBERS)
    report = runs.read_finished(Report.load, config.out / RESULT, settings, total, Limits(config.max_minutes), console)
    if report is None:
        with jax.set_mesh(program.mesh):
            report = _train(config, task, program, data, directory, (total, due), settings, console)
    if processes.is_first():
        show(report, task.aim, console)
        draw(config.out / FIGURE, report, task.aim, task.curve, f"{task.name}: {config.model}")
        say(f"adapter, measurements and figure are in {config.out}")
    return report


def _train(
    config: PostTraining,
    task: Task,
    program: Program,
    data: Data,
    directory: Path,
    steps: tuple[int, set[int]],
    settings: dict[str, Any],
    console: Console,
) -> Report:
    total, due = steps
    state, parameters = runs.start(config, program, directory, console)
    base = state.base
    # The model that training starts from is the reference, and what the trained one is compared with.
    reference = {} if config.init_from is None else jax.tree.map(jnp.copy, state.delta)
    state = state.replace(base=Frozen(base, reference))
    measure = task.measure(config, program, data)
    before = measure(base, reference)
    evaluate = _evaluator(config, task, measure, before.values)
    values = task.compare(config, before.values, before.values)[0]
    line = ", ".join("{} {:.3f} ± {:.3f}".format(name, *mean_error(one)) for name, one in values.items())
    console.print(f"base, on held-out records: {line}", highlight=False, soft_wrap=True)
    run = TrainingRun(
        config.out,
        program.mesh,
        asdict(config),
        config.checkpoint_every,
        best="max",
        settings=settings,
        profile=config.profiled_steps(),
        limits=Limits(config.max_minutes),
        log_every=config.log_every,
        shown=task.curve,
    )
    with bar(console, "training", sum(map(data.train.examples, range(total)))) as progress:
        state, history = loop.train(
            run,
            task.step(config, program, data),
            state,
            data.train,
            total,
            due=due,
            score=float(values[task.aim.measure].mean()) if due else None,
            evaluate=evaluate,
            format_score=lambda score: f"{task.aim.measure} {score:.3f}",
            bar=progress,
        )
    after = measure(base, state.delta)
    first, last = task.compare(config, before.values, after.values)
    report = Report(
        settings=settings,
        trained_parameters=parameters,
        seconds=history.seconds,
        losses=history.losses,
        means=history.means,
        evaluations=history.evaluations,
        before={name: one.tolist() for name, one in first.items()},
        after={name: one.tolist() for name, one in last.items()},
        texts=[(prompt, one, other) for (prompt, one), (_, other) in zip(before.texts, after.texts)],
        ended=run.limits.reached(history) if len(history.losses) < total else None,
    )
    delta = meshes.gather(state.delta)
    if processes.is_first():
        names = program.family.names(program.shape)
        lora.save(config.out / ADAPTER, delta, names=names)
        write_run(config.out / ADAPTER, config, data.records[0])
        if not save_peft(config.out / PEFT, delta, names, config.model, task.task_type):
            show_not_exported(config.out / ADAPTER, console)
        write_json(config.out / RESULT, asdict(report))
    processes.wait("written")
    return report


def _evaluator(config: PostTraining, task: Task, measure: Any, before: Any) -> Callable[[lora.TrainState], float]:
    """Returns a function from a state to the mean of the aim's measure on the held-out records."""

    def evaluate(state: lora.TrainState) -> float:
        values = measure(state.base.base, state.delta).values
        return float(task.compare(config, before, values)[1][task.aim.measure].mean())

    return evaluate
