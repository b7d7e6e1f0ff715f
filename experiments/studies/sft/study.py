"""A decoder fine-tuned on conversations: data, training, texts before and after, the adapter in two formats."""

import hashlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import lora_jax as lora
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.input import pipeline, sources
from experiments.input.checking import check_records
from experiments.input.encoding import Encoder, load_encoder
from experiments.input.packing import Packed
from experiments.input.usage import show, usage
from experiments.models import checkpoint, location
from experiments.models.flops import step_flops
from experiments.reports import curves
from experiments.reports.results import read_json, write_json
from experiments.studies.sft import program as programs
from experiments.studies.sft.program import Program
from experiments.studies.sft.samples import Writer, ends
from experiments.training import chips, loop, outputs, processes
from experiments.training import mesh as meshes
from experiments.training.checkpoints import Checkpoints, differences
from experiments.training.progress import bar
from experiments.training.run import Costs, History, Limits, TrainingRun

ADAPTER, BEST, RESULT, TOKENS = "adapter", "adapter-best", "result.json", "tokens"
PEFT, PEFT_LAST = "peft", "peft-last"  # the best step's, as people load it, and the last step's
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
    *("optimizer_on_host", "samples", "new_tokens", "checkpoint_every", "log_every"),
)
"""What of a config does not decide the numbers, but for rounding, or is in a digest."""

_EXTENDED = ("epochs", "steps", "max_minutes", "patience", "eval_every")
"""How long a run goes on and when it is evaluated: a run that is there goes on with others."""


