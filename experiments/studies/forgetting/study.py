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
    _, some = next(iter(variants.values()))
    examples = read_examples(config, some)
    rows = []
    for name, (series, run_config) in {BASE: (BASE, some), **variants}.items():
        console.rule(name)
        rows.append(_measure(name, series, run_config, examples, config.out / _file(name)))
    report.page(config, rows).publish(config, provenance.record(config), console)
    return rows


def _variants(config: Config) -> dict[str, tuple[str, sft.Config]]:
    """Returns the series and the config of each run by its name."""
    largest: dict[str, Any] = {"rank": max(config.ranks), "lr": max(config.lr)}
    adapted = {
        f"LoRA, r = {rank}, rate {rate:g}": (LORA, {"rank": rank, "lr": rate})
        for rank in config.ranks
        for rate in config.lr
    }
    full = {f"full fine-tuning, rate {rate:g}": (FULL, {"method": "full", "lr": rate}) for rate in config.full_lr}
    others = {
        f"LoRA on attention, r = {largest['rank']}": (ATTENTION, largest | {"targets": ("attention",)}),
        f"DoRA, r = {largest['rank']}": (DORA, largest | {"method": "dora"}),
    }
    variants = adapted | others | full
    return {name: (series, _run_config(config, name, fields)) for name, (series, fields) in variants.items()}


def _run_config(config: Config, name: str, fields: Mapping[str, Any]) -> sft.Config:
    return dataclasses.replace(
        sft.DEFAULTS,
        model=config.model,
        data=config.data,
        steps=config.steps,
        length=config.length,
        validation_examples=0,
        samples=0,
        seed=config.seed,
        out=config.out / _slug(name),
        fresh=config.fresh,
        **fields,
    )


def _measure(name: str, series: str, config: sft.Config, examples: Examples, path: Path) -> Measured:
    """Trains and measures a run, or reads its measurements."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("out", "fresh")}
    digest = hashlib.sha256(json.dumps([settings, examples.digest], default=str).encode()).hexdigest()
    stored = read_json(path, dict) if path.exists() else {}
    if stored.pop("settings", None) == digest:
        losses = {key: Losses(**stored.pop(key)) for key in ("task", "other")}
        return Measured(**stored, **losses)
    if series == BASE:
        measured = Measured(name, series, None, 0, 0.0, *measure(config, None, examples))
    else:
        trained = study.run(config)
        task, other = measure(config, config.out / ADAPTER, examples)
        measured = Measured(name, series, config.lr, trained.trained_parameters, trained.seconds, task, other)
    write_json(path, {"settings": digest} | dataclasses.asdict(measured))
    outputs.clear(config.out, BEST, "checkpoints")  # with full fine-tuning, gigabytes
    return measured


def _file(name: str) -> str:
    return f"{_slug(name)}.json"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower()).strip("-")
