"""The table, the findings and the figure of the study."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from matplotlib.figure import Figure

from experiments.configs.forgetting import Config
from experiments.reports.findings import Finding, Verdict
from experiments.reports.page import Grid, Page
from experiments.reports.table import short
from experiments.studies.comparison.judge import STANDARD_ERRORS
from experiments.studies.forgetting.losses import Losses

BASE, LORA, ATTENTION, DORA, FULL = "base", "LoRA", "LoRA, attention only", "DoRA", "full fine-tuning"
_COLORS = {LORA: "#4c78a8", ATTENTION: "#9ecae9", DORA: "#54a24b", FULL: "#f58518"}
_CLAIM = "LoRA forgets less than full fine-tuning that learns as much of a new task"


@dataclass(frozen=True)
class Measured:
    """The losses of a run.

    Attributes:
      name: The name of the run.
      series: The method.
      lr: The peak learning rate; 0 for the base.
      parameters: The number of trained parameters.
      seconds: Time of training.
      task: The losses of held-out examples of the new task.
      other: The losses of other text.
    """

    name: str
    series: str
    lr: float
    parameters: int
    seconds: float
    task: Losses
    other: Losses


def page(config: Config, rows: Sequence[Measured]) -> Page:
    """Returns the page of the results, of which the first is that of the base."""
    base, *trained = rows
    minutes = sum(row.seconds for row in rows) / 60
    return Page(
        claim=_CLAIM,
        source="PEFT's comparison of methods: the score of a new task against the loss of other text",
        conditions=f"{config.model} on {' and '.join(config.data)}, {config.steps} steps of {config.length} tokens, "
        f"one seed. Losses are in nats per token: of the answers of {len(base.task.sums)} held-out examples, and of "
        f"the second halves of {len(base.other.sums)} texts of Python's language reference; ± is the standard error "
        f"over examples of the difference from the base. Training took {minutes:.0f} minutes.",
        grid=_grid(base, trained),
        findings=_findings(config, base, trained),
        draw=lambda figure: _draw(figure, base, trained),
        entries={"rows": [asdict(row) for row in rows]},
    )


def _grid(base: Measured, trained: Sequence[Measured]) -> Grid:
    header = ["method", "trained parameters", "rate", "loss, new task", "gain", "loss, other text", "forgotten"]
    rows = [[base.name, "–", "–", f"{base.task.mean:.3f}", "–", f"{base.other.mean:.3f}", "–"]]
    for row in trained:
        gain, forgotten = (f"{value:+.3f} ± {error:.3f}" for value, error in _changes(base, row))
        losses = f"{row.task.mean:.3f}", f"{row.other.mean:.3f}"
        rows.append([row.name, f"{row.parameters:,}", short(row.lr), losses[0], gain, losses[1], forgotten])
    return Grid(header, rows)


def _changes(base: Measured, row: Measured) -> tuple[tuple[float, float], tuple[float, float]]:
    """Returns the gain of the task and the increase of the loss of other text, each with its standard error."""
    return base.task.minus(row.task), row.other.minus(base.other)


def _findings(config: Config, base: Measured, trained: Sequence[Measured]) -> list[Finding]:
    """Compares full fine-tuning with the LoRA whose loss of the task is nearest, and the rates of the largest rank."""
    full = min((row for row in trained if row.series == FULL), key=lambda row: row.task.mean)
    adapted = [row for row in trained if row.series == LORA]
    nearest = min(adapted, key=lambda row: abs(row.task.mean - full.task.mean))
    largest = [row for row in adapted if row.parameters == max(row.parameters for row in adapted)]
    slow, fast = (bound(largest, key=lambda row: row.lr) for bound in (min, max))
    findings = [
        _forgets_less(nearest, full).because(f"{config.steps} steps of full fine-tuning change the weights little, too")
    ]
    if fast is not slow:
        increase, error = fast.other.minus(slow.other)
        figures = f"loss of other text, {fast.name} minus {slow.name}: {increase:+.3f} ± {error:.3f}"
        claim = "a larger learning rate forgets more"
        findings.append(
            Finding(claim, _sign(increase, error), figures).because(
                f"{config.steps} steps change the base little at either rate"
            )
        )
    return findings


def _forgets_less(one: Measured, other: Measured) -> Finding:
    """Judges the claim that one run forgets less than another and does not learn less."""
    (gain, gain_error), (increase, error) = other.task.minus(one.task), one.other.minus(other.other)
    verdict = _sign(-increase, error)
    if (verdict == "observed" and gain < -gain_error) or (verdict == "not observed" and gain > gain_error):
        verdict = "not decided"  # it also learns less, or more
    figures = (
        f"{one.name} minus {other.name}: loss of other text {increase:+.3f} ± {error:.3f}, gain of the task "
        f"{gain:+.3f} ± {gain_error:.3f}"
    )
    return Finding(_CLAIM, verdict, figures)


def _sign(difference: float, error: float) -> Verdict:
    """Judges the claim that a difference is positive."""
    if math.isnan(error) or abs(difference) <= STANDARD_ERRORS * error:
        return "not decided"
    return "observed" if difference > 0 else "not observed"


def _draw(figure: Figure, base: Measured, trained: Sequence[Measured]) -> None:
    """Draws the gain of the task against what was forgotten, a point for each run with standard errors."""
    axes = figure.subplots()
    for series, color in _COLORS.items():
        changes = [_changes(base, row) for row in trained if row.series == series]
        gains, forgotten = zip(*changes)
        (x, x_errors), (y, y_errors) = zip(*forgotten), zip(*gains)
        axes.errorbar(x, y, y_errors, x_errors, fmt="o", color=color, elinewidth=1, capsize=2, label=series)
    for row in trained:
        (gain, _), (increase, _) = _changes(base, row)
        if row.series in (LORA, FULL):  # with several runs
            label = row.name.removeprefix(f"{row.series}, ")
            axes.annotate(label, (increase, gain), xytext=(5, 5), textcoords="offset points", fontsize=7)
    axes.axvline(0, color="#999999", linewidth=1)
    axes.set(xlabel="forgotten: increase of the loss of other text, nats per token")
    axes.set(ylabel="gain: decrease of the loss of the new task, nats per token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none", framealpha=0.85)
