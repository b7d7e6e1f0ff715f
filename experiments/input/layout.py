"""Finds the data files of a glob, or of a split in a directory."""

import glob
import re
from collections.abc import Collection
from pathlib import Path

from experiments.errors import UserError
from experiments.input.opening import COMPRESSED, data_suffix

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
_SHARD = re.compile(r"(.*?)(?:[-_.]\d+)?(?:[-_.]of[-_.](\d+))?")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_FOLDERS = ("", "data")


def is_data(path: Path) -> bool:
    """Whether a file holds records, according to its name."""
    hidden = path.name.startswith((".", "_"))
    return data_suffix(path) in SUFFIXES and not hidden and path.name not in _NOT_DATA


def find_matching(pattern: str) -> list[Path]:
    """Returns the data files that a glob matches, sorted.

    Raises:
      UserError: It matches none.
    """
    files = sorted(
        path for name in glob.glob(pattern, recursive=True) if is_data(path := Path(name)) and path.is_file()
    )
    if not files:
        raise UserError(f"{pattern}: matches no file that ends in {', '.join(SUFFIXES)}")
    return files


def in_directory(directory: Path, split: str, *, separate: bool = False, named: bool = False) -> list[Path]:
    """Returns the files of a split in a directory, ordered by shard.

    The files of a split are named after it (`train.jsonl`, `valid.json.gz`, `train-00000-of-00002.parquet`) and are in
    the directory or its subdirectory `data`, or they are in a subdirectory of the split's name. If no file is named
    after a split, all files are used for any split; if the user named the split, they are `train`. Validation falls
    back to the test split, unless the user named it.

    Args:
      directory: The directory.
      split: `train`, `validation`, `test`, or another name of files.
      separate: Whether to return only data other than the training data. A directory without splits has none.
      named: Whether the user named the split, so that it has to exist.

    Returns:
      The files; none if the directory has only other splits.

    Raises:
      UserError: The directory has no data files, the split is missing or ambiguous, or a shard is missing.
    """
    by_name: dict[str, list[Path]] = {}
    for folder in (directory / name for name in _FOLDERS):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if path.is_file() and is_data(path):
                by_name.setdefault(_name_of(path), []).append(path)
            elif path.is_dir() and path.name in _NAMES:
                by_name.setdefault(path.name, []).extend(file for file in sorted(path.iterdir()) if is_data(file))
    by_name = {name: files for name, files in by_name.items() if files}
    if not by_name:
        raise UserError(
            f"{directory}: no data files; expected files that end in {', '.join(SUFFIXES)}, such as train.jsonl and "
            "validation.jsonl"
        )
    if split in SPLITS and not any(map(_split_of, by_name)) and (split == "train" or not named):
        return [] if separate else sorted(path for files in by_name.values() for path in files)
    name = choose(by_name, split, str(directory), named=named, optional=separate)
    return [] if name is None else _check_shards(by_name[name], directory)


def choose(
    names: Collection[str], split: str, where: str, *, named: bool = False, optional: bool = False
) -> str | None:
    """Chooses the name of a split among the names of files or splits.

    Args:
      names: The names of files or splits.
      split: The requested split. Validation falls back to the test split.
      where: The directory or data set, for error messages.
      named: Whether the user named the split, so that there is no fallback.
      optional: Whether the split may be missing. Validation may, unless the user named it.

    Returns:
      The name; None if an optional split is missing.

    Raises:
      UserError: No name matches, or several do.

    Example:
      >>> choose(["train_sft", "test_sft"], "validation", "ultrachat")
      'test_sft'
    """
    if split in names:
        return split
    for candidate in (split, "test") if split == "validation" and not named else (split,):
        similar = [name for name in SPLITS.get(candidate, ()) if name in names]
        similar = similar or [name for name in names if _split_of(name) == candidate]
        if len(similar) > 1:
            raise UserError(
                f"{where}: both {' and '.join(similar)} match {split}; choose one, as in {where}:{similar[0]}"
            )
        if similar:
            return similar[0]
    if not named and (optional or split == "validation"):
        return None
    raise UserError(f"{where}: no split {split}; expected one of {', '.join(sorted(names))}")


_NAMES = {name for names in SPLITS.values() for name in names}


def _name_of(path: Path) -> str:
    """Returns a file's name without suffixes and shard number."""
    match = _SHARD.fullmatch(_stem(path))
    return match[1] if match else path.name


def _stem(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).stem


def _split_of(name: str) -> str | None:
    """Returns the split that a word of a name means: `train_sft` and `alpaca-train` are for training."""
    words = re.split(r"[-_. ]", name.lower())
    return next((split for word in words for split, names in SPLITS.items() if word in names), None)


def _check_shards(files: list[Path], directory: Path) -> list[Path]:
    """Returns the files of a split, after checking that they are one file or a complete set of shards."""
    if len({(path.parent, data_suffix(path)) for path in files}) > 1:
        names = " and ".join(str(path.relative_to(directory)) for path in files)
        raise UserError(f"{directory}: expected one file or one set of shards per split, got {names}")
    for path in files:
        match = _SHARD.fullmatch(_stem(path))
        if match and match[2] and int(match[2]) != len(files):
            raise UserError(f"{directory}: got {len(files)} shards, expected {int(match[2])} as in {path.name}")
    return files
