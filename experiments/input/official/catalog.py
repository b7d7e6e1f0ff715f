"""The official data sets by name, and the one that a directory holds."""

import difflib
import hashlib
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.input import hub
from experiments.input.layout import SPLITS, is_data
from experiments.input.official import alpaca, commonsense, e2e, glue, oasst1, samsum, squad, wikisql
from experiments.input.official.layout import Example, Layout, Rows

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        *glue.LAYOUTS,
        e2e.LAYOUT,
        wikisql.LAYOUT,
        samsum.LAYOUT,
        *commonsense.LAYOUTS,
        alpaca.LAYOUT,
        *oasst1.LAYOUTS,
        *squad.LAYOUTS,
    )
}


@dataclass(frozen=True)
class Selection:
    """An official data set at a location.

    Attributes:
      layout: What it consists of.
      directory: The directory of its files; None reads it from the Hugging Face Hub.
      split: The split that the user named, if any.
    """

    layout: Layout
    directory: Path | None
    split: str | None = None

    def __str__(self) -> str:
        return self.layout.name if self.directory is None else f"{self.layout.name}:{self.directory}"

    def choose(self, split: str, *, optional: bool = False) -> str | None:
        """Returns a split if it has examples for decoders; None if it has none.

        A split whose answers are secret has none. Validation never falls back to the test split.

        Args:
          split: `train`, `validation` or `test`.
          optional: Whether the split may be missing. Validation may.

        Raises:
          UserError: A split that is not optional is missing.
        """
        if self.directory is None:
            names = {*self.layout.files, *self.layout.hub_splits} - self.layout.unlabeled
            return split if split in names else None
        if split in self.layout.splits(self.directory) and split not in self.layout.unlabeled:
            return split
        if not optional and split != "validation":
            self.layout.paths(self.directory, split)
            raise UserError(f"{self}: the answers of the split {split} are secret")
        return None

    def rows(self, split: str) -> tuple[Rows, str]:
        """Reads a split.

        Args:
          split: `train`, `validation` or `test`.

        Returns:
          The rows, and a digest of them.

        Raises:
          UserError: Files are missing or malformed, or the Hub cannot be reached.
        """
        if self.directory is None:
            table = hub.open_table(self.layout.hub or "", split, self.layout.hub_splits)
            if table is None:
                raise UserError(f"{self.layout.hub}: no split {split}")
            rows = self.layout.hub_rows((table.location(i), table[i]) for i in range(len(table)))
            return rows, hashlib.sha256(f"{self.layout.name} {table.digest}".encode()).hexdigest()
        paths = self.layout.paths(self.directory, split)
        digest = hashlib.sha256(f"{self.layout.name} {split}".encode())
        rows = self.layout.rows(paths, split)
        for path in paths:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return rows, digest.hexdigest()

    def examples(self, split: str) -> list[Example]:
        """Returns the examples of a split.

        Raises:
          UserError: See :meth:`rows`; or an example is malformed.
        """
        rows, _ = self.rows(split)
        return [self.layout.example(row, where) for where, row in rows]


def find(data: str) -> Selection | None:
    """Returns the official data set that the name of data means.

    Args:
      data: A directory; a name with a directory, `NAME:DIRECTORY` or `NAME:DIRECTORY:SPLIT`; or the name of a data set
        on the Hugging Face Hub, `NAME` or `NAME:SPLIT`.

    Returns:
      The data set; None if the name means something else.

    Raises:
      UserError: There is no such directory, a directory holds several data sets, or the Hub does not have the data set.
    """
    if Path(data).exists():
        return recognize(Path(data))
    name, _, rest = data.partition(":")
    if name not in LAYOUTS:
        directory, _, split = data.rpartition(":")
        selection = recognize(Path(directory)) if directory else None
        if selection is None or _split_name(split) not in selection.layout.files:
            return None
        return Selection(selection.layout, selection.directory, _split_name(split))
    layout, (directory, _, split) = LAYOUTS[name], rest.rpartition(":")
    for path, named in ((rest, None), (directory, _split_name(split))):
        if path and Path(path).is_dir():
            return Selection(layout, _check(layout, Path(path)), named)
    if rest and _split_name(rest) not in {*layout.files, *layout.hub_splits}:
        raise UserError(f"{data}: no such directory {rest}; expected {name}:DIRECTORY with the files of {name}")
    if layout.hub is None:
        raise UserError(f"{data}: {name} is not on the Hugging Face Hub; name its directory, as in {name}:DIRECTORY")
    return Selection(layout, None, _split_name(rest) if rest else None)


def recognize(directory: Path) -> Selection | None:
    """Returns the official data set that a directory holds, according to its files; None if there is none.

    Raises:
      UserError: The directory holds several.
    """
    if not directory.is_dir() or (directory / "labels.txt").exists():
        return None
    names = [layout.name for layout in LAYOUTS.values() if layout.recognizes(directory)]
    if len(names) > 1:
        raise UserError(f"{directory}: holds {' and '.join(names)}; choose one, as in {names[0]}:{directory}")
    if names:
        return Selection(LAYOUTS[names[0]], directory)
    inside = [layout for layout in LAYOUTS.values() if layout.recognizes(layout.home(directory))]
    if inside and not any(is_data(path) for path in directory.iterdir() if path.is_file()):
        several = ", ".join(layout.name for layout in inside)
        raise UserError(f"{directory}: holds {several}; choose one, as in {inside[0].name}:{directory}")
    return None


def nearest(data: str) -> str:
    """Returns a hint about the name of an official data set that a misspelled name resembles; empty if there is none.

    Example:
      >>> nearest("sqad:data")
      '; the nearest official data set is squad:DIRECTORY'
    """
    names = difflib.get_close_matches(data.partition(":")[0].lower(), LAYOUTS, n=1, cutoff=0.7)
    return f"; the nearest official data set is {names[0]}:DIRECTORY" if names else ""


def _split_name(name: str) -> str:
    """Returns the split that another name of it means, such as `dev`."""
    return next((split for split, names in SPLITS.items() if name in names), name)


def _check(layout: Layout, directory: Path) -> Path:
    """Returns the directory of a data set's files, after checking that some of them are there."""
    home = layout.home(directory)
    if not layout.splits(home):
        layout.paths(home, next(iter(layout.files)))  # raises
    return home
