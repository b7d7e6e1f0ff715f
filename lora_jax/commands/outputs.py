"""Where the commands may write."""

from pathlib import Path

from lora_jax.commands.wording import few
from lora_jax.peft.tensors import (
    absent,
)


def check_new(out: Path, known_by: tuple, what: str, force: bool, apart_from: tuple[Path, ...]) -> None:
    """Raises `ValueError` where an output must not be written.

    Args:
      out: The output.
      known_by: Files by which a directory of the same kind is known; of a tuple, one is enough.
      what: The kind.
      force: Whether one of the same kind is replaced.
      apart_from: What is read.
    """
    if out.is_symlink() and not out.exists():
        raise ValueError(absent(out))
    target = out.resolve()
    for given in apart_from:
        source = given.resolve()
        if target == source or source in target.parents or target in source.parents:
            relation = "be" if target == source else "be inside of" if source in target.parents else "hold"
            raise ValueError(f"{out}: the output may not {relation} {given}, which is read.")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    alike = [any((out / x).is_file() for x in (names if isinstance(names, tuple) else (names,))) for names in known_by]
    if not all(alike):
        raise ValueError(f"{out} exists and is no {what}; nothing replaces it.")
    if folders := [path.name for path in sorted(out.iterdir()) if path.is_dir()]:
        raise ValueError(f"{out} exists and holds other directories ({few(folders)}); nothing replaces it.")
    if not force:
        raise ValueError(f"{out} exists; --force replaces it.")
