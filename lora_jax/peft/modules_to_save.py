"""PEFT saves modules whole, and the biases of all modules or of all with factors: the rest of them from the base."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.peft import keys
from lora_jax.peft.exported import Exported
from lora_jax.peft.names import Names

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT saves for a `task_type`, whatever the config says."""


def complete(exported: Exported, names: Names, base: Any, task_type: str | None, entries: Collection[str]) -> None:
    """Decides what is saved as a module and what as a bias, and adds what belongs to it and is not trained.

    Args:
      exported: Gets `bias`, `saved`, further `values`, and problems.
      names: Of the base's leaves.
      base: The parameters; None where they are not at hand: then a part of a module is a problem.
      task_type: PEFT's, by which it saves a head.
      entries: Of `modules_to_save`, where the adapter comes from such a config.
    """
    adapted = {module.module for module in exported.modules}
    alone = [name for name in exported.values if _is_bias(name) and _weight_of(name) not in exported.values]
    inside = [name for name in alone if keys.split_name(name)[0] in adapted]
    exported.bias = "none" if not inside else "lora_only" if len(inside) == len(alone) else "all"
    by_bias = set(alone) if exported.bias == "all" else set(inside)
    heads = {head for head in HEADS.get(task_type or "", ()) if _is_declared(head, names)}
    modules = {keys.split_name(name)[0] for name in exported.values if name not in by_bias}
    # What an entry names is saved as that module, however many layers it has.
    wholes = {*heads, *(entry for entry in entries if any(keys.inside(module, entry) for module in modules))}
    modules = {module for module in modules if not any(keys.inside(module, entry) for entry in wholes)}
    wholes |= (composites := _composites(modules, adapted, names))
    exported.saved = {
        *wholes,
        *(x for x in modules if not any(keys.inside(x, entry) for entry in composites)),
        *entries,
    }

    def belongs(name: str) -> bool:
        module, _ = keys.split_name(name)
        if module in exported.saved or any(keys.inside(module, entry) for entry in wholes):
            return True
        return _is_bias(name) and (exported.bias == "all" or (exported.bias == "lora_only" and module in adapted))

    if base is None:
        for name in dict.fromkeys(_announced(exported, names, adapted, wholes)):
            exported.problems.append(
                f"{name}: PEFT saves whole modules, and the biases of all modules or of all with factors; train it "
                "too, or give base= to take it from there"
            )
        return
    for path, leaf in paths.flatten(base).as_dict().items():
        binding = names.get(path, leaf.shape) if hasattr(leaf, "shape") else None
        wanted = [] if binding is None else [n for n, new in binding.in_model.items() if belongs(new)]
        if binding is None or all(binding.in_model[name] in exported.values for name in wanted):
            continue
        tensors = binding.split(np.asarray(leaf))
        for name in wanted:
            exported.values.setdefault(binding.in_model[name], tensors[name])


def _composites(modules: Collection[str], adapted: Collection[str], names: Names) -> set[str]:
    """The outermost modules of several layers, such as a classification head, that are saved with all they have."""
    composites = set()
    for outer in {module.partition(".")[0] for module in modules if "." in module}:
        rows = [row for row in names.weights if (row.in_model or row.name).startswith(f"{outer}.")]
        parts = {keys.split_name(name)[0] for row in rows for name in row.examples()}
        if parts <= set(modules) and not any(keys.inside(module, outer) for module in adapted):
            composites.add(outer)
    return composites


def _is_declared(entry: str, names: Names) -> bool:
    """Whether a module has tensors in a table of names."""
    return any(keys.inside(keys.split_name(name)[0], entry) for row in names.weights for name in row.examples())


def _announced(exported: Exported, names: Names, adapted: set[str], wholes: Collection[str]) -> Iterator[str]:
    """The tensors that belong to what is saved and are not there, as far as the names alone can tell."""
    for row in names.weights:
        name = row.in_model or row.name
        if any(keys.inside(keys.split_name(name)[0], entry) for entry in wholes):
            yield from (example for example in row.examples() if example not in exported.values)
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
