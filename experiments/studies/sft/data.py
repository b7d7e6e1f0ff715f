"""Reads, checks and packs the data of supervised fine-tuning."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from experiments import user_cache
from experiments.configs.sft import Config
from experiments.input import pipeline, sources
from experiments.input.checking import Findings, check_records
from experiments.input.encoding import Encoder
from experiments.input.packing import Packed, fit_length, positions
from experiments.input.tokenized import Tokenized, tokenize
from experiments.input.usage import show, usage
from experiments.studies.decoder.encoding import read_encoder
from experiments.studies.sft.splits import read_splits
from experiments.training import processes
from experiments.training.loop import plan_steps

_COST = 2.0  # the time of a training step, in evaluations of as many tokens


@dataclass(frozen=True)
class Data:
    """Training and validation data.

    Attributes:
      encoder: The encoder of the checkpoint.
      records: The records whose prompts the model answers: validation records if there are any, else training records.
      train: The training batches.
      validation: The validation batches; None if there are none, or if nothing is evaluated.
      digests: Digests of the records and of the encoder.
      validation_examples: Number of records that an evaluation reads.
    """

    encoder: Encoder
    records: sources.Records
    train: Packed
    validation: Packed | None
    digests: list[str]
    validation_examples: int

    @property
    def max_labels(self) -> int:
        """The largest number of labels in a row, rounded up to a multiple of 8."""
        counts = [split.max_labels for split in (self.train, self.validation) if split is not None]
        return -(-max(counts) // 8) * 8


def read_data(
    config: Config, directory: Path, console: Console, longest: int | None = None, evaluated: int | None = None
) -> Data:
    """Reads the data of a config and prints how many records are used.

    Args:
      config: The study's config.
      directory: The checkpoint.
      console: The output.
      longest: The longest sequence that the model supports; None if unknown.
      evaluated: The number of validation records that an evaluation reads, if an earlier part of the run has chosen it.

    Raises:
      UserError: Data is missing or malformed, or a setting needs validation data.
    """

    def report(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    splits, findings = _checked_splits(config, report)
    digests = [records.digest for records in splits.values()]
    encoder = read_encoder(config, directory)
    cache = user_cache.directory("tokens")
    tokens = {}
    for name, records in splits.items():
        lines = functools.partial(_prefixed, report, name)
        with processes.first_before_others():
            tokens[name] = tokenize(records, encoder, cache, on_bad=config.on_bad, report=lines)
    longest_example = positions(tokens.values())
    length = config.length or fit_length(tokens.values(), longest)
    if config.length is None:
        report(f"length {length:,}: the longest example has {longest_example + 1:,} tokens")
    size, pack = config.batch_size, config.pack
    packed = {"train": Packed(tokens["train"], length=length, batch_size=size, seed=config.seed, pack=pack)}
    asked = "validation" if "validation" in splits else "train"
    prompts = splits[asked]
    prompts = prompts.take(np.setdiff1d(np.arange(len(prompts)), list(tokens[asked].skipped)))
    count = 0
    if "validation" in splits and config.evaluates:
        total = len(splits["validation"])
        count = min(evaluated or _count_evaluated(config, packed["train"], tokens["validation"]), total)
        splits["validation"] = sources.first(splits["validation"], count)
        part = tokens["validation"].of_first(count)
        packed["validation"] = Packed(part, length=length, batch_size=size, seed=None, pack=pack)
        if count < total:
            report(
                f"validation: an evaluation reads {count:,} of {total:,} records, since all evaluations take at most "
                f"{config.eval_share:.0%} of the time of training (--eval-share)"
            )
    for name, batches in packed.items():
        pipeline.describe(batches, len(splits[name]), functools.partial(_prefixed, report, name))
    uses = {name: usage(splits[name], findings[name], batches) for name, batches in packed.items()}
    show(console, uses, length, longest_example)
    return Data(encoder, prompts, packed["train"], packed.get("validation"), [*digests, encoder.digest], count)


def _prefixed(report: Callable[[str], None], name: str, line: str) -> None:
    report(f"{name}: {line}")


def _checked_splits(
    config: Config, report: Callable[[str], None]
) -> tuple[dict[str, sources.Records], dict[str, tuple[Findings, ...]]]:
    """Returns the well-formed records of the splits, and what was found in them."""
    train, validation = read_splits(config)
    for line in [] if validation is None else sources.overlap_warnings(train, validation):
        report(f"validation: {line}")
    splits, findings = {}, {}
    splits["train"], findings["train"] = check_records(train, on_bad=config.on_bad, limit=config.train_examples)
    if validation is not None:
        validation, findings["validation"] = check_records(validation, on_bad=config.on_bad)
        limit = len(validation) if config.validation_examples is None else config.validation_examples
        splits["validation"] = sources.first(validation, max(1, min(limit, len(validation))))
    return splits, findings


def _count_evaluated(config: Config, train: Packed, validation: Tokenized) -> int:
    """Returns the number of validation records that evaluations may read within their share of the time."""
    total, due = plan_steps(config.epochs, train.steps_per_epoch, config.steps, config.eval_every)
    budget = config.eval_share * _COST * sum(map(train.tokens, range(total))) / (len(due) + config.eval_first)
    examples = int(np.searchsorted(np.cumsum(validation.lengths, dtype=np.int64), budget, side="right"))
    return int(validation.owners[max(examples, 1) - 1]) + 1
