"""Checks of the commands' output paths."""

from collections.abc import Callable
from pathlib import Path

from lora_jax.io.files import check_replaceable, resolve


def check_new(
    out: Path, manifest: str, what: str, owns: Callable[[Path], bool], force: bool, inputs: tuple[Path, ...]
) -> None:
    """Checks that an output may be written.

    Args:
      out: The output.
      manifest: The file that identifies a directory of the same kind.
      what: The kind of output, for messages.
      owns: Whether this program wrote a file of an existing directory.
      force: Whether to replace an existing output of the same kind.
      inputs: The paths that the command reads.

    Raises:
      ValueError: The output overlaps with an input, or is not of the same kind.
      FileExistsError: The output exists, and `force` is False.
    """
    target = resolve(out)
    for path in inputs:
        source = path.resolve()
        if target == source or source in target.parents or target in source.parents:
            relation = "be" if target == source else "be inside of" if source in target.parents else "contain"
            raise ValueError(f"{out}: the output may not {relation} {path}, which is read.")
    check_replaceable(target, manifest, what=what, owns=owns)
    if not force and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{out} exists; --force replaces it.")


def check_new_file(
    out: Path, suffix: str, is_same: Callable[[Path], bool], what: str, force: bool, inputs: tuple[Path, ...]
) -> None:
    """Checks that an output file may be written.

    Args:
      out: The output.
      suffix: The suffix of its name.
      is_same: Whether an existing file is of the same kind.
      what: The kind of output, for messages.
      force: Whether to replace an existing output of the same kind.
      inputs: The paths that the command reads.

    Raises:
      ValueError: The output has another suffix, or is one of the inputs.
      FileExistsError: The output exists, and `force` is False or it is not of the same kind.
    """
    if out.suffix != suffix or out.is_dir():
        example = out / f"adapter{suffix}" if out.is_dir() else out.with_name(f"{out.name}{suffix}")
        raise ValueError(f"{out}: the output is one file, whose name ends in {suffix}, such as {example}.")
    target = resolve(out)
    for path in inputs:
        if target == path.resolve():
            raise ValueError(f"{out}: the output may not be {path}, which is read.")
    if target.exists() and not is_same(target):
        raise FileExistsError(f"{out} exists and is not a {what}; only a previous {what} is replaced.")
    if target.exists() and not force:
        raise FileExistsError(f"{out} exists; --force replaces it.")
