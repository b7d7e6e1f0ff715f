"""Names for PyTorch's own tensors: leaves that are the tensors of a checkpoint, or of an adapter, as they are."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.peft import keys
from lora_jax.peft.config import Config
from lora_jax.peft.keys import ADAPTER
from lora_jax.peft.names import Names, Weight
from lora_jax.peft.tensors import Tensors, pickle_beside

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Base = dict[str, Any]


def adapter_tensors(directory: Path) -> Tensors:
    """The tensors of an adapter directory.

    Raises:
      ValueError: It has none in safetensors.
    """
    if not (directory / ADAPTER).is_file():
        raise ValueError(f"{directory}: no {ADAPTER}{pickle_beside(directory)}.")
    return Tensors([directory / ADAPTER])


def of_adapter(directory: Path) -> tuple[Base, Names]:
    """The weights that an adapter is for, as far as it tells: their names, and shapes in PyTorch's layout.

    Raises:
      ValueError: The adapter's files are missing or damaged, or its factors do not go together.
    """
    config = Config.read(directory)
    shapes: Shapes = {}
    kinds: dict[str, str] = {}
    with adapter_tensors(directory) as tensors:
        for (module, embedding), levels in _factors(tensors).items():
            for name, (a, b) in _named(module, levels, config).items():
                kinds[name], shapes[name] = _weight(config, name, a, b, embedding)
        for stored in tensors:
            key = keys.parse(stored)
            if key and key.part == "value" and key.name not in shapes:
                shapes[key.name] = tensors[stored]
            elif key and key.part == "rows" and f"{key.module}.weight" not in shapes:
                ids = config.tokens(key.module) or ()
                shapes[f"{key.module}.weight"] = (max(ids, default=0) + 1, *tensors[stored][1:])
                kinds[f"{key.module}.weight"] = "embedding"
            elif key and key.part == "b_bias":
                shapes.setdefault(f"{key.module}.bias", tensors[stored])
    base = {leaf_path(name): jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    return base, _names(shapes, kinds)


def of_checkpoint(checkpoint: Tensors, directory: Path) -> tuple[Base, Names]:
    """A checkpoint's tensors as leaves for an adapter.

    Raises:
      ValueError: As :func:`of_adapter`; or what a square weight's axes are cannot be told.
    """
    config = Config.read(directory)
    shapes = {name: checkpoint[name] for name in checkpoint}
    kinds: dict[str, str] = {}
    prefix = ""
    with adapter_tensors(directory) as tensors:
        factors = _factors(tensors)
        prefix = _prefix(shapes, {module for module, _ in factors})
        bare = {name.removeprefix(prefix): name for name in shapes}
        order: list[str] = []
        for (module, embedding), levels in factors.items():
            module = module.removeprefix(prefix)
            own = [p for m, p in map(keys.split_name, config.target_parameters) if keys.matches(module, [m])]
            own = [name for p in own if (name := f"{module}.{p}") in bare]
            if own:
                found = _parameters({name: shapes[bare[name]] for name in own}, levels, config)
                kinds |= {bare[name]: kind for name, kind in found.items()}
                order += [bare[name] for name in found]
            elif f"{module}.weight" in bare and len(levels) == 1:
                name = bare[f"{module}.weight"]
                kinds[name] = _kind(shapes[name], *levels[0], embedding, config)
        for stored in tensors:
            key = keys.parse(stored)
            if key and key.part == "rows" and (name := bare.get(f"{key.module.removeprefix(prefix)}.weight")):
                kinds[name] = "embedding"
    shapes = {name: shapes[name] for name in (*order, *(x for x in shapes if x not in order))}
    return {leaf_path(name): Stored(checkpoint, name) for name in shapes}, _names(shapes, kinds, prefix)


class Stored:
    """A tensor of a checkpoint as a leaf, read when its values are asked for."""

    def __init__(self, checkpoint: Tensors, name: str):
        self._checkpoint = checkpoint
        self._name = name
        self.shape = checkpoint[name]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._checkpoint.read(self._name)
        return value if dtype is None else value.astype(dtype)


def leaf_path(name: str) -> str:
    """The path of a tensor's leaf."""
    return name.replace(".", "/")


