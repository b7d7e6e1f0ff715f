"""The perplexity of a base by data type, before and after adaptation (QLoRA paper, §3, §4, tables 2 and 3)."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.configs import sft
from experiments.configs.datatypes import Config
from experiments.errors import UserError
from experiments.input import sources
from experiments.models import location
from experiments.models.formats import FORMATS
from experiments.pretrained.files import open_files
from experiments.reports.findings import Finding, Verdict
from experiments.reports.page import FILES, Grid, Page
from experiments.studies import provenance
from experiments.studies.sft import program, study
from experiments.training import outputs, processes
from lora_jax.quantization import Quantized

_STORED = "as stored"
_PAPER = {"int4": "34.34", "fp4": "31.07", "nf4, double": "27.41"}
_PAPER_NOTE = (
    "The scripts group examples by length and page the optimizer state, which changes no number but the order of the "
    "examples; the table's perplexities are of other models on the Pile's Common Crawl."
)
_TOLERANCE = 0.01  # of a loss in nats
_SIXTEEN = ("nf4", "fp4", "int4")


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measurements of one data type.

    Attributes:
      name: The data type.
      bits: Bits per quantized weight; those of the dtype without quantization.
      before: The loss per token of held-out text in nats, of the base.
      after: The same with the trained adapter.
    """

    name: str
    bits: float
    before: float
    after: float


@outputs.exclusive
def run(config: Config) -> list[Measured]:
    """Measures all data types, prints a table and findings, and writes a page, a figure and a JSON record.

    Raises:
      UserError: There is no validation data; see also :func:`experiments.studies.sft.study.run`.
    """
    _, validation = sources.splits(config.data)
    if validation is None and not config.validation_share:
        raise UserError(
            f"--data {' '.join(config.data)} has no validation examples; hold some out with --validation-share"
        )
    outputs.claim(config.out, *FILES)
    console = processes.console()
    rows, bases = [], {}
    for name, fields in _variants(config).items():
        console.rule(name)
        run_config = _run_config(config, name, fields)
        report = study.run(run_config)
        (_, before), *_, (_, after) = report.evaluations
        bits, occupancy = _inspect(run_config)
        rows.append(Measured(name, bits, before, after))
        if occupancy is not None and name in _SIXTEEN:
            bases[name] = occupancy
    page = Page(
        claim="NF4 is better than FP4 and Int4, and an adapter recovers what four bits lose",
        source="QLoRA, tables 2 and 3 (125M to 13B models; perplexity on Pile Common Crawl)",
        conditions=f"{config.model} on {' and '.join(config.data)}: perplexity per token of "
        f"{config.validation_examples} held-out examples, whole texts; LoRA of rank {config.rank} on all linear "
        f"layers, {config.extent()}." + (f" {_PAPER_NOTE}" if config.paper else ""),
        grid=_grid(rows),
        findings=_findings(rows, config.dtype),
        draw=lambda figure: _draw(figure, rows, bases),
        entries={"rows": list(map(dataclasses.asdict, rows)), "occupancy": bases},
        size=(11.0, 4.4),
    )
    page.publish(config, provenance.record(config), console)
    return rows


def _variants(config: Config) -> dict[str, dict[str, Any]]:
    variants: dict[str, dict[str, Any]] = {config.dtype: {"quantize": "none"}}
    if open_files(location.find(config.model)).codes() is not None:
        variants[_STORED] = {"quantize": "stored"}
    for name in FORMATS:
        for double in (True, False):
            title = f"{name}, double" if double else name
            variants[title] = {"quantize": name, "double_quantization": double}
    return variants


def _run_config(config: Config, name: str, fields: Mapping[str, Any]) -> sft.Config:
    return dataclasses.replace(
        sft.DEFAULTS,
        model=config.model,
        data=config.data,
        template=config.template,
        on_bad="skip" if config.paper else "error",  # Alpaca has empty answers
        train_on="all",
        rank=config.rank,
        lr=config.lr,
        length=config.length,
        validation_share=config.validation_share,
        eval_every=config.steps,
        eval_share=0.9,
        validation_examples=config.validation_examples,
        samples=0,
        seed=config.seed,
        out=config.out / name.replace(", ", "-").replace(" ", "-"),
        fresh=config.fresh,
        **config.fine_tuning(),
        **fields,
    )


