"""Weights in Hugging Face layout, read one tensor at a time into a Flax NNX model."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from safetensors import SafetensorError, safe_open

from experiments.errors import UserError

M = TypeVar("M", bound=nnx.Module)


@dataclass(frozen=True)
class Rules:
    """How an architecture's weights are called in its checkpoints.

    Attributes:
      names: (pattern of the whole path in the model, tensor's name with the pattern's groups, transposed?).
      spellings: (pattern, replacement) that bring other spellings of a tensor's name to the usual one.
      prefix: What stands before every name in checkpoints of a model that wraps this one.
      unused: Pattern of tensors that this model does without.
    """

    names: tuple[tuple[str, str, bool], ...]
    spellings: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    unused: str = r"(?!)"

    def source(self, path: str) -> tuple[str, bool]:
        """The tensor that fills the weight at `path`, and whether it is stored transposed."""
        for pattern, name, transposed in self.names:
            if match := re.fullmatch(pattern, path):
                return match.expand(name), transposed
        raise KeyError(f"no rule names the tensor of {path}")

    def usual(self, name: str) -> str:
        """A tensor's name without the wrapper's prefix and in its usual spelling."""
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name)
        return name.removeprefix(self.prefix)


def read_config(directory: Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
      UserError: There is none, or it is not a JSON object.
    """
    return _read_json(directory / "config.json")


def load(build: Callable[[nnx.Rngs], M], rules: Rules, directory: Path, *, dtype: Any = jnp.float32) -> M:
    """A model with the weights of a checkpoint; its random initial weights are never computed.

    Args:
      build: Makes the model.
      rules: The names of its weights in the checkpoint.
      directory: Holds `model.safetensors`, or its shards with `model.safetensors.index.json`.
      dtype: What every weight is cast to.

    Raises:
      UserError: Files are missing or damaged, or any tensors are missing, unexpected or of another shape:
        all of them are named at once.
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, params, _ = nnx.split(abstract, nnx.Param, ...)
    wanted = dict(nnx.to_flat_state(params))
    with Tensors(directory, rules) as tensors:
        sources = {path: rules.source("/".join(map(str, path))) for path in wanted}
        _check(tensors, {sources[path][0]: _stored_shape(wanted[path], sources[path][1]) for path in wanted})
        for path, (name, transposed) in sources.items():
            array = tensors[name]
            wanted[path] = wanted[path].replace(jnp.asarray(array.T if transposed else array, dtype))
    params = nnx.from_flat_state(list(wanted.items()))
    # what is not read (dropout keys) is computed; the compiler drops the unused initial weights
    others = jax.jit(lambda: nnx.state(build(nnx.Rngs(0)), nnx.Not(nnx.Param)))()
    return nnx.merge(graph, params, others)


class Tensors:
    """The tensors of all of a directory's safetensors files, read when asked for.

    A context manager: the files are open inside its `with` block.
    """

    def __init__(self, directory: Path, rules: Rules):
        self.directory = directory
        self._rules = rules
        self._files = ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}  # usual name -> (open file, name in the file)

    def __enter__(self) -> "Tensors":
        for path in weight_files(self.directory):
            try:
                file = self._files.enter_context(safe_open(path, framework="flax"))
            except (SafetensorError, OSError) as error:
                self._files.close()
                raise UserError(f"{path}: cannot be read as safetensors ({error})") from None
            self._where |= {self._rules.usual(name): (file, name) for name in file.keys()}  # noqa: SIM118
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._where if not re.search(self._rules.unused, name))

    def __getitem__(self, name: str) -> Any:
        file, stored = self._where[name]
        return file.get_tensor(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._where[name]
        return tuple(file.get_slice(stored).get_shape())


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model: one, or the shards that its index lists.

    Raises:
      UserError: There is neither, or a listed shard is missing.
    """
    if (whole := directory / "model.safetensors").exists():
        return [whole]
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        raise UserError(f"{directory}: no model.safetensors and no model.safetensors.index.json")
    shards = [directory / name for name in sorted(set(_read_json(index).get("weight_map", {}).values()))]
    if missing := [shard.name for shard in shards if not shard.exists()]:
        raise UserError(f"{directory}: shards missing: {', '.join(missing)}")
    return shards


def _check(tensors: Tensors, wanted: dict[str, tuple[int, ...]]) -> None:
    """Compares names and shapes; every difference is reported at once."""
    present = set(tensors)
    problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in present]
    problems += [f"unexpected: {name} {tensors.shape(name)}" for name in sorted(present - wanted.keys())]
    problems += [
        f"shape: {name} is {tensors.shape(name)}, the model wants {shape}"
        for name, shape in wanted.items()
        if name in present and tensors.shape(name) != shape
    ]
    if problems:
        raise UserError(f"{tensors.directory}: the weights do not fit the model:\n  " + "\n  ".join(problems))


def _stored_shape(variable: nnx.Variable, transposed: bool) -> tuple[int, ...]:
    shape = variable.get_value().shape
    return shape[::-1] if transposed else shape


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content
