"""Opens data sets of the Hugging Face Hub."""

from collections.abc import Mapping

from experiments.errors import UserError
from experiments.input import layout
from experiments.input.columnar import TableRows


def open_table(
    name: str, split: str, splits: Mapping[str, str] | None = None, *, optional: bool = False
) -> TableRows | None:
    """Opens a split of a data set on the Hugging Face Hub.

    Args:
      name: `ORG/NAME`, `ORG/NAME:SPLIT` or `ORG/NAME:CONFIG:SPLIT`.
      split: `train`, `validation` or `test`, unless the name has a split.
      splits: The data set's names of splits that it names in a way of its own.
      optional: Whether the split may be missing. Validation may, unless the name has it.

    Returns:
      The rows; None if an optional split is missing.

    Raises:
      UserError: The Hub cannot be reached, or it does not have the data set or the split.
    """
    dataset, *options = name.split(":")
    config = options[0] if len(options) > 1 else None
    split = (options[-1] if options else "") or split
    title = ":".join([dataset, *options[:-1]])
    import datasets  # takes seconds, as lora_jax does

    from lora_jax.io import describe_error

    try:
        tables = datasets.load_dataset(dataset, config)
    except Exception as error:  # the library, the network and a data set's files raise exceptions of many types
        raise UserError(
            f"{title}:{split}: no such file, and the Hugging Face Hub does not provide it as "
            f"ORGANIZATION/DATASET:SPLIT or ORGANIZATION/DATASET:CONFIG:SPLIT ({describe_error(error)})"
        ) from None
    named, split = bool(options and options[-1]), (splits or {}).get(split, split)
    selected = layout.choose([str(name) for name in tables], split, title, named=named, optional=optional)
    return None if selected is None else TableRows(tables[selected], f"{title}:{selected}")