def _names(shapes: Shapes, kinds: Mapping[str, str], prefix: str = "") -> Names:
    rows = tuple(Weight(leaf_path(name), name, module=kinds.get(name, "")) for name in shapes)  # pyrefly: ignore[bad-argument-type]
    return Names(rows, prefix=prefix)


def _factors(tensors: Tensors) -> dict[tuple[str, bool], list[tuple[Shape, Shape]]]:
    """Per module, and whether it is a lookup, the shapes of its factors, the outermost wrapper's first."""
    found: dict[tuple[str, bool], dict[int, dict[str, Shape]]] = {}
    for stored in tensors:
        key = keys.parse(stored)
        if key and key.part in ("a", "b"):
            levels = found.setdefault((key.module, key.embedding), {})
            levels.setdefault(key.depth, {})[key.part] = tensors[stored]
    for (module, _), levels in found.items():
        for parts in levels.values():
            if missing := {"a", "b"} - parts.keys():
                raise ValueError(f"{tensors.files[0]}: {module} has no {'lora_' + missing.pop().upper()}.")
    return {at: [(levels[d]["a"], levels[d]["b"]) for d in sorted(levels)] for at, levels in found.items()}


def _named(module: str, levels: list, config: Config) -> dict[str, tuple]:
    """The weights of a module's factors, by name; those of parameters as the config lists them."""
    own = [p for m, p in map(keys.split_name, config.target_parameters) if keys.matches(module, [m])]
    if not own:
        if len(levels) > 1:
            raise ValueError(f"{module}: {len(levels)} pairs of factors, and target_parameters names none of them")
        return {f"{module}.weight": levels[0]}
    return {f"{module}.{p}": shapes for p, shapes in zip(own, reversed(levels))}


def _weight(config: Config, name: str, a: Shape, b: Shape, embedding: bool) -> tuple[str, tuple[int, ...]]:
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


def _kind(shape: Shape, a: Shape, b: Shape, embedding: bool, config: Config) -> str:
    """What the module of a checkpoint's weight is."""
    if embedding:
        return "embedding"
    if len(shape) != 2:
        return "conv"
    linear, conv1d = shape == (b[0], a[1]), shape == (a[1], b[0])
    return "conv1d" if conv1d and (not linear or config.fan_in_fan_out) else "linear"


def _parameters(shapes: Shapes, levels: list, config: Config) -> dict[str, str]:
    """The kinds of one module's parameters, in the module's order: the one order that the shapes allow."""
    fitting = []
    for order in itertools.permutations(shapes):
        kinds = [_parameter_kind(shapes[n], *pair, config.rank(n)) for n, pair in zip(order, reversed(levels))]
        if len(levels) == len(order) and all(kinds):
            fitting.append(dict(zip(order, kinds)))
    if len(fitting) != 1 or "either" in fitting[0].values():
        said = "do not fit its factors" if not fitting else "fit its factors in more than one way"
        raise ValueError(f"the parameters {', '.join(shapes)} {said}")
    return fitting[0]


def _parameter_kind(shape: Shape, a: Shape, b: Shape, rank: int) -> str:
    if len(shape) == 2:
        return "linear" if shape == (b[0], a[1]) and a[0] == rank else ""
    if len(shape) != 3 or a[0] != rank * shape[0] or b[1] != rank * shape[0]:
        return ""
    plain, transposed = shape[1:] == (b[0], a[1]), shape[1:] == (a[1], b[0])
    return "either" if plain and transposed else "experts" if plain else "transposed_experts" if transposed else ""


def _prefix(shapes: Shapes, modules: set[str]) -> str:
    """What the checkpoint's names or the adapter's have in front of the others'."""
    known = {keys.split_name(name)[0] for name in shapes}
    candidates = ["", *dict.fromkeys(name.split(".")[0] + "." for name in (*modules, *shapes))]

    def found(prefix: str) -> int:
        bare = {name.removeprefix(prefix) for name in known}
        return sum(module.removeprefix(prefix) in bare for module in modules)

    return max(candidates, key=lambda prefix: (found(prefix), -candidates.index(prefix)))
