"""The answers of a decoder by adapted layers and rank, with the paper's task (QLoRA paper, §4 and figure 2)."""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.configs import sft
from experiments.configs.all_linear import Config
from experiments.configs.decoder import BatchSizes, Target
from experiments.configs.qlora_scripts import FIXED
from experiments.errors import UserError
from experiments.input import sources
from experiments.reports.findings import Finding
from experiments.reports.page import FILES, Grid, Page
from experiments.studies import provenance
from experiments.studies.sft import evaluation, study
from experiments.studies.sft.held_out import find_held_out
from experiments.studies.sft.judge import Scored, as_good, better
from experiments.studies.sft.report import BEST
from experiments.training import outputs, processes

_SHARE = 0.02  # of the examples, which are held out if the data is not split
_FULL = "full fine-tuning"
_TARGETS: dict[str, tuple[Target, ...]] = {
    "query, value": ("query", "value"),
    "attention": ("attention",),
    "feed-forward": ("feed-forward",),
    "all linear": ("attention", "feed-forward"),
}


@dataclass(frozen=True)
class Measured:
    """The scores of a run.

    Attributes:
      layers: The adapted layers.
      rank: The rank; None in full fine-tuning.
      parameters: The number of trained parameters.
      perplexity: Perplexity per token of the reference answers.
      rouge_l: Mean ROUGE-L of the seeds, from 0 to 100.
      error: The standard error over the examples, the mean of the seeds'.
    """

    layers: str
    rank: int | None
    parameters: int
    perplexity: float
    rouge_l: float
    error: float

    @property
    def scored(self) -> Scored:
        """The score with its names."""
        name = self.layers if self.rank is None else f"{self.layers}, r = {self.rank}"
        return Scored(name, "ROUGE-L", self.rouge_l, self.error)


@outputs.exclusive
def run(config: Config) -> list[Measured]:
    """Runs or resumes the study, prints a table and findings, and writes a page, a figure and a JSON record.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run` and :func:`experiments.studies.sft.evaluation.run`.
    """
    outputs.claim(config.out, *FILES)
    console = processes.console()
    settings = [(layers, rank) for layers in _TARGETS for rank in config.ranks] + [(_FULL, None)]
    console.print(f"{len(settings) * config.seeds} runs; after an interruption, the same command resumes")
    rows = []
    for layers, rank in settings:
        console.rule(layers if rank is None else f"{layers}, r = {rank}")
        rows.append(_measure(config, layers, rank))
    page = Page(
        claim="LoRA on all linear layers of a quantized base matches full fine-tuning, whatever the rank",
        source="QLoRA, figure 2 (LLaMA 7B on Alpaca, ROUGE-L)",
        conditions=f"{config.model} in bfloat16 on {config.data}: ROUGE-L ± its standard error of greedy answers to "
        f"{config.test_examples or 'all'} held-out examples, {config.seeds} seeds; LoRA with alpha {config.alpha:g} on "
        f"a base in NF4 with double quantization, {config.steps} steps of {config.batch_size} sequences, as in the "
        "authors' scripts, which also group examples by length. The learning rate of full fine-tuning, "
        f"{config.full_lr:g}, is that of Alpaca's authors.",
        grid=_grid(rows),
        findings=_findings(rows),
        draw=lambda figure: _draw(figure, rows),
        entries={"rows": list(map(asdict, rows))},
    )
    page.publish(config, provenance.record(config), console)
    return rows


def _run_config(config: Config, layers: str, rank: int | None, seed: int) -> sft.Config:
    of_method: dict[str, Any] = {"method": "full", "lr": config.full_lr}
    if rank is not None:
        of_method = {"targets": _TARGETS[layers], "rank": rank, "alpha": config.alpha, "dropout": config.dropout}
        of_method |= {"lr": config.lr, "quantize": "nf4"}
    name = layers.replace(", ", "-").replace(" ", "-") + ("" if rank is None else f"-r{rank}")
    run_config = dataclasses.replace(
        sft.DEFAULTS,
        model=config.model,
        data=(config.data,),
        template=config.template,
        on_bad="skip",  # Alpaca has empty answers
        train_examples=config.train_examples,
        validation_examples=0,
        test_examples=config.test_examples,
        samples=0,
        epochs=config.steps or config.epochs,  # at least one step each
        steps=config.steps,
        batch=BatchSizes(config.batch_size),
        length=config.length,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        clip=config.clip,
        label_smoothing=config.label_smoothing,
        new_tokens=config.new_tokens or sft.DEFAULTS.new_tokens,
        seed=seed,
        checkpoint_every=config.checkpoint_every,
        mesh=config.mesh,
        distributed=config.distributed,
        profile=config.profile,
        out=config.out / f"{name}-seed{seed}",
        fresh=config.fresh,
        **FIXED,
        **of_method,
    )
    is_split = find_held_out(run_config) is not None
    return run_config if is_split else dataclasses.replace(run_config, validation_share=_SHARE)


def _measure(config: Config, layers: str, rank: int | None) -> Measured:
    scores, parameters = [], 0
    for seed in range(config.seed, config.seed + config.seeds):
        run_config = _run_config(config, layers, rank, seed)
        held_out = find_held_out(run_config)
        if held_out is None:
            raise UserError(f"--data {sources.unweighted(run_config.data)}: no held-out examples to answer")
        parameters = study.run(run_config).trained_parameters
        answered = evaluation.run(run_config, held_out, run_config.out / BEST, with_base=False)
        scores.append(next(row for row in answered if row.name == evaluation.TUNED))
    return Measured(
        layers,
        rank,
        parameters,
        float(np.mean([row.perplexity for row in scores])),
        float(np.mean([row.rouge_l for row in scores])),
        float(np.mean([row.rouge_l_error for row in scores])),
    )


def _grid(rows: Sequence[Measured]) -> Grid:
    cells = [
        [row.scored.name, f"{row.parameters:,}", f"{row.perplexity:.2f}", f"{row.rouge_l:.1f} ± {row.error:.1f}"]
        for row in rows
    ]
    return Grid(["", "parameters", "perplexity", "ROUGE-L"], cells)


def _findings(rows: Sequence[Measured]) -> list[Finding]:
    groups = {layers: [row for row in rows if row.layers == layers] for layers in _TARGETS}
    best = {layers: max(group, key=lambda row: row.rouge_l).scored for layers, group in groups.items()}
    every = sorted(groups["all linear"], key=lambda row: row.rank or 0)
    findings = [
        better("all linear layers are better than query and value", best["all linear"], best["query, value"]),
        as_good("QLoRA on all linear layers is as good as full fine-tuning", best["all linear"], rows[-1].scored),
    ]
    if len(every) > 1:
        claim = "on all linear layers, the smallest rank is as good as the largest"
        findings.append(as_good(claim, every[0].scored, every[-1].scored))
    return findings


def _draw(figure: Figure, rows: Sequence[Measured]) -> None:
    """Draws the scores by adapted layers, a point for each rank."""
    axes = figure.subplots()
    layers = list(dict.fromkeys(row.layers for row in rows))
    for row in rows:
        axes.errorbar(layers.index(row.layers), row.rouge_l, row.error, marker="o", capsize=3, color="#4c78a8")
        label = "" if row.rank is None else f"r = {row.rank}"
        axes.annotate(label, (layers.index(row.layers), row.rouge_l), xytext=(6, 0), textcoords="offset points")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_ylabel("ROUGE-L of held-out answers")
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)