@dataclass(frozen=True)
class Report:
    """What is known of a run.

    Attributes:
      settings: What decided the numbers.
      trained_parameters: Scalars that training moves.
      seconds: Training and its evaluations, compilation included.
      losses: Of every training step.
      evaluations: (step, mean loss a token on validation) pairs.
      best_step: Of the smallest of them.
      texts: (prompt, answer before, answer after, the example's own) of some validation examples.
      ended: Why it ended before its last step; None where it did not.
    """

    settings: dict[str, Any]
    trained_parameters: int
    seconds: float
    losses: list[float]
    evaluations: list[tuple[int, float]]
    best_step: int
    texts: list[tuple[str, str, str, str]]
    ended: str | None = None

    @property
    def history(self) -> History:
        """What was measured, as the training loop has it."""
        return History(self.losses, self.evaluations, self.seconds)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Reads what the study wrote as JSON."""

        def make(content: Any) -> "Report":
            for name in ("evaluations", "texts"):
                content[name] = [tuple(one) for one in content[name]]
            return cls(**content)

        return read_json(path, make)


@outputs.exclusive
def run(config: Config) -> Report:
    """Runs what the config asks for, shows it, writes adapter, JSON and picture.

    Raises:
      UserError: The model or the data are missing or malformed, or do not go with the mesh; the directory holds a run
        of other settings.
    """
    console = processes.console()
    programs.check(config)
    with processes.first_before_others():
        directory = location.find(config.model)
        if processes.is_first():
            outputs.begin(config.out, *_WRITTEN, fresh=config.fresh, cached=(TOKENS,))
    data = _read(config, directory, console)
    total, due = loop.plan_steps(config.epochs, data.train.steps_per_epoch, config.steps, config.eval_every)
    program = programs.abstract(config, steps=total)
    settings = _settings(config, data, directory)
    report = None
    if processes.broadcast((config.out / RESULT).exists()):
        report = _finished(config.out / RESULT, settings)
        done = len(report.losses)
        if done < total and _limits(config).reached(report.history) is None:
            if not (config.out / "checkpoints").is_dir():
                raise UserError(f"{config.out}: no checkpoints to go on from at step {done}; --fresh starts over")
            line = f"goes on from step {done:,} to {total:,}; the learning rate is that of the longer run"
            console.print(line, highlight=False)
            report = None
    if report is None:
        with jax.set_mesh(program.mesh):
            report = _trained(config, program, data, directory, (total, due), settings, console)
    if processes.is_first():
        _show(config, report, console)
    return report


@dataclass(frozen=True)
class _Data:
    """What is learned.

    Attributes:
      encoder: Of the checkpoint.
      records: Whose prompts the model answers: of validation where there are some.
      train: Batches.
      validation: Likewise; None where there are no such examples.
      digests: Of the records and of the encoder.
    """

    encoder: Encoder
    records: sources.Records
    train: Packed
    validation: Packed | None
    digests: list[str]


def _read(config: Config, directory: Path, console: Console) -> _Data:
    train, validation = sources.splits(config.data, config.validation, config.data_form)
    for line in [] if validation is None else sources.overlap_warnings(train, validation):
        console.print(f"validation: {line}", highlight=False, markup=False, soft_wrap=True)
    if config.validation_share:
        if validation is not None:
            raise UserError(
                f"--validation-share {config.validation_share}: {' and '.join(config.data)} has validation examples of "
                "its own"
            )
        train, validation = sources.split(train, config.validation_share, config.seed)
    needing = {"--patience": config.patience, "--eval-every": config.eval_every}
    needing = [flag for flag, value in needing.items() if value is not None]
    if validation is None and needing:
        raise UserError(
            f"{' and '.join(needing)}: {' and '.join(config.data)} has no validation examples; name some with "
            "--validation, or hold some out with --validation-share"
        )
    train, findings = check_records(train, on_bad=config.on_bad, limit=config.train_examples)
    findings_of = {"train": findings}
    if validation is not None:
        validation, findings_of["validation"] = check_records(validation, on_bad=config.on_bad)
        validation = sources.first(validation, min(config.validation_examples or sys.maxsize, len(validation)))
    end = ends(directory)
    vocabulary = checkpoint.read_config(directory).get("vocab_size")
    vocabulary = vocabulary if isinstance(vocabulary, int) else None  # the model says what is wrong with it
    encoder = load_encoder(directory, end[0] if end else None, config.encoding(), vocabulary=vocabulary)

    def packed(records: sources.Records, seed: int | None, name: str) -> Packed:
        return pipeline.batches(
            records,
            encoder,
            config.out / TOKENS,
            length=config.length,
            global_batch=config.batch.global_,
            seed=seed,
            pack=config.pack,
            on_bad=config.on_bad,
            process_index=jax.process_index(),
            report=lambda line: console.print(f"{name}: {line}", highlight=False, soft_wrap=True),
        )

    with processes.first_before_others():
        batches = packed(train, config.seed, "training")
        others = None if validation is None else packed(validation, None, "validation")
    uses = {"train": usage(train, findings_of["train"], batches)}
    if validation is not None and others is not None:
        uses["validation"] = usage(validation, findings_of["validation"], others)
    show(console, uses, config.length)
    digests = [train.digest, *([] if validation is None else [validation.digest]), encoder.digest]
    prompts, of = (train, batches) if validation is None or others is None else (validation, others)
    prompts = prompts.take(np.setdiff1d(np.arange(len(prompts)), list(of.data.skipped)))
    return _Data(encoder, prompts, batches, others, digests)


def _trained(
    config: Config,
    program: Program,
    data: _Data,
    directory: Path,
    steps: tuple[int, set[int]],
    settings: dict[str, Any],
    console: Console,
) -> Report:
    total, due = steps
    base = program.load(directory)
    state = program.create(jax.random.key(config.seed), base)
    console.print(f"base: {config.model} on a mesh of {config.mesh}", highlight=False, soft_wrap=True)
    console.print(f"\n{lora.summary(base, state.delta)}\n", highlight=False, soft_wrap=True)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(lora.partition(state.delta)[0]))
    writer = Writer(program, data.encoder, directory, data.records)
    evaluate = _evaluator(program, data.validation)
    before, score = writer.write(base, state.delta), evaluate(state)
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
    with bar(console, "training", sum(map(data.train.examples, range(total)))) as shown:
        state, history = loop.train(
            run,
            program.step,
            state,
            data.train,
            total,
            due=due if data.validation else set(),
            score=score,
            evaluate=evaluate,
            format_score=lambda loss: f"loss {loss:.3f}, perplexity {np.exp(loss):.1f}",
            bar=shown,
        )
    after = writer.write(base, state.delta)
    last_step = len(history.losses)
    best, best_step = state, last_step
    if history.evaluations and min(history.evaluations[1:], key=lambda one: one[1])[0] != last_step:
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
    )
    if processes.is_first():
        for name, delta in adapters.items():
            lora.save(config.out / name, delta)
        names = program.family.names(program.shape)
        for name, adapter in ((PEFT, BEST), (PEFT_LAST, ADAPTER)):
            lora.peft.save(config.out / name, adapters[adapter], names, base_model=config.model, task_type="CAUSAL_LM")
        write_json(config.out / RESULT, asdict(report))
    processes.wait("written")
    return report


def _evaluator(program: Program, batches: Packed | None) -> Callable[[lora.TrainState], float]:
    """The mean loss a token on validation, of a state; NaN without such examples."""
    if batches is None:
        return lambda state: math.nan
    summed, mesh = jax.jit(program.loss, out_shardings=meshes.replicated(program.mesh)), program.mesh
    size, steps = batches.batch_size, batches.steps_per_epoch

    def evaluate(state: lora.TrainState) -> float:
        turns = pipeline.iterate(batches, steps, rows=meshes.process_rows(mesh, size))
        sums = [summed(state.base, state.delta, meshes.put_batch(mesh, batch, size), None) for batch in turns]
        return sum(float(total) for total, _ in sums) / sum(int(count) for _, count in sums)

    return evaluate


def _costs(config: Config, program: Program, base: Any, delta: Any) -> Costs:
    """What the model needs for a token, and what the devices can do: known of TPUs and GPUs."""
    chip = chips.find_chip(jax.devices()[0].device_kind)
    flops = step_flops(base, delta, program.shape, program.tokens, config.length) / program.tokens
    return Costs(flops, None if chip is None else chip.flops * program.mesh.size)


def _limits(config: Config) -> Limits:
    return Limits(config.max_minutes, config.patience, best="min")


def _settings(config: Config, data: _Data, directory: Path) -> dict[str, Any]:
    """All that decides the numbers but for the base's weights, of which checkpoints have a fingerprint."""
    chosen = {name: value for name, value in asdict(config).items() if name not in (*_NOT_NUMBERS, *_EXTENDED)}
    files = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    everything = chosen | {"model files": files, "data files": data.digests}
    return json.loads(json.dumps(everything, default=str))


