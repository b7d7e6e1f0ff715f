"""Fine-tunes a decoder on conversations, and writes the adapter in two formats and sample answers."""

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.sft import Config
from experiments.input import pipeline
from experiments.input.packing import Packed
from experiments.models import families
from experiments.models.flops import count_flops
from experiments.reports.results import write_json
from experiments.studies.decoder import program as programs
from experiments.studies.decoder import runs
from experiments.studies.decoder.adapters import save_peft
from experiments.studies.decoder.choices import choose_remat, count_weights, longest_sequence
from experiments.studies.decoder.program import Program
from experiments.studies.sft.data import Data, read_data
from experiments.studies.sft.program import abstract
from experiments.studies.sft.recorded import write_run
from experiments.studies.sft.report import ADAPTER, BEST, PEFT, PEFT_LAST, RESULT, Report, show, show_answers
from experiments.studies.sft.samples import Writer
from experiments.training import chips, loop, outputs, processes
from experiments.training import mesh as meshes
from experiments.training.checkpoints import Checkpoints
from experiments.training.progress import bar
from experiments.training.run import Costs, Limits, TrainingRun

_WRITTEN = (
    ADAPTER,
    BEST,
    PEFT,
    PEFT_LAST,
    RESULT,
    "checkpoints",
    "config.json",
    "metrics.jsonl",
    "tensorboard",
    "profile",
    "loss.png",
)
_NOT_NUMBERS = (
    *(
        "out",
        "fresh",
        "model",
        "data",
        "data_form",
        "on_bad",
        "validation",
        "mesh",
        "distributed",
        "profile",
        "remat",
        "attention",
        "loss_chunk",
    ),
    *(
        "optimizer_on_host",
        "samples",
        "new_tokens",
        "checkpoint_every",
        "log_every",
        "eval_share",
        "eval_first",
        "test_examples",
        "beams",
        "length_penalty",
        "no_repeat_ngram",
        "methods",
        "paper",
        "fast",
    ),
)
"""Settings that do not affect the results except by rounding, or that a digest covers."""


@outputs.exclusive
def run(config: Config) -> Report:
    """Runs or resumes the study, shows its result, and writes adapters, a JSON record and a plot.

    Raises:
      UserError: Model or data are missing, malformed or incompatible with the mesh, or the directory contains a run
        with other settings.
    """
    console = processes.console()
    programs.check(config)
    config, directory, description = runs.begin(config, _WRITTEN, console)
    data = read_data(config, directory, console, longest_sequence(description), _evaluated(config.out / RESULT))
    config = replace(config, length=data.train.length)
    shape = families.get_family(description).shape(description)
    choose_remat(config, shape, count_weights(description), console=console)
    total, due = loop.plan_steps(config.epochs, data.train.steps_per_epoch, config.steps, config.eval_every)
    program = abstract(config, steps=total, max_labels=data.max_labels)
    settings = runs.result_settings(config, directory, data.digests, _NOT_NUMBERS)
    report = runs.read_finished(Report.load, config.out / RESULT, settings, total, _limits(config), console)
    if report is None:
        with jax.set_mesh(program.mesh):
            report = _train(config, program, data, directory, (total, due), settings, console)
    if processes.is_first():
        show(config, report, console)
    return report


def _train(
    config: Config,
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
    writer = Writer(program, data.encoder, directory, data.records)
    before = writer.write(base, state.delta)
    show_answers(writer.prompts, before, console)
    evaluate = _evaluator(program, data.validation)
    evaluates = data.validation is not None
    score = evaluate(state) if evaluates and config.eval_first else None
    run = TrainingRun(
        config.out,
        program.mesh,
        asdict(config),
        config.checkpoint_every,
        best="min",
        settings=settings,
        profile=config.profiled_steps(),
        limits=_limits(config),
        log_every=config.log_every,
        costs=_costs(config, program, base, state.delta),
    )
    with bar(console, "training", sum(map(data.train.examples, range(total)))) as progress:
        state, history = loop.train(
            run,
            program.step,
            state,
            data.train,
            total,
            due=due if evaluates else set(),
            score=score,
            evaluate=evaluate,
            format_score=lambda loss: f"loss {loss:.3f}, perplexity {np.exp(loss):.1f}",
            bar=progress,
        )
    after = writer.write(base, state.delta)
    last_step = len(history.losses)
    best, best_step = state, last_step
    trained = [evaluation for evaluation in history.evaluations if evaluation[0]]
    if trained and min(trained, key=lambda evaluation: evaluation[1])[0] != last_step:
        with Checkpoints(run.checkpoints, best="min", settings=settings) as checkpoints:
            best, best_step = checkpoints.best(state)
    adapters = {ADAPTER: meshes.gather(state.delta), BEST: meshes.gather(best.delta)}
    prompts = writer.prompts
    report = Report(
        settings=settings,
        trained_parameters=parameters,
        seconds=history.seconds,
        losses=history.losses,
        evaluations=history.evaluations,
        best_step=best_step,
        texts=list(zip(prompts.texts, before, after, prompts.answers)),
        ended=run.limits.reached(history) if last_step < total else None,
        validation_examples=data.validation_examples,
    )
    if processes.is_first():
        names = program.family.names(program.shape)
        for name, delta in adapters.items():
            lora.save(config.out / name, delta, names=names)
            write_run(config.out / name, config, data.records[0])
        for name, adapter in ((PEFT, BEST), (PEFT_LAST, ADAPTER)):
            save_peft(config.out / name, adapters[adapter], names, config.model, "CAUSAL_LM")
        write_json(config.out / RESULT, asdict(report))
    processes.wait("written")
    return report


def _evaluator(program: Program, batches: Packed | None) -> Callable[[lora.TrainState], float]:
    """Returns a function from a state to its mean validation loss per token; NaN without validation examples."""
    if batches is None:
        return lambda state: math.nan
    summed, mesh = jax.jit(program.loss, out_shardings=meshes.replicated(program.mesh)), program.mesh
    size, steps = batches.batch_size, batches.steps_per_epoch

    def evaluate(state: lora.TrainState) -> float:
        iterator = pipeline.iterate(batches, steps, rows=meshes.process_rows(mesh, size))
        sums = [summed(state.base, state.delta, meshes.put_batch(mesh, batch, size), None) for batch in iterator]
        return sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)

    return evaluate


def _costs(config: Config, program: Program, base: Any, delta: Any) -> Costs:
    """Returns the model's FLOPs per token and label, and the devices' peak FLOPs, if they are known."""
    chip = chips.find_chip(jax.devices()[0].device_kind)
    flops = count_flops(base, delta, program.shape, config.row_length)
    return Costs(flops.token, flops.label, None if chip is None else chip.flops * program.mesh.size)


def _limits(config: Config) -> Limits:
    return Limits(config.max_minutes, config.patience, best="min")


def _evaluated(path: Path) -> int | None:
    """Returns the number of validation records of a finished run, which may continue; None without one."""
    return Report.load(path).validation_examples if path.exists() else None
