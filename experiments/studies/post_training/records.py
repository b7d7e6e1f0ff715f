"""The records of post-training, which are checked before anything that takes seconds is imported."""

from experiments.configs.post_training import PostTraining
from experiments.errors import UserError
from experiments.input import sources
from experiments.studies.decoder import records


def check(config: PostTraining) -> None:
    """Checks the data of a config, and prints what the run is about.

    Raises:
      UserError: Data is missing, or one of the first records is malformed.
    """
    records.check(config, read_splits(config), config.use)


def read_splits(config: PostTraining) -> dict[str, sources.Records]:
    """Opens the records for training and the held-out ones.

    Raises:
      UserError: Data is missing, or no records are held out.
    """
    train, held_out = records.read_splits(config)
    if held_out is None:
        raise UserError(
            f"{' and '.join(config.data)} has no validation examples, on which base and adapter are compared; name "
            "some with --validation, or hold some out with --validation-share 0.1"
        )
    return {"training": train, "held-out": held_out}