def _finished(stored: Path, settings: dict[str, Any]) -> Report:
    """What a run that is there has found.

    Raises:
      UserError: It is of other settings.
    """
    report = Report.load(stored)
    before = {name: value for name, value in report.settings.items() if name not in _EXTENDED}
    if difference := differences(before, settings):
        raise UserError(f"{stored.parent}: holds a finished run with {difference}; --fresh starts over")
    return report


def _show(config: Config, report: Report, console: Console) -> None:
    for prompt, before, after, answer in report.texts:
        console.print(prompt, style="bold", highlight=False, markup=False)
        for name, text in (("before", before), ("after", after), ("example", answer)):
            console.print(f"  {name}: {text!r}", highlight=False, markup=False)
    losses = dict(report.evaluations)
    if losses:
        console.print(
            f"validation loss {losses[0]:.3f} before, {losses[report.best_step]:.3f} at best (step "
            f"{report.best_step:,} of {len(report.losses):,})",
            highlight=False,
        )
    curves.draw_losses(
        config.out / "loss.png", report.losses, report.evaluations, f"{config.model} on {' and '.join(config.data)}"
    )
    last, best = len(report.losses), report.best_step
    console.print(
        f"{report.trained_parameters:,} trained parameters, {report.seconds:.0f} s of training"
        + (f", ended early: {report.ended}" if report.ended else ""),
        highlight=False,
    )
    console.print(
        f"written to {config.out}: {BEST} and {PEFT} (the best step, {best:,}), {ADAPTER} and {PEFT_LAST} (the last "
        f"step, {last:,}), {RESULT}, loss.png, metrics.jsonl, tensorboard",
        highlight=False,
        soft_wrap=True,
    )
