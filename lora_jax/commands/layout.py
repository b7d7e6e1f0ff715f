"""Names for PyTorch's own tensors: leaves that are the tensors of a checkpoint, or of an adapter, as they are."""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from lora_jax.peft import experts, keys, ties
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.names import Module, Names, Weight
from lora_jax.peft.opening import is_mlx, opened
from lora_jax.peft.tensors import Tensors
from lora_jax.peft.view import View

Shape = tuple[int, ...]
Levels = list[tuple[Shape, Shape]]
"""The shapes of a module's factors: one pair, or one for each of its parameters, the outermost wrapper's first."""
Kind = Module | Literal[""]


def of_adapter(directory: Path, ignore: Sequence[str] = ()) -> tuple[dict[str, Any], Names]:
    """The weights that an adapter is for, as far as it tells: their names, and shapes in PyTorch's layout.

    A matrix that PEFT stores beside the factors (see :func:`copies`) is taken for the base's own.

    Raises:
      ValueError: The adapter's files are missing or damaged, or its factors do not go together.
    """
    shapes: dict[str, Shape] = {}
    kinds: dict[str, Kind] = {}
    stored: dict[str, Stored] = {}
    with opened(directory, ignore) as (config, tensors):
        parsed = parsed_keys(tensors)
        wrapped = {parent for key in parsed for parent in keys.wrapped_parents(key.key)}
        for (module, embedding), levels in factor_shapes(tensors, parsed).items():
            for name, (a, b) in _named(module, levels, config, module in wrapped).items():
                kinds[name], shapes[name] = _weight(config, name, a, b, embedding)
        for key in parsed:
            if key.part == "value" and key.name not in shapes:
                shapes[key.name] = tensors[key.key]
            elif key.part == "rows" and f"{key.module}.weight" not in shapes:
                ids = [i for i in config.tokens(key.module) or () if isinstance(i, int)]
                shapes[f"{key.module}.weight"] = (max(ids, default=0) + 1, *tensors[key.key][1:])
                kinds[f"{key.module}.weight"] = "embedding"
            elif key.part == "b_bias":
                shapes.setdefault(f"{key.module}.bias", tensors[key.key])
        for key in _copies(parsed, config):
            stored[key.name] = Stored(tensors[key.key], lambda key=key: _read(directory, key))
        tied = _twins(parsed, kinds, config, tensors) if config.ensure_weight_tying else {}
    base = {
        leaf_path(name): stored.get(name, jax.ShapeDtypeStruct(shape, np.float32))
        for name, shape in shapes.items()
        if (name,) not in tied.values()
    }
    fused = experts.of_matrices(keys.split_name(name)[0] for name in shapes) if is_mlx(directory) else ()
    return base, dataclasses.replace(table_of(shapes, kinds, tied), fused=tuple(fused))


def _twins(
    parsed: Iterable[Key], kinds: Mapping[str, Kind], config: Config, tensors: Tensors | View
) -> dict[str, tuple[str, ...]]:
    """Embeddings, and the heads that the adapter changes in the same way."""
    by_module: dict[str, list[Key]] = collections.defaultdict(list)
    for key in parsed:
        by_module[key.module].append(key)
    return {
        table: (f"{head}.weight",)
        for table, kind in kinds.items()
        for head in by_module
        if kind == "embedding" and kinds.get(f"{head}.weight") == "linear" and not re.search(r"\.\d+\.", head)
        if not ties.parted(by_module[keys.split_name(table)[0]], by_module[head], config, tensors)
    }


def copies(directory: Path, ignore: Sequence[str] = ()) -> list[str]:
    """The weights that an adapter holds whole, although its config does not say that they were trained.

    PEFT stores embeddings so, where they have factors or the vocabulary may have grown; only the base tells
    whether they changed.
    """
    with opened(directory, ignore) as (config, tensors):
        return [key.name for key in _copies(parsed_keys(tensors), config)]


class Stored:
    """A tensor on disk as a leaf, read when its values are asked for."""

    def __init__(self, shape: Shape, read: Callable[[], np.ndarray]):
        self.shape = shape
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype)


def leaf_path(name: str) -> str:
    """The path of a tensor's leaf."""
    return name.replace(".", "/")


