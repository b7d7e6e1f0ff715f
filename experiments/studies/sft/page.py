"""The page of supervised fine-tuning: a table of bases and methods, their losses, and what was and was not observed."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure

from experiments.configs.sft import Config
from experiments.evaluation.scores import Scores, cells
from experiments.reports.curves import COLORS, finish, plot_losses
from experiments.reports.findings import Finding
from experiments.reports.page import Grid, Page
from experiments.studies.sft import evaluation
from experiments.studies.sft.judge import Scored, as_good, better


@dataclass(frozen=True)
class Trained:
    """The result of one method.

    Attributes:
      name: The name of the method.
      quantize: The quantization of its base.
      trained_parameters: Number of trained scalars.
      seconds: Time of training, including compilation and evaluation.
      validation_loss: The smallest mean validation loss per token; None without validation examples.
      scores: Scores of answers, of the base and of the adapter.
      losses: The loss of every training step.
      evaluations: Pairs of a step and its validation loss.
    """

    name: str
    quantize: str
    trained_parameters: int
    seconds: float
    validation_loss: float | None
    scores: list[Scores]
    losses: list[float]
    evaluations: list[tuple[int, float]]

    def scored(self, name: str) -> Scores | None:
        """Returns the scores of one of its models; None if it was not evaluated."""
        return next((row for row in self.scores if row.name == name), None)


def grid(results: Sequence[Trained]) -> Grid:
    """Returns costs and scores: a line for each base and for each method, unmerged and merged."""
    rows = []
    for result in results:
        for name in (evaluation.BASE, evaluation.BASE_SHOTS):
            if row := result.scored(name):
                title = name if result.quantize == "none" else f"{name} ({result.quantize})"
                rows.append([title, "–", "–", "–", *cells(row)])
    for result in results:
        loss = "–" if result.validation_loss is None else f"{result.validation_loss:.3f}"
        costs = [f"{result.trained_parameters:,}", f"{result.seconds:.0f}", loss]
        tuned = result.scored(evaluation.TUNED)
        rows.append([result.name, *costs, *(("–",) * 3 if tuned is None else cells(tuned))])
        if merged := result.scored(evaluation.MERGED):
            rows.append([f"{result.name}, merged", "–", "–", "–", *cells(merged)])
    return Grid(["method", "trained parameters", "seconds", "validation loss", "perplexity", "ROUGE-L", "BLEU"], rows)


def page(config: Config, results: Sequence[Trained]) -> Page:
    """Returns the page of one method or several."""
    return Page(
        claim="A model that trains on a task answers better than one that reads examples of it in its prompt",
        source="LoRA, table 8 (GPT-3 175B on MNLI: 40.6 with examples in its prompt, 89.5 fine-tuned)",
        conditions=_conditions(config, results),
        grid=grid(results),
        findings=list(_findings(results)),
        draw=lambda figure: _draw(figure, results),
        entries={"results": list(map(asdict, results))},
    )


def _conditions(config: Config, results: Sequence[Trained]) -> str:
    steps, minutes = len(results[0].losses), sum(result.seconds for result in results) / 60
    sentences = [f"{config.model} on {' and '.join(config.data)}; {_adapter(config)}{steps:,} steps"]
    if results[0].scores:
        sentences[0] += (
            f"; {results[0].scores[0].examples:,} test examples; perplexity per token of the reference answers, "
            "ROUGE-L with its standard error, BLEU"
        )
        selected = "step with the smallest validation loss" if results[0].evaluations else "last step"
        sentences.append(f"The scores are of the {selected}")
    sentences.append(f"Training took {minutes:.0f} minutes")
    return " ".join(f"{sentence}." for sentence in sentences)


def _adapter(config: Config) -> str:
    """Returns the rank of the adapters, or the adapter that training starts from; empty in full fine-tuning."""
    if config.init_from is not None:
        return f"from {config.init_from}, "
    return "" if {*(config.methods or (config.method,))} == {"full"} else f"rank {config.rank}, "


def _findings(results: Sequence[Trained]) -> Iterator[Finding]:
    """Compares each method with the base and with the first method, and merged with unmerged adapters."""
    first = results[0].scored(evaluation.TUNED)
    for result in results:
        tuned, merged = result.scored(evaluation.TUNED), result.scored(evaluation.MERGED)
        if tuned is None:
            continue
        for name in (evaluation.BASE, evaluation.BASE_SHOTS):
            if base := result.scored(name):
                claim = f"{result.name} is better than the {name}"
                yield better(claim, _scored(result.name, tuned), _scored(name, base))
        if result is not results[0] and first is not None:
            one, other = _scored(result.name, tuned), _scored(results[0].name, first)
            yield as_good(f"{result.name} is as good as {results[0].name}", one, other)
        if merged is not None:
            same = cells(merged) == cells(tuned)
            scores = ", ".join(cells(merged))
            yield Finding(
                f"{result.name}: the merged adapter has the scores of the unmerged one",
                "observed" if same else "not observed",
                f"Perplexity, ROUGE-L and BLEU when merged: {scores}",
            )


def _scored(name: str, row: Scores) -> Scored:
    return Scored(name, "ROUGE-L", row.rouge_l, row.rouge_l_error)


def _draw(figure: Figure, results: Sequence[Trained]) -> None:
    """Draws the training losses by step, and the validation losses as points."""
    axes = figure.subplots()
    for color, result in zip(COLORS, results):
        plot_losses(axes, color, result.name, [np.array(result.losses)])
        if result.evaluations:
            steps, losses = zip(*result.evaluations)
            axes.plot(steps, losses, color=color, marker="o", linestyle="", label=f"{result.name}, validation")
    axes.set(xlabel="step", ylabel="loss per token, nats")
    finish(axes)
