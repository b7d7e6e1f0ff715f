"""The tasks as problems of one classifier, whose heads have as many classes as the largest task."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np

import lora_jax as lora
from experiments.configs.multitask import Config
from experiments.errors import UserError
from experiments.models import checkpoint, classifier, location
from experiments.studies import provenance
from experiments.studies.problem import Problem, Split
from experiments.tasks import fields, text


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
      name: Its name.
      labels: The number of its labels. The head may have more classes.
      majority: The fraction of the test examples with the label that is the most frequent one in training.
      problem: The model and the examples.
    """

    name: str
    labels: int
    majority: float
    problem: Problem


def load(config: Config, report: Callable[[str], None]) -> list[Task]:
    """Loads the base and the tasks.

    Raises:
      UserError: Model or data are missing or malformed, or have fewer positions or tasks than the config asks for.
    """
    limits = {split: getattr(config, f"{split}_examples") for split in ("train", "validation", "test")}
    data = fields.load(config.data, limits)
    if config.tasks is not None and config.tasks > len(data):
        raise UserError(f"tasks: {config.data} has {len(data)} tasks, fewer than {config.tasks}")
    data = dict(list(data.items())[: config.tasks])
    directory = location.find(config.model)
    positions = checkpoint.read_config(directory).get("max_position_embeddings", config.length)
    if config.length > positions:
        raise UserError(f"length is {config.length}, but {config.model} has only {positions} positions")
    classes = max(len(splits["train"].names) for splits in data.values())
    network = classifier.load(directory, classes)
    apply, base = lora.nnx.functional(network)
    count = sum(leaf.size for leaf in jax.tree.leaves(base))
    report(f"base: {config.model}, {count:,} parameters with a head of {classes} classes")
    report(f"data: {config.data}, {len(data)} tasks: {', '.join(data)}")
    tokenizer = text.load_tokenizer(directory)
    tasks = []
    for name, loaded in data.items():
        names = loaded["train"].names
        splits = {
            split: Split(text.encode(tokenizer, part.texts, config.length), part.labels)
            for split, part in loaded.items()
        }
        padded = (*names, *[""] * (classes - len(names)))
        digest = provenance.digest(directory, loaded)
        problem = Problem(apply, base, splits, padded, (config.length,), network.encoder.shape, digest)
        frequent = np.bincount(loaded["train"].labels).argmax()
        tasks.append(Task(name, len(names), float(np.mean(loaded["test"].labels == frequent)), problem))
    return tasks
