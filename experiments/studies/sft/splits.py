"""The records of supervised fine-tuning, which are checked before anything that takes seconds is imported."""

from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.input import sources
from experiments.studies.decoder import records


def check(config: Config) -> None:
    """Checks the data of a config, and prints what the run is about.

    Raises:
      UserError: Data is missing, or one of the first records is malformed.
    """
    train, validation = read_splits(config)
    records.check(config, {"training": train} | ({} if validation is None else {"validation": validation}))


def read_splits(config: Config) -> tuple[sources.Records, sources.Records | None]:
    """Opens the training and validation records.

    Raises:
      UserError: Data is missing, or a setting needs validation examples.
    """
    train, validation = records.read_splits(config)
    flags = {"--patience": config.patience, "--eval-every": config.eval_every}
    flags = [flag for flag, value in flags.items() if value is not None]
    if validation is None and flags:
        raise UserError(
            f"{' and '.join(flags)}: {' and '.join(config.data)} has no validation examples; name some with "
            "--validation, or hold some out with --validation-share"
        )
    return train, validation
