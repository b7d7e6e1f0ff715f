"""Which files a name stands for: a file, a glob, or a directory with splits and shards."""

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
    """Whether a file's name says that it holds records."""
    hidden = path.name.startswith((".", "_"))
    return data_suffix(path) in SUFFIXES and not hidden and path.name not in _NOT_DATA


def matching(pattern: str) -> list[Path]:
    """The data files that a glob matches, sorted.

    Raises:
      UserError: There are none.
    """
    files = sorted(
        path for name in glob.glob(pattern, recursive=True) if is_data(path := Path(name)) and path.is_file()
    )
    if not files:
        raise UserError(f"{pattern}: matches no file that ends in {', '.join(SUFFIXES)}")
    return files


def in_directory(directory: Path, split: str, *, beside: bool = False, named: bool = False) -> list[Path]:
    """The files of a split in a directory, shard by shard.

    A split's files are named after it (`train.jsonl`, `valid.json.gz`, `train-00000-of-00002.parquet`), in the
    directory or its `data`, or stand in a folder of its name. A directory without such names is one
    split, whichever is asked for; where the user named the split, it is `train`. Validation falls back to the test
    split, but not where the user named it.

    Args:
      directory: With files in one or several folders.
      split: `train`, `validation`, `test`, or another name that files have.
      beside: Only what is there beside the files to train on: a directory that is one split has nothing.
      named: The user named the split, so it has to exist.

    Returns:
      The files; none if the directory has other splits only.

    Raises:
      UserError: The directory has no data files, a split is there twice or not at all, or a shard is missing.
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
            f"{directory}: no data files; expected train and validation files, or any, that end in "
            f"{', '.join(SUFFIXES)}"
        )
    if split in SPLITS and not any(map(_split_of, by_name)) and (split == "train" or not named):
        return [] if beside else sorted(path for files in by_name.values() for path in files)
    name = chosen(by_name, split, str(directory), named=named)
    return [] if name is None else _one(by_name[name], directory)


def chosen(names: Collection[str], split: str, where: str, *, named: bool = False) -> str | None:
    """The name that stands for a split among those of files or of a data set's splits; None for no validation.

    Args:
      names: Of files or splits.
      split: What is asked for. Validation falls back to the test split.
      where: The directory or the data set, for errors.
      named: The user named the split: nothing stands in for it.

    Raises:
      UserError: None does, or several do.

    Example:
      >>> chosen(["train_sft", "test_sft"], "validation", "ultrachat")
      'test_sft'
    """
    if split in names:
        return split
    for wanted in (split, "test") if split == "validation" and not named else (split,):
        similar = [name for name in SPLITS.get(wanted, ()) if name in names]
        similar = similar or [name for name in names if _split_of(name) == wanted]
        if len(similar) > 1:
            raise UserError(f"{where}: {' and '.join(similar)} for {split}; {where}:{similar[0]} takes one of them")
        if similar:
            return similar[0]
    if split == "validation" and not named:
        return None
    raise UserError(f"{where}: no {split} among {', '.join(sorted(names))}")


_NAMES = {name for names in SPLITS.values() for name in names}


def _name_of(path: Path) -> str:
    """A file's name without suffixes and the number of a shard."""
    match = _SHARD.fullmatch(_stem(path))
    return match[1] if match else path.name


def _stem(path: Path) -> str:
    return Path(path.stem if path.suffix.lower() in COMPRESSED else path.name).stem


def _split_of(name: str) -> str | None:
    """The split that a word of a name stands for: `train_sft` and `alpaca-train` are for training."""
    words = re.split(r"[-_. ]", name.lower())
    return next((split for word in words for split, names in SPLITS.items() if word in names), None)


def _one(files: list[Path], directory: Path) -> list[Path]:
    """Files of one name: one alone, or all shards of a set."""
    if len({(path.parent, data_suffix(path)) for path in files}) > 1:
        names = " and ".join(str(path.relative_to(directory)) for path in files)
        raise UserError(f"{directory}: expected one file, or the shards of one, for a split; found {names}")
    for path in files:
        match = _SHARD.fullmatch(_stem(path))
        if match and match[2] and int(match[2]) != len(files):
            raise UserError(f"{directory}: {len(files)} of the {int(match[2])} shards that {path.name} speaks of")
    return files
