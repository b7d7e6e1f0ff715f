"""Where the commands may write."""

from collections.abc import Callable
from pathlib import Path

from lora_jax.io.files import check_replaceable, resolve


def check_new(
    out: Path, manifest: str, what: str, owns: Callable[[Path], bool], force: bool, apart_from: tuple[Path, ...]
) -> None:
    """Raises an error where an output must not be written.

    Args:
      out: The output.
      manifest: The file by which a directory of the same kind is known.
      what: The kind.
      owns: Whether a file of an existing directory was written by this program.
      force: Whether one of the same kind is replaced.
      apart_from: What is read.
    """
    target = resolve(out)
    for given in apart_from:
        source = given.resolve()
        if target == source or source in target.parents or target in source.parents:
            relation = "be" if target == source else "be inside of" if source in target.parents else "hold"
            raise ValueError(f"{out}: the output may not {relation} {given}, which is read.")
    check_replaceable(target, manifest, what=what, owns=owns)
    if not force and target.is_dir() and any(target.iterdir()):
        raise FileExistsError(f"{out} exists; --force replaces it.")