def _inspect(config: sft.Config) -> tuple[float, list[float] | None]:
    """Returns the bits per quantized weight, and the share of each code of four bits if there are such codes."""
    abstract = program.abstract(config)
    with jax.set_mesh(abstract.mesh):
        base = abstract.load(location.find(config.model))
    leaves = jax.tree.leaves(base, is_leaf=lambda node: isinstance(node, Quantized))
    quantized = [leaf for leaf in leaves if isinstance(leaf, Quantized)]
    if not quantized:
        return 8.0 * jnp.dtype(config.dtype).itemsize, None
    stored = sum(part.nbytes for leaf in quantized for part in jax.tree.leaves(leaf))
    bits = 8 * stored / sum(math.prod(leaf.shape) for leaf in quantized)
    if config.quantize not in _SIXTEEN:
        return bits, None
    counts = np.zeros(16)
    for leaf in quantized:
        codes = np.asarray(leaf.codes)
        counts += np.bincount((codes & 15).ravel(), minlength=16) + np.bincount((codes >> 4).ravel(), minlength=16)
    return bits, (counts / counts.sum()).tolist()


def _grid(rows: Sequence[Measured]) -> Grid:
    header = ["base", "bits per weight", "perplexity of the base", "with the adapter", "paper"]
    cells = [
        [row.name, f"{row.bits:.2f}", f"{math.exp(row.before):.2f}", f"{math.exp(row.after):.2f}", _paper(row)]
        for row in rows
    ]
    return Grid(header, cells)


def _paper(row: Measured) -> str:
    return _PAPER.get(row.name, "–")


def _findings(rows: Sequence[Measured], dtype: str) -> list[Finding]:
    by_name = {row.name: row for row in rows}
    normal, single, base = by_name["nf4, double"], by_name["nf4"], by_name[dtype]
    findings = [
        _smaller(f"NF4 is better than {other.upper()}", normal, by_name[f"{other}, double"])
        for other in ("fp4", "int4")
    ]
    lost, left = normal.before - base.before, normal.after - base.after
    return [
        *findings,
        Finding(
            "double quantization loses nothing",
            "observed" if normal.before - single.before <= _TOLERANCE else "not observed",
            f"loss of NF4 with it minus without: {normal.before - single.before:+.4f}; {single.bits - normal.bits:.2f} "
            "bits per weight less",
        ),
        Finding(
            "the adapter recovers what NF4 loses",
            "observed" if left <= max(_TOLERANCE, lost / 2) else "not observed",
            f"loss above that of {dtype}: {lost:+.4f} before, {left:+.4f} after adaptation",
        ),
    ]


def _smaller(claim: str, one: Measured, other: Measured) -> Finding:
    difference = one.before - other.before
    verdict: Verdict = (
        "not decided" if abs(difference) <= _TOLERANCE else "observed" if difference < 0 else "not observed"
    )
    return Finding(claim, verdict, f"loss of {one.name} minus that of {other.name}: {difference:+.4f}")


def _draw(figure: Figure, rows: Sequence[Measured], occupancy: Mapping[str, Sequence[float]]) -> None:
    """Draws the perplexities, and how often each code of the formats with sixteen levels occurs."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    places = np.arange(len(rows))
    for offset, color, label, losses in (
        (-0.2, "#bbbbbb", "base", [row.before for row in rows]),
        (0.2, "#4c78a8", "with the adapter", [row.after for row in rows]),
    ):
        left.barh(places + offset, np.exp(losses), height=0.38, color=color, label=label)
    left.set_yticks(places, [row.name for row in rows])
    left.invert_yaxis()
    lowest = min(row.after for row in rows)
    left.set(xlabel="perplexity per token of held-out text", xlim=(0.9 * math.exp(lowest), None))
    left.legend(edgecolor="none", loc="lower right")
    for (name, shares), color in zip(occupancy.items(), ("#4c78a8", "#f58518", "#54a24b")):
        levels = np.asarray(FORMATS[name]().decode(jnp.arange(16, dtype=jnp.uint8)))
        order = np.argsort(levels)
        right.plot(levels[order], np.asarray(shares)[order], marker="o", markersize=4, color=color, label=name.upper())
    right.axhline(1 / 16, color="#999999", linewidth=1, label="equally filled")
    right.set(xlabel="level, as a share of the block's largest", ylabel="share of the weights")
    right.legend(edgecolor="none")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
