"""The tensors of Hugging Face's checkpoint in a GGUF file, with the interface of `peft.Tensors`."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.pretrained.gguf.config import ROPE_FACTORS
from experiments.pretrained.gguf.layout import Entry, Piece, layout
from experiments.pretrained.gguf.reader import Content, StoredTensor

_UNUSED = rf"{re.escape(ROPE_FACTORS)}|(blk\.\d+\.)?(attn_rot_embd|rope_freqs)\.weight"


class View:
    """A tensor of Hugging Face's checkpoint in a tensor of a GGUF file.

    Args:
      stored: The file's tensor.
      piece: Where and how it holds Hugging Face's.

    Attributes:
      stored: The file's tensor.
      shape: The shape of Hugging Face's tensor.
    """

    def __init__(self, stored: StoredTensor, piece: Piece):
        self.stored, self._piece = stored, piece
        self.shape = piece.shape[::-1] if piece.transposed else piece.shape
        self._order = None
        if piece.heads is not None:
            # The file's rows are [head, pair, 2], Hugging Face's [head, 2, pair].
            self._order = np.arange(piece.shape[0]).reshape(piece.heads, -1, 2).swapaxes(1, 2).reshape(-1)

    def rows(self, part: slice = slice(None)) -> np.ndarray:
        """Returns rows as the file stores them, in Hugging Face's order; they are its columns if transposed."""
        data = self.stored.data if self._piece.expert is None else self.stored.data[self._piece.expert]
        data = data[self._piece.first : self._piece.first + self._piece.shape[0]]
        return data[part if self._order is None else self._order[part]]

    def read(self, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Returns the numbers of a part of Hugging Face's tensor, or of all of it."""
        part = part or ()
        axes = (*part, *(slice(None),) * (len(self.shape) - len(part)))
        if self._piece.transposed:
            axes = axes[::-1]
        if len(axes) == 1:
            return self.stored.dequantize(self.rows(axes[0]))
        values = self.stored.dequantize(self.rows(axes[0]))[:, axes[1]]
        return values.T if self._piece.transposed else values


class GgufTensors(Mapping[str, tuple[int, ...]]):
    """The names and shapes of the tensors of a model; values are read on demand, and dequantized if they are codes.

    Args:
      content: A file without problems; see :func:`tensor_problems`.
      config: The content of its `config.json`.
    """

    def __init__(self, content: Content, config: Mapping[str, Any]):
        self._views: dict[str, View] = {}
        for name, entry in _layout(content, config).items():
            for piece in entry.pieces:
                self._views[piece.theirs] = View(content.tensors[name], piece)

    def __enter__(self) -> "GgufTensors":
        return self

    def __exit__(self, *exception: object) -> None:
        """Does nothing: the pages of a mapped file occupy memory only while nothing else needs it."""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self._views[name].shape

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def kind(self, name: str) -> str | None:
        """Returns the type of a tensor's codes; None if it is stored as numbers."""
        return None if self._views[name].stored.is_float else self.dtype(name)

    def rows(self, name: str, part: slice = slice(None)) -> np.ndarray:
        """Returns the blocks of codes of some rows, `uint8[rows, bytes]`; of a transposed matrix, of columns."""
        return self._views[name].rows(part)

    def read(self, name: str, part: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor, or a part of it: floats as they are stored, dequantized codes in float32."""
        return self._views[name].read(part)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._views[name].stored.file

    def dtype(self, name: str) -> str:
        """The type of a tensor as GGUF spells it ('F32', 'Q4_K')."""
        return self._views[name].stored.kind.name


def tensor_problems(content: Content, config: Mapping[str, Any], *, sizes: bool = True) -> list[str]:
    """Returns what is wrong with the tensors of a file.

    Args:
      content: The file.
      config: The content of its `config.json`; empty if the architecture is unknown.
      sizes: Whether the sizes in `config` are right, so that shapes can be compared.
    """
    problems = list(content.problems.values())
    if not config or not content.is_complete:  # other tensors may be in other files
        return problems
    expected = _layout(content, config)
    for name, entry in expected.items():
        if name in content.tensors and sizes and content.tensors[name].shape != entry.shape:
            problems.append(f"shape: {name} is {content.tensors[name].shape}, expected {entry.shape}")
        elif name not in content.tensors and name not in content.problems:
            problems.append(f"missing: {name} {entry.shape if sizes else ''}".rstrip())
    for name, tensor in content.tensors.items():
        if name not in expected and not re.fullmatch(_UNUSED, name):
            problems.append(f"unexpected: {name} {tensor.shape}")
    return problems


def _layout(content: Content, config: Mapping[str, Any]) -> dict[str, Entry]:
    return layout(content.fields["general.architecture"], config, content.tensors.keys() | content.problems.keys())
