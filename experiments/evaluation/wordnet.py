"""Opens WordNet for METEOR: Debian's package `wordnet-base`, or nltk's own download."""

import functools
import io
import warnings
from pathlib import Path
from typing import Any

from experiments.errors import UserError

DEBIAN = Path("/usr/share/wordnet")
_CATEGORIES = 45  # files of WordNet's authors


@functools.cache
def open_reader(directory: Path = DEBIAN) -> Any:
    """Returns a reader with the synonyms of English words.

    Args:
      directory: The files of Debian's package. Without them, nltk's data is used.

    Raises:
      UserError: WordNet is not installed.
    """
    import nltk
    from nltk.corpus import wordnet

    if (directory / "index.noun").is_file():
        if str(directory) not in nltk.data.path:  # nltk refuses to read elsewhere
            nltk.data.path.append(str(directory))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing languages
            return _debian_reader(directory)
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise UserError(
            "METEOR needs WordNet: install Debian's package wordnet-base, or run python -m nltk.downloader wordnet"
        ) from None
    return wordnet


def is_installed() -> bool:
    """Whether :func:`open_reader` returns a reader."""
    try:
        open_reader()
    except UserError:
        return False
    return True


def _debian_reader(directory: Path) -> Any:
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    class Reader(WordNetCorpusReader):
        """Reads files without `lexnames`, which only names categories, and without a sense index."""

        def open(self, file: str) -> Any:
            if file == "lexnames":
                return io.StringIO("".join(f"{number:02d}\t{number}\t0\n" for number in range(_CATEGORIES)))
            return super().open(file)

        def map_wn(self, version: str = "wordnet") -> dict[str, Any]:
            return {}

    return Reader(str(directory), None)
