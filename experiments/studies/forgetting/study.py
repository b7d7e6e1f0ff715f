"""Fine-tunes a decoder by several methods, and measures a new task and other text (PEFT's comparison of methods)."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.configs import sft
from experiments.configs.forgetting import Config
from experiments.reports.page import FILES
from experiments.reports.results import read_json, write_json
from experiments.studies import provenance
from experiments.studies.forgetting import report
from experiments.studies.forgetting.losses import Examples, Losses, measure, read_examples
from experiments.studies.forgetting.report import ATTENTION, BASE, DORA, FULL, LORA, Measured
from experiments.studies.sft import study
from experiments.studies.sft.report import ADAPTER, BEST
from experiments.training import outputs, processes


@dataclasses.dataclass(frozen=True)
class Variant:
    """A run of the study.

    Attributes:
      series: The method.
      lr: The peak learning rate; 0 for the base, which is not trained.
      config: The config of its training.
    """

    series: str
    lr: float
    config: sft.Config


@outputs.exclusive
def run(config: Config) -> list[Measured]:
    """Runs or resumes the study, prints a table and findings, and writes a page, a figure and a JSON record.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run`, or the data has no held-out examples.
    """
    variants = _variants(config)
    outputs.begin(config.out, *FILES, *(_file(name) for name in (BASE, *variants)), fresh=config.fresh)
    console = processes.console()
    minutes = "" if config.fast else f"; with the default settings about {config.MINUTES} minutes"
    console.print(f"{len(variants)} runs{minutes}; after an interruption, the same command resumes", soft_wrap=True)
    some = next(iter(variants.values()))
    examples = read_examples(config, some.config)
    rows = []
    for name, variant in {BASE: Variant(BASE, 0.0, some.config), **variants}.items():
        console.rule(name)
        rows.append(_measure(name, variant, examples, config.out / _file(name)))
    report.page(config, rows).publish(config, provenance.record(config), console)
    return rows


def _variants(config: Config) -> dict[str, Variant]:
    """Returns the runs by name."""
    largest, lr = max(config.ranks), max(config.lr)
    runs: list[tuple[str, str, float, dict[str, Any]]] = [
        *(
            (f"LoRA, r = {rank}, rate {rate:g}", LORA, rate, {"rank": rank})
            for rank in config.ranks
            for rate in config.lr
        ),
        (f"LoRA on attention, r = {largest}", ATTENTION, lr, {"rank": largest, "targets": ("attention",)}),
        (f"DoRA, r = {largest}", DORA, lr, {"rank": largest, "method": "dora"}),
        *((f"full fine-tuning, rate {rate:g}", FULL, rate, {"method": "full"}) for rate in config.full_lr),
    ]
    return {name: Variant(series, lr, _run_config(config, name, lr, fields)) for name, series, lr, fields in runs}


def _run_config(config: Config, name: str, lr: float, fields: Mapping[str, Any]) -> sft.Config:
    return dataclasses.replace(
        sft.DEFAULTS,
        model=config.model,
        data=config.data,
        lr=lr,
        steps=config.steps,
        length=config.length,
        validation_examples=0,
        samples=0,
        seed=config.seed,
        out=config.out / _slug(name),
        fresh=config.fresh,
        **fields,
    )


def _measure(name: str, variant: Variant, examples: Examples, path: Path) -> Measured:
    """Trains and measures a run, or reads its measurements."""
    config = variant.config
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "fresh")}
    digest = hashlib.sha256(json.dumps([settings, examples.digest], default=str).encode()).hexdigest()
    stored = read_json(path, dict) if path.exists() else {}
    if stored.pop("settings", None) == digest:
        task, other = (Losses(**stored.pop(part)) for part in ("task", "other"))
        return Measured(**stored, task=task, other=other)
    adapter, parameters, seconds = None, 0, 0.0
    if variant.series != BASE:
        trained = study.run(config)
        adapter, parameters, seconds = config.out / ADAPTER, trained.trained_parameters, trained.seconds
    task, other = measure(config, adapter, examples)
    measured = Measured(name, variant.series, variant.lr, parameters, seconds, task, other)
    write_json(path, {"settings": digest} | dataclasses.asdict(measured))
    if variant.series != BASE:
        outputs.clear(config.out, BEST, "checkpoints")  # with full fine-tuning, gigabytes
    return measured


def _file(name: str) -> str:
    return f"{_slug(name)}.json"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")
