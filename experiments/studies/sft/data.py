"""Reads, checks and packs the data of supervised fine-tuning."""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from rich.console import Console

from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.input import pipeline, sources
from experiments.input.checking import check_records
from experiments.input.encoding import Encoder, load_encoder
from experiments.input.packing import Packed
from experiments.input.usage import show, usage
from experiments.models import checkpoint
from experiments.studies.sft.samples import read_end_tokens
from experiments.training import processes

TOKENS = "tokens"


@dataclass(frozen=True)
class Data:
    """Training and validation data.

    Attributes:
      encoder: The encoder of the checkpoint.
      records: The records whose prompts the model answers: validation records if there are any, else training records.
      train: The training batches.
      validation: The validation batches; None if there are none.
      digests: Digests of the records and of the encoder.
    """

    encoder: Encoder
    records: sources.Records
    train: Packed
    validation: Packed | None
    digests: list[str]

    @property
    def max_labels(self) -> int:
        """The largest number of labels in a row, rounded up to a multiple of 8."""
        counts = [split.max_labels for split in (self.train, self.validation) if split is not None]
        return -(-max(counts) // 8) * 8


def read_data(config: Config, directory: Path, console: Console) -> Data:
    """Reads the data of a config and prints how many records are used.

    Args:
      config: The study's config.
      directory: The checkpoint.
      console: The output.

    Raises:
      UserError: Data is missing or malformed, or a setting needs validation data.
    """
    train, validation = read_splits(config)
    for line in [] if validation is None else sources.overlap_warnings(train, validation):
        console.print(f"validation: {line}", highlight=False, markup=False, soft_wrap=True)
    train, findings = check_records(train, on_bad=config.on_bad, limit=config.train_examples)
    findings_of = {"train": findings}
    if validation is not None:
        validation, findings_of["validation"] = check_records(validation, on_bad=config.on_bad)
        validation = sources.first(validation, min(config.validation_examples or sys.maxsize, len(validation)))
    encoder = read_encoder(config, directory)

    def pack(records: sources.Records, seed: int | None, name: str) -> Packed:
        return pipeline.batches(
            records,
            encoder,
            config.out / TOKENS,
            length=config.length,
            global_batch=config.batch.global_,
            seed=seed,
            pack=config.pack,
            on_bad=config.on_bad,
            process_index=jax.process_index(),
            report=lambda line: console.print(f"{name}: {line}", highlight=False, soft_wrap=True),
        )

    with processes.first_before_others():
        train_batches = pack(train, config.seed, "training")
        validation_batches = None if validation is None else pack(validation, None, "validation")
    uses = {"train": usage(train, findings_of["train"], train_batches)}
    records, batches, digests = train, train_batches, [train.digest]
    if validation is not None and validation_batches is not None:
        uses["validation"] = usage(validation, findings_of["validation"], validation_batches)
        records, batches, digests = validation, validation_batches, [train.digest, validation.digest]
    show(console, uses, config.length)
    records = records.take(np.setdiff1d(np.arange(len(records)), list(batches.data.skipped)))
    return Data(encoder, records, train_batches, validation_batches, [*digests, encoder.digest])


def read_splits(config: Config) -> tuple[sources.Records, sources.Records | None]:
    """Opens the training and validation records, and holds some out if the config says so."""
    train, validation = sources.splits(config.data, config.validation, config.data_form)
    names = " and ".join(config.data)
    if config.validation_share:
        if validation is not None:
            raise UserError(f"--validation-share {config.validation_share}: {names} already has validation examples")
        train, validation = sources.split(train, config.validation_share, config.seed)
    flags = {"--patience": config.patience, "--eval-every": config.eval_every}
    flags = [flag for flag, value in flags.items() if value is not None]
    if validation is None and flags:
        raise UserError(
            f"{' and '.join(flags)}: {names} has no validation examples; name some with --validation, or hold some out "
            "with --validation-share"
        )
    return train, validation


def read_encoder(config: Config, directory: Path) -> Encoder:
    """Loads the encoder of a checkpoint with the config's options."""
    ends = read_end_tokens(directory)
    vocabulary = checkpoint.read_config(directory).get("vocab_size")
    if not isinstance(vocabulary, int):  # loading the model reports it
        vocabulary = None
    return load_encoder(directory, ends[0] if ends else None, config.encoding(), ends=ends, vocabulary=vocabulary)
