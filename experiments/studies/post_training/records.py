"""The records of post-training, which are checked before anything that takes seconds is imported."""

from experiments.configs.post_training import PostTraining
from experiments.errors import UserError
from experiments.input import sources
from experiments.input.checking import check_records

_FIRST = 2000  # records to check early; all are checked before training


def check(config: PostTraining) -> None:
    """Checks the data of a config, and prints what the run is about.

    Raises:
      UserError: Data is missing, or one of the first records is malformed.
    """
    splits = read_splits(config)
    for records in splits.values():
        check_records(sources.first(records, min(len(records), _FIRST)), on_bad=config.on_bad, use=config.use)
    counts = " and ".join(f"{len(records):,} {name}" for name, records in splits.items())
    if not config.distributed:
        print(f"{config.model} on {' and '.join(config.data)}: {counts} records; loading JAX …", flush=True)


def read_splits(config: PostTraining) -> dict[str, sources.Records]:
    """Opens the records for training and the held-out ones.

    Raises:
      UserError: Data is missing, or no records are held out.
    """
    train, held_out = sources.splits(config.data, config.validation, config.data_form)
    names = " and ".join(config.data)
    if config.validation_share:
        if held_out is not None:
            raise UserError(f"--validation-share {config.validation_share}: {names} already has validation examples")
        train, held_out = sources.split(train, config.validation_share, config.seed)
    if held_out is None:
        raise UserError(
            f"{names} has no validation examples, on which base and adapter are compared; name some with --validation, "
            "or hold some out with --validation-share 0.1"
        )
    return {"training": train, "held-out": held_out}
