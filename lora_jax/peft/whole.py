"""PEFT saves modules whole, and the biases of all modules or of all with factors: the rest of them from the base."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.peft import keys
from lora_jax.peft.exported import Exported
from lora_jax.peft.names import Names


def complete(exported: Exported, names: Names, base: Any) -> None:
    """Decides what is saved as a module and what as a bias, and adds what belongs to it and is not trained.

    Args:
      exported: Gets `bias`, `saved`, further `values`, and problems.
      names: Of the base's leaves.
      base: The parameters; None where they are not at hand: then a part of a module is a problem.
    """
    adapted = {module.module for module in exported.modules}
    alone = [name for name in exported.values if _is_bias(name) and _weight_of(name) not in exported.values]
    inside = [name for name in alone if keys.split_name(name)[0] in adapted]
    exported.bias = "none" if not inside else "lora_only" if len(inside) == len(alone) else "all"
    by_bias = set(alone) if exported.bias == "all" else set(inside)
    exported.saved = {keys.split_name(name)[0] for name in exported.values if name not in by_bias}

    def belongs(name: str) -> bool:
        module, _ = keys.split_name(name)
        if module in exported.saved:
            return True
        return _is_bias(name) and (exported.bias == "all" or (exported.bias == "lora_only" and module in adapted))

    if base is None:
        for name in dict.fromkeys(_announced(exported, names, adapted)):
            exported.problems.append(
                f"{name}: PEFT saves whole modules, and the biases of all modules or of all with factors; train it "
                "too, or give base= to take it from there"
            )
        return
    for path, leaf in paths.flatten(base).as_dict().items():
        place = names.place(path, leaf.shape) if hasattr(leaf, "shape") else None
        wanted = [] if place is None else [n for n, new in place.in_model.items() if belongs(new)]
        if place is None or all(place.in_model[name] in exported.values for name in wanted):
            continue
        tensors = place.split(np.asarray(leaf))
        for name in wanted:
            exported.values.setdefault(place.in_model[name], tensors[name])


def _announced(exported: Exported, names: Names, adapted: set[str]) -> Iterator[str]:
    """The tensors that belong to what is saved and are not there, as far as the names alone can tell."""
    for module in exported.saved:
        for parameter in {keys.split_name(row.in_model or row.name)[1] for row in names.weights}:
            name = f"{module}.{parameter}"
            if name not in exported.values and any(row.declares(name) for row in names.weights):
                yield name
    if exported.bias == "none":
        return
    for module in adapted:
        name = f"{module}.bias"
        if name not in exported.values and any(row.declares(name) for row in names.weights):
            yield name
    if exported.bias == "all":
        for row in names.weights:
            if _is_bias(row.name) and not any(map(row.declares, exported.values)):
                yield row.in_model or row.name


def _is_bias(name: str) -> bool:
    return keys.split_name(name)[1] == "bias"


def _weight_of(bias: str) -> str:
    return f"{keys.split_name(bias)[0]}.weight"
