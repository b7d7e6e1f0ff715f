"""Tunes a sentence encoder with in-batch negatives, and compares retrieval before and after."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

import lora_jax as lora
from experiments.configs.embed import Config
from experiments.models import classifier, location
from experiments.reports.results import write_json
from experiments.studies import encoder_export, provenance
from experiments.studies.embed import pairs as pairs_of
from experiments.studies.embed import report
from experiments.studies.embed.pairs import Candidates, Pairs
from experiments.studies.embed.report import Result
from experiments.studies.embed.training import Encoder, Method, fit, make_method
from experiments.tasks import text
from experiments.training import mesh as meshes
from experiments.training import outputs, processes
from experiments.training.run import TrainingRun

_FIGURE, _RECORD = "embed.png", "run.json"


@outputs.exclusive
def run(config: Config) -> list[Result]:
    """Runs or resumes the methods of the config, prints a table, and writes a JSON record and a figure.

    Raises:
      UserError: Model or data are missing or malformed, or do not fit the mesh.
    """
    console = processes.console()
    meshes.make_mesh(config.mesh)
    meshes.check_batch(config.batch_size, config.mesh, "batch_size")
    with processes.first_before_others():
        directory = location.find(config.model)
        if processes.is_first():
            outputs.claim(config.out, _RECORD, _FIGURE)
    tokenizer = text.load_tokenizer(directory)
    pairs = pairs_of.read(config, tokenizer, lambda line: console.print(line, highlight=False, soft_wrap=True))
    digest = [provenance.digest(directory, {}), *(pairs[split].digest for split in pairs_of.SPLITS)]
    methods = [make_method(name, config) for name in config.methods]
    with meshes.use_mesh(config.mesh) as mesh:
        encoder = Encoder(directory, config, mesh)
        for method in methods:
            encoder.check(method)
        results = [_measure_base(encoder, pairs, config, digest, console)]
        candidates = encoder.find_candidates(pairs["train"], config.negatives)
        for method in methods:
            results.append(_train(encoder, method, pairs, candidates, config, digest, console))
    if processes.is_first():
        _show(config, results, pairs, console)
    return results


def _measure_base(
    encoder: Encoder, pairs: Mapping[str, Pairs], config: Config, digest: list[str], console: Console
) -> Result:
    """Measures the base on the test pairs, or reads its result."""
    shared = {name: getattr(config, name) for name in ("lengths", "answer_length", "test_examples")}
    stored = provenance.directory(config.out, "base", [digest, shared], fresh=config.fresh) / "result.json"
    if not processes.broadcast(stored.exists()):
        started = time.perf_counter()
        ranks, nearest = encoder.rank(encoder.base, {}, pairs["test"])
        seconds = time.perf_counter() - started
        with processes.first_before_others():
            if processes.is_first():
                Result("base", 0, seconds, ranks.tolist(), nearest.tolist(), [], []).save(stored)
    result = Result.load(stored)
    for count in report.COUNTS:
        figure = report.recall(result.ranks, count)
        console.print(f"base: recall@{count} {figure} % of {len(pairs['test']):,} test queries", highlight=False)
    return result


def _train(
    encoder: Encoder,
    method: Method,
    pairs: Mapping[str, Pairs],
    candidates: Sequence[Candidates],
    config: Config,
    digest: list[str],
    console: Console,
) -> Result:
    """Trains a method, resumes its run, or reads the result of a finished run."""
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_NUMBERS}
    settings |= {"spec": repr(method.spec), "rules": repr(method.rules), "lr": method.lr}
    name = method.name.replace(", ", "-").replace(" ", "-")
    directory = provenance.directory(config.out, name, [digest, settings], fresh=config.fresh)
    stored = directory / "result.json"
    if processes.broadcast(stored.exists()):
        return Result.load(stored)
    base = encoder.quantize(method)
    run = TrainingRun(
        directory,
        jax.sharding.get_mesh(),
        asdict(config),
        config.checkpoint_every,
        profile=config.profiled_steps(),
    )
    state, history = fit(encoder, base, method, pairs, candidates, config, run, console)
    ranks, nearest = encoder.rank(base, state.delta, pairs["test"])
    trained = sum(leaf.size for leaf in jax.tree.leaves(lora.partition(state.delta)[0]))
    delta = meshes.gather(state.delta)
    with processes.first_before_others():
        if processes.is_first():
            _save(encoder, method, delta, config, directory)
            Result(
                method=method.name,
                trained_parameters=trained,
                seconds=history.seconds,
                ranks=ranks.tolist(),
                nearest=nearest.tolist(),
                losses=history.losses,
                evaluations=history.evaluations,
            ).save(stored)
            outputs.clear(directory, "checkpoints")
    return Result.load(stored)


_NOT_NUMBERS = (
    *("out", "fresh", "fast", "methods", "model", "data", "validation", "test", "mesh", "distributed", "profile"),
    *("on_bad", "quantize", "lora_lr", "full_lr", "checkpoint_every"),
)
"""Settings that affect the results only by rounding, or that the digest or the method covers."""


def _save(encoder: Encoder, method: Method, delta: dict[str, Any], config: Config, directory: Path) -> None:
    names = classifier.encoder_names(encoder.config, "")
    lora.save(directory / "adapter", delta, names=names)
    if method.name != "full":
        base = encoder_export.published_name(config.model)
        lora.peft.save(
            directory / encoder_export.DIRECTORY, delta, names, base_model=base, task_type="FEATURE_EXTRACTION"
        )


def _show(config: Config, results: list[Result], pairs: Mapping[str, Pairs], console: Console) -> None:
    console.print()
    report.show_examples(console, results, pairs["test"])
    console.print(report.table(results))
    for line in report.verdicts(results):
        console.print(line, highlight=False, soft_wrap=True)
    title = f"{config.model}: {len(pairs['test']):,} test queries of {' and '.join(config.data)}"
    report.draw(config.out / _FIGURE, results, title)
    write_json(config.out / _RECORD, provenance.record(config, aim=report.AIM, results=report.record(results)))
    console.print(
        f"written to {config.out}: {_RECORD}, {_FIGURE}, and a directory for each run with adapter/ and, for LoRA, "
        "peft/, which opens in sentence-transformers: SentenceTransformer(BASE).load_adapter(DIRECTORY)",
        highlight=False,
        soft_wrap=True,
    )
