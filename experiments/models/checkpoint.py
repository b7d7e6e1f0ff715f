"""Weights in Hugging Face layout: read tensor by tensor onto their shardings, and written back."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.errors import UserError
from lora_jax import peft

M = TypeVar("M", bound=nnx.Module)
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.txt")


def read_config(directory: Path) -> dict[str, Any]:
    """The model's `config.json`.

    Raises:
      UserError: There is none, or it is not a JSON object.
    """
    try:
        return peft.read_json(directory / "config.json")
    except ValueError as error:
        raise UserError(str(error)) from None


def load(
    build: Callable[[nnx.Rngs], M],
    names: peft.Names,
    directory: Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    spellings: Sequence[tuple[str, str]] = (),
    unused: str = r"(?!)",
) -> M:
    """A model with the weights of a checkpoint; its random initial weights are never computed.

    Each device gets its part of a weight straight from the files: no more than the part of one tensor is
    in the host's memory beside what is on the devices.

    Args:
      build: Makes the model.
      names: Of its weights in the checkpoint.
      directory: Holds `model.safetensors`, or its shards with `model.safetensors.index.json`.
      dtype: What every weight is cast to; None keeps what is stored.
      sharding: The sharding of a weight, from its path and shape; None puts all on the default device.
      spellings: (pattern, replacement) that bring other spellings of a tensor's name to the usual one.
      unused: Pattern of tensors that the model does without, in the names of the bare model.

    Raises:
      UserError: Files are missing or damaged, or any tensors are missing, unexpected or of another shape:
        all of them are named at once.
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, params, _ = nnx.split(abstract, nnx.Param, ...)
    wanted = dict(nnx.to_flat_state(params))
    try:
        with peft.Tensors(peft.model_files(directory)) as tensors:
            stored = _Stored(tensors, names.prefix, spellings, unused)
            places = {
                path: names.find("/".join(map(str, path)), leaf.get_value().shape) for path, leaf in wanted.items()
            }
            stored.check(directory, places.values())
            for path, place in places.items():
                where = None if sharding is None else sharding(place.path, place.shape)
                wanted[path] = wanted[path].replace(stored.placed(place, dtype, where))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None
    params = nnx.from_flat_state(list(wanted.items()))
    # what is not read (dropout keys) is computed; the compiler drops the unused initial weights
    others = jax.jit(lambda: nnx.state(build(nnx.Rngs(0)), nnx.Not(nnx.Param)))()
    return nnx.merge(graph, params, others)


def save(
    directory: Path,
    base: Any,
    names: peft.Names,
    config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    shard_bytes: int = peft.SHARD_BYTES,
) -> None:
    """Writes parameters in Hugging Face layout, so that transformers opens them.

    Args:
      directory: New, or empty.
      base: The parameters, `lora.merge(base, delta)` for one.
      names: Of the weights in the checkpoint.
      config: The content of `config.json`.
      tokenizer: A directory whose tokenizer files are copied.
      shard_bytes: The largest size of a file.

    Raises:
      UserError: The directory holds something already.
    """
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: holds files already")
    directory.mkdir(parents=True, exist_ok=True)
    peft.write_model(directory, _tensors_of(base, names), shard_bytes=shard_bytes)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
    for file in [tokenizer / name for name in _COPIED] if tokenizer else ():
        if file.is_file():
            shutil.copyfile(file, directory / file.name)


def _tensors_of(base: Any, names: peft.Names) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        place = names.find("/".join(str(key.key) for key in path), leaf.shape)
        yield from place.split(np.asarray(leaf)).items()


class _Stored:
    """The tensors of a checkpoint under their usual names."""

    def __init__(self, tensors: peft.Tensors, prefix: str, spellings: Sequence[tuple[str, str]], unused: str):
        self._tensors = tensors
        self._names: dict[str, str] = {}  # without the prefix -> in the file
        for name in tensors:
            usual = name
            for pattern, replacement in spellings:
                usual = re.sub(pattern, replacement, usual)
            self._names[usual.removeprefix(prefix)] = name
        self._prefix = prefix
        self._unused = unused

    def _read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        return self._tensors.read(self._names[name.removeprefix(self._prefix)], part)

    def placed(self, place: peft.Place, dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
        """The weight on its devices."""
        first = next(iter(place.tensors)).removeprefix(self._prefix)
        dtype = jnp.dtype(
            dtype or self._tensors.read(self._names[first], tuple(slice(0, 0) for _ in place.right)).dtype
        )
        if sharding is None:
            return jnp.asarray(place.join(self._read, dtype))
        return jax.make_array_from_callback(place.shape, sharding, lambda part: place.join(self._read, dtype, part))

    def check(self, directory: Path, places: Any) -> None:
        """Compares names and shapes; every difference is reported at once."""
        wanted = {name.removeprefix(self._prefix): shape for place in places for name, shape in place.shapes.items()}
        tied = {name.removeprefix(self._prefix) for place in places for name in place.tied}
        given = {name: self._tensors[stored] for name, stored in self._names.items()}
        problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in given]
        problems += [
            f"unexpected: {name} {given[name]}"
            for name in sorted(given.keys() - wanted.keys() - tied)
            if not re.search(self._unused, name)
        ]
        problems += [
            f"shape: {name} is {given[name]}, the model wants {shape}"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ]
        if problems:
            raise UserError(f"{directory}: the weights do not fit the model:\n  " + "\n  ".join(problems))
