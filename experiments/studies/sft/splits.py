"""The records of supervised fine-tuning, which are checked before anything that takes seconds is imported."""

from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.input import sources
from experiments.input.checking import check_records

_FIRST = 2000  # records to check early; all are checked before training


def check(config: Config) -> None:
    """Checks the data of a config, and prints what the run is about.

    Raises:
      UserError: Data is missing, or one of the first records is malformed.
    """
    train, validation = read_splits(config)
    splits = {"training": train} | ({} if validation is None else {"validation": validation})
    for records in splits.values():
        check_records(sources.first(records, min(len(records), _FIRST)), on_bad=config.on_bad)
    counts = " and ".join(f"{len(records):,} {name}" for name, records in splits.items())
    if not config.distributed:
        print(f"{config.model} on {' and '.join(config.data)}: {counts} records; loading JAX …", flush=True)


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
