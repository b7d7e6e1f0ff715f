"""The records of a decoder's study, which are checked before anything that takes seconds is imported."""

from collections.abc import Mapping

from experiments.configs.decoder import DecoderConfig
from experiments.errors import UserError
from experiments.input import sources
from experiments.input.checking import SFT, Use, check_records

_FIRST = 2000  # records to check early; all are checked before training


def check(config: DecoderConfig, splits: Mapping[str, sources.Records], use: Use = SFT) -> None:
    """Checks the first records of each split, and prints what the run is about.

    Args:
      config: The study's config.
      splits: The records by the name of their split.
      use: The training that uses the records.

    Raises:
      UserError: One of the first records is malformed.
    """
    for records in splits.values():
        check_records(sources.first(records, min(len(records), _FIRST)), on_bad=config.on_bad, use=use)
    counts = " and ".join(f"{len(records):,} {name}" for name, records in splits.items())
    if not config.distributed:
        print(f"{config.model} on {' and '.join(config.data)}: {counts} records; loading JAX …", flush=True)


def read_splits(config: DecoderConfig) -> tuple[sources.Records, sources.Records | None]:
    """Opens the training and validation records, and holds some out if the config says so.

    Raises:
      UserError: Data is missing.
    """
    train, validation = sources.splits(config.data, config.validation, config.data_form)
    if config.validation_share:
        if validation is not None:
            names = " and ".join(config.data)
            raise UserError(f"--validation-share {config.validation_share}: {names} already has validation examples")
        train, validation = sources.split(train, config.validation_share, config.seed)
    return train, validation
