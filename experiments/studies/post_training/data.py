"""Batches of the records of post-training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import user_cache
from experiments.configs.post_training import PostTraining
from experiments.input import sources
from experiments.input.answer_batches import AnswerBatches, answer_batches
from experiments.input.answers import AnswerEncoder
from experiments.input.checking import check_records
from experiments.input.tokenized import tokenize
from experiments.studies.decoder.encoding import read_encoder, read_end_tokens
from experiments.studies.post_training.records import read_splits
from experiments.training import processes

_MULTIPLE, _MOST = 16, 2048  # of the length


@dataclass(frozen=True)
class Data:
    """Training and held-out data.

    Attributes:
      encoder: The encoder of the records.
      records: The held-out records.
      problems: The training records.
      train: The training batches.
      held_out: The held-out batches, in the order of the records.
      length: The length of rows.
      max_labels: The largest number of labels in a row, rounded up to a multiple of 8.
      digests: Digests of the records and of the encoder.
      decode: Returns the text of tokens, without special tokens.
      ends: The tokens that end an answer.
    """

    encoder: AnswerEncoder
    records: sources.Records
    problems: sources.Records
    train: AnswerBatches
    held_out: AnswerBatches
    length: int
    max_labels: int
    digests: list[str]
    decode: Callable[[list[int]], str]
    ends: tuple[int, ...]


def read_data(
    config: PostTraining,
    directory: Path,
    report: Callable[[str], None],
    longest: int | None = None,
    new_tokens: int = 0,
) -> Data:
    """Reads the data of a config.

    Args:
      config: The study's config.
      directory: The checkpoint.
      report: Called with lines that say which records are used.
      longest: The longest sequence that the model supports; None if unknown.
      new_tokens: The number of tokens of an answer that follows each row.

    Raises:
      UserError: Data is missing or malformed, or no record fits into the length.
    """
    splits = {}
    limits = {"training": config.train_examples, "held-out": None}
    for name, records in read_splits(config).items():
        splits[name], findings = check_records(records, on_bad=config.on_bad, limit=limits[name], use=config.use)
        if skipped := sum(one.skipped for one in findings):
            reasons = "; ".join(reason for one in findings for reason in one.reasons)
            report(f"{name}: skipped: {skipped:,} malformed records, such as {reasons}")
    held_out = splits["held-out"]
    count = len(held_out) if config.validation_examples is None else min(config.validation_examples, len(held_out))
    splits["held-out"] = sources.first(held_out, count)
    encoder, cache = AnswerEncoder(read_encoder(config, directory)), user_cache.directory("tokens")
    tokens = {}
    for name, records in splits.items():
        with processes.first_before_others():
            tokens[name] = tokenize(records, encoder, cache, on_bad=config.on_bad)
    length = config.length
    if length is None:
        most = max(int(one.lengths.max(initial=1)) for one in tokens.values()) + new_tokens
        length = min(-(-most // _MULTIPLE) * _MULTIPLE, longest or _MOST, _MOST)
        report(f"length {length:,}: the longest record has {most:,} tokens")
    labels = max(int((one.lengths - one.firsts).max(initial=1)) for one in tokens.values())
    batches = {
        name: answer_batches(
            records,
            encoder,
            cache,
            length=length - new_tokens,
            global_batch=config.batch_size,
            seed=config.seed if name == "training" else None,
            on_bad=config.on_bad,
            report=lambda line, name=name: report(f"{name}: {line}"),
        )
        for name, records in splits.items()
    }
    tokenizer = encoder.encoder.tokenizer
    return Data(
        encoder=encoder,
        records=splits["held-out"],
        problems=splits["training"],
        train=batches["training"],
        held_out=batches["held-out"],
        length=length,
        max_labels=min(-(-max(labels, new_tokens) // 8) * 8, length),
        digests=[*(records.digest for records in splits.values()), encoder.digest],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        ends=read_end_tokens(directory),
    )
