"""The curves of the encoder, on the quickstart's task: LoRA of several ranks, and full fine-tuning."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console

import lora_jax as lora
from experiments.baselines.specs import LINEAR
from experiments.configs.lr_sweep import Config
from experiments.models import bert, checkpoint, location
from experiments.studies import head, provenance
from experiments.studies.head import Start
from experiments.studies.joint import train_jointly
from experiments.studies.lr_sweep.curve import Curve, measured
from experiments.studies.problem import HEAD, Problem, Split, answers, load
from experiments.training import mesh as meshes
from experiments.training import outputs
from experiments.training.mesh import MeshSizes
from experiments.training.optimizer import published_rate
from experiments.training.run import TrainingRun

LORA, ATTENTION, FULL = "LoRA, rank {}", "LoRA on attention, rank {}", "full fine-tuning"
_ATTENTION = r"attention/.*kernel"
_AT_ONCE = 2  # members that train in parallel on a CPU; see experiments/benchmarks/RESULTS.md


@dataclass(frozen=True)
class Line:
    """What one curve trains.

    Attributes:
      name: The method.
      spec: Recipes by pattern of paths.
      rates: The learning rates.
    """

    name: str
    spec: Mapping[str, Any]
    rates: tuple[float, ...]


def lines(config: Config) -> list[Line]:
    """Returns the curves of a config. The head is trained in all of them, with the same learning rate."""
    adapted = [(LORA, LINEAR, rank) for rank in config.ranks]
    if config.attention:
        adapted.append((ATTENTION, _ATTENTION, config.attention_rank))
    curves = [
        Line(name.format(rank), {where: lora.LoRA(rank, alpha=config.alpha), HEAD: lora.Full()}, config.lora_rates)
        for name, where, rank in adapted
    ]
    return [*curves, Line(FULL, {"": lora.Full()}, config.full_rates)]


def curves(config: Config, console: Console) -> Iterator[Curve]:
    """Yields the curves, which are trained, resumed or read.

    Raises:
      UserError: Model or data are missing or malformed, a rank exceeds that of the weights, or all runs diverged.
    """
    examples = config.head_examples + config.train_examples
    limits = {"train": examples, "validation": config.validation_examples, "test": 1}
    problem = load(config.model, config.data, limits, config.lengths, report=console.print)
    for line in lines(config):
        problem.check(line.name, line.spec)
    shape = bert.BertConfig.from_json(checkpoint.read_config(location.find(config.model)))
    of_head, others = _divide(problem, config.head_examples)
    inputs = [problem.digest, config.head_examples]
    start = head.run(of_head, provenance.directory(config.out, "head", inputs, fresh=config.fresh), console)
    start = replace(start, problem=others)
    split = start.problem.splits["validation"]
    before = _losses(_base_logits(start)[:, None], split.labels)
    for line in lines(config):
        yield _curve(
            config,
            start,
            line,
            published_rate(shape.hidden_size, shape.model_type, full=line.name == FULL),
            before,
            console,
        )


def _divide(problem: Problem, count: int) -> tuple[Problem, Problem]:
    """Returns the problem with the first `count` training examples, and with the others."""
    train = problem.splits["train"]

    def part(examples: slice) -> Problem:
        split = Split(train.sequences[examples], train.labels[examples])
        return replace(problem, splits=problem.splits | {"train": split})

    return part(slice(count)), part(slice(count, None))


def _curve(config: Config, start: Start, line: Line, rule: float, before: np.ndarray, console: Console) -> Curve:
    shared = {name: getattr(config, name) for name in _SHARED}
    inputs = [start.problem.digest, shared, repr(line.spec), line.rates]
    name = line.name.lower().replace(",", "").replace(" ", "-")
    directory = provenance.directory(config.out, name, inputs, fresh=config.fresh)
    stored = directory / "result.json"
    if stored.exists():
        return Curve.load(stored)
    console.print(f"{line.name}: {len(line.rates)} learning rates", highlight=False)
    run = TrainingRun(directory, meshes.make_mesh(MeshSizes()), asdict(config), config.checkpoint_every)
    specs = [line.spec] * len(line.rates)
    at_once = _AT_ONCE if jax.default_backend() == "cpu" else None
    joint = train_jointly(start, specs, line.rates, config, run, console, at_once=at_once, once=True)
    labels = start.problem.splits["validation"].labels
    curve = measured(
        config.model,
        line.name,
        list(line.rates),
        _losses(joint.logits, labels),
        joint.scores(labels),
        start=float(before.mean()),
        rule=rule,
        seconds=joint.history.seconds,
    )
    curve.save(stored)
    outputs.clear(directory, "checkpoints")
    return curve


_SHARED = (
    *(
        "head_examples",
        "train_examples",
        "validation_examples",
        "batch_size",
        "epochs",
        "lengths",
        "warmup",
        "label_smoothing",
    ),
    *("clip", "seed"),
)
"""Settings that affect the result of every curve."""


def _base_logits(start: Start) -> np.ndarray:
    apply, split = jax.jit(start.problem.apply), start.problem.splits["validation"]
    return answers(lambda *inputs: apply(start.base, *inputs)[0], split, start.problem.lengths)


def _losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the cross-entropy of each example and member, `float[examples, members]`."""
    right = np.broadcast_to(labels[:, None], logits.shape[:2])
    return np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, right))
