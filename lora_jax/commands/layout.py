"""Infers the weights that an adapter is for from its own files."""

import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.commands.factor_shapes import Levels, Shape, factor_shapes, parameters_of, parse_keys
from lora_jax.commands.leaves import Kind, LazyTensor, leaf_path, make_names
from lora_jax.peft import keys, mlx_experts, ties
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.names import Names
from lora_jax.peft.opening import is_mlx, open_adapter


def infer_base(directory: Path, ignore: Sequence[str] = ()) -> tuple[dict[str, Any], Names]:
    """Infers the base of an adapter: the names of its weights, and their shapes in PyTorch's layout.

    A matrix that PEFT stores in addition to its factors (see :func:`find_copies`) is assumed to be the base's.

    Raises:
      ValueError: The adapter's files are missing or damaged, or its factors are inconsistent.
    """
    shapes: dict[str, Shape] = {}
    kinds: dict[str, Kind] = {}
    stored: dict[str, LazyTensor] = {}
    with open_adapter(directory, ignore) as (config, tensors):
        parsed = parse_keys(tensors)
        wrapped = {parent for key in parsed for parent in keys.wrapped_parents(key.key)}
        for (module, embedding), levels in factor_shapes(tensors, parsed).items():
            for name, (a, b) in _name_weights(module, levels, config, module in wrapped).items():
                kinds[name], shapes[name] = _infer_weight(config, name, a, b, embedding)
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
            stored[key.name] = LazyTensor(tensors[key.key], lambda key=key: _read(directory, key))
        tied = _find_tied(parsed, kinds, config, tensors) if config.ensure_weight_tying else {}
    base = {
        leaf_path(name): stored.get(name, jax.ShapeDtypeStruct(shape, np.float32))
        for name, shape in shapes.items()
        if (name,) not in tied.values()
    }
    fused = mlx_experts.find_fused(keys.split_name(name)[0] for name in shapes) if is_mlx(directory) else ()
    return base, dataclasses.replace(make_names(shapes, kinds, tied), fused=tuple(fused))


def find_copies(directory: Path, ignore: Sequence[str] = ()) -> list[str]:
    """Returns the weights that an adapter stores in full although its config does not list them as trained.

    PEFT stores embeddings in this way if they have factors or the vocabulary may have grown. Only a comparison with the
    base shows whether they changed.
    """
    with open_adapter(directory, ignore) as (config, tensors):
        return [key.name for key in _copies(parse_keys(tensors), config)]


def _copies(parsed: Iterable[Key], config: Config) -> list[Key]:
    matrices = [key for key in parsed if key.part == "value" and keys.split_name(key.name)[1] == "weight"]
    return [key for key in matrices if not keys.saved_module(key.module, config.modules_to_save)]


def _read(directory: Path, key: Key) -> np.ndarray:
    with open_adapter(directory) as (_, tensors):
        return tensors.read(key.key)


def _find_tied(
    parsed: Iterable[Key], kinds: Mapping[str, Kind], config: Config, tensors: AdapterTensors
) -> dict[str, tuple[str, ...]]:
    """Returns embeddings, with the heads that the adapter changes in the same way."""
    by_module: dict[str, list[Key]] = collections.defaultdict(list)
    for key in parsed:
        by_module[key.module].append(key)
    return {
        table: (f"{head}.weight",)
        for table, kind in kinds.items()
        for head in by_module
        if kind == "embedding" and kinds.get(f"{head}.weight") == "linear" and not re.search(r"\.\d+\.", head)
        if not ties.untied_reason(by_module[keys.split_name(table)[0]], by_module[head], config, tensors)
    }


def _name_weights(module: str, levels: Levels, config: Config, wrapped: bool) -> dict[str, tuple[Shape, Shape]]:
    """Returns the shapes of a module's factors by weight; those of parameters in the config's order.

    A module that has factors and contains modules with factors is PyTorch's attention.
    """
    parameters = parameters_of(module, config)
    if len(levels) != max(len(parameters), 1):
        named = f"names {', '.join(parameters)}" if parameters else "names none of its parameters"
        raise ValueError(f"{module}: {len(levels)} pairs of factors, and target_parameters {named}.")
    if not parameters:
        return {f"{module}.{'in_proj_weight' if wrapped else 'weight'}": levels[0]}
    return {f"{module}.{p}": shapes for p, shapes in zip(parameters, reversed(levels))}


def _infer_weight(config: Config, name: str, a: Shape, b: Shape, embedding: bool) -> tuple[Kind, Shape]:
    """Infers the kind and the shape of a weight from the shapes of its factors."""
    rank = config.rank(name if keys.is_parameter(name) else keys.split_name(name)[0])
    if embedding:
        return "embedding", (a[-1], b[0])
    if len(a) > 2:
        groups = max(1, rank // max(b[1], 1))
        return "conv", (b[0], a[1] // groups, *a[2:])
    if keys.is_parameter(name) and a[0] != rank:
        return "experts", (a[0] // rank, b[0], a[1])
    return ("conv1d", (a[1], b[0])) if config.fan_in_fan_out else ("linear", (b[0], a[1]))
