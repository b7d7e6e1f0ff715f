"""The result of a run of supervised fine-tuning, as a JSON record, text and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.configs.sft import Config
from experiments.reports import curves
from experiments.studies.decoder.report import RunReport, show_not_exported
from experiments.studies.sft.samples import Prompts

ADAPTER, BEST, RESULT = "adapter", "adapter-best", "result.json"
PEFT, PEFT_LAST = "peft", "peft-last"  # of the best step and of the last step


@dataclass(frozen=True, kw_only=True)
class Report(RunReport):
    """The result of a run. Evaluations are mean validation losses per token; texts are tuples (prompt, answer before
    training, answer after training, reference answer).

    Attributes:
      best_step: The step of the smallest validation loss.
      validation_examples: Number of records that an evaluation read; None in results of earlier versions.
    """

    best_step: int
    validation_examples: int | None = None


def show_answers(prompts: Prompts, answers: Sequence[str], console: Console) -> None:
    """Prints the base's answers to the prompts."""
    for prompt, answer in zip(prompts.texts, answers):
        console.print(f"{prompt}\n", style="bold", highlight=False)
        console.print(f"the base answers: {answer}\n", highlight=False)
    if prompts.omitted:
        line = f"{prompts.omitted:,} longer prompts are left out of these samples"
        console.print(line, highlight=False)


def show(config: Config, report: Report, console: Console) -> None:
    """Prints a report, with the texts before and after training side by side, and plots its losses."""
    for prompt, *texts in report.texts:
        console.print(prompt, style="bold", highlight=False)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for name in ("before", "after", "example"):
            table.add_column(name, overflow="fold", ratio=1)
        table.add_row(*map(Text, texts))
        console.print(table, highlight=False)
    if losses := dict(report.evaluations):
        before = f"{losses[0]:.3f} before, " if 0 in losses else ""
        best = f"{losses[report.best_step]:.3f} at best (step {report.best_step:,} of {len(report.losses):,})"
        console.print(f"validation loss {before}{best}", highlight=False)
    curves.draw_losses(
        config.out / "loss.png", report.losses, report.evaluations, f"{config.model} on {' and '.join(config.data)}"
    )
    last, best = len(report.losses), report.best_step
    console.print(
        f"{report.trained_parameters:,} trained parameters, {report.seconds:.0f} s of training"
        + (f", ended early: {report.ended}" if report.ended else ""),
        highlight=False,
    )
    exported = (config.out / PEFT).is_dir()
    names = [f"{name} and {peft}" if exported else name for name, peft in ((BEST, PEFT), (ADAPTER, PEFT_LAST))]
    console.print(
        f"written to {config.out}: {names[0]} (the best step, {best:,}), {names[1]} (the last step, {last:,}), "
        f"{RESULT}, loss.png, metrics.jsonl, tensorboard",
        highlight=False,
        soft_wrap=True,
    )
    if not exported:
        show_not_exported(config.out / BEST, console)