def table_of(
    names: Iterable[str],
    kinds: Mapping[str, Kind],
    tied: Mapping[str, tuple[str, ...]],
    prefix: str = "",
    in_model: Mapping[str, str] | None = None,
) -> Names:
    new = in_model or {}
    rows = [
        Weight(leaf_path(x), x, module=kinds.get(x, ""), tied=tied.get(x, ()), in_model=new.get(x, "")) for x in names
    ]
    return Names(tuple(rows), prefix=prefix)


def parsed_keys(tensors: Tensors | View) -> list[Key]:
    return [key for name in tensors if not keys.is_repeated(name, tensors) and (key := keys.parse(name))]


def factor_shapes(tensors: Tensors | View, parsed: Iterable[Key]) -> dict[tuple[str, bool], Levels]:
    """Per module, and whether it is a lookup, the shapes of its factors, the outermost wrapper's first."""
    found: dict[tuple[str, bool], dict[int, dict[str, Shape]]] = {}
    for key in parsed:
        if key.part in ("a", "b"):
            shape = tensors[key.key]
            if len(shape) < 2:
                file = tensors.file_of(key.key)
                raise ValueError(f"{file}: {key.key} has the shape {shape}, expected two axes or more.")
            found.setdefault((key.module, key.embedding), {}).setdefault(key.depth, {})[key.part] = shape
    for (module, embedding), levels in found.items():
        for depth, parts in levels.items():
            if missing := {"a", "b"} - parts.keys():
                key = keys.factor_keys(module, embedding=embedding, depth=depth)[missing.pop()]
                file = tensors.file_of(next(iter(tensors)))
                raise ValueError(f"{file}: {key} is missing beside the other factor of its module.")
    return {at: [(levels[d]["a"], levels[d]["b"]) for d in sorted(levels)] for at, levels in found.items()}


def _copies(parsed: Iterable[Key], config: Config) -> list[Key]:
    """The keys of whole matrices that PEFT stores without being told to."""
    found = [key for key in parsed if key.part == "value" and keys.split_name(key.name)[1] == "weight"]
    return [key for key in found if not keys.saved_as(key.module, config.modules_to_save)]


def _read(directory: Path, key: Key) -> np.ndarray:
    with opened(directory) as (_, tensors):
        return tensors.read(key.key)


def parameters_of(module: str, config: Config, available: Iterable[str] | None = None) -> list[str]:
    """The parameters of a module that have factors of their own, as far as can be told in the module's order.

    A target without a module is the parameter of every module that has it.
    """
    targets = [keys.split_name(name) for name in config.target_parameters]
    parameters = [parameter for outer, parameter in targets if outer and keys.matches(module, [outer])]
    if not parameters and not config.targets(module):
        parameters = [parameter for outer, parameter in targets if not outer]
    parameters = experts.in_order(parameters)
    if available is None:
        return parameters
    return [parameter for parameter in parameters if f"{module}.{parameter}" in available]


def _named(module: str, levels: Levels, config: Config, wrapped: bool) -> dict[str, tuple[Shape, Shape]]:
    """The weights of a module's factors, by name; those of parameters as the config lists them.

    A module with factors that has modules with factors inside is PyTorch's attention.
    """
    parameters = parameters_of(module, config)
    if len(levels) != max(len(parameters), 1):
        named = f"names {', '.join(parameters)}" if parameters else "names none of its parameters"
        raise ValueError(f"{module}: {len(levels)} pairs of factors, and target_parameters {named}.")
    if not parameters:
        return {f"{module}.{'in_proj_weight' if wrapped else 'weight'}": levels[0]}
    return {f"{module}.{p}": shapes for p, shapes in zip(parameters, reversed(levels))}


def _weight(config: Config, name: str, a: Shape, b: Shape, embedding: bool) -> tuple[Kind, Shape]:
    """The kind and the shape of the weight that factors are for."""
    rank = config.rank(name if keys.is_parameter(name) else keys.split_name(name)[0])
    if embedding:
        return "embedding", (a[-1], b[0])
    if len(a) > 2:
        groups = max(1, rank // max(b[1], 1))
        return "conv", (b[0], a[1] // groups, *a[2:])
    if keys.is_parameter(name) and a[0] != rank:
        return "experts", (a[0] // rank, b[0], a[1])
    return ("conv1d", (a[1], b[0])) if config.fan_in_fan_out else ("linear", (b[0], a[1]))
