"""Completes what PEFT saves in full: all tensors of a saved module, the biases of all (adapted) modules."""

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.peft import keys
from lora_jax.peft.base_index import bindings_of
from lora_jax.peft.names import Names
from lora_jax.peft.torch_adapter import TorchAdapter

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The modules that PEFT always saves for a `task_type`."""


def complete(adapter: TorchAdapter, names: Names, base: Any, task_type: str | None, entries: Collection[str]) -> None:
    """Determines which modules and which biases are saved, and adds their tensors that are not trained.

    Args:
      adapter: Gets `bias`, `saved`, further `values`, and problems.
      names: The names of the base's leaves.
      base: The parameters. If None, a module that is trained in part is a problem.
      task_type: PEFT's task type, for which it saves a head.
      entries: The `modules_to_save` of the config that the adapter was loaded with.
    """
    adapted = {module.path for module in adapter.modules}
    lone_biases = [name for name in adapter.values if _is_bias(name) and _weight_of(name) not in adapter.values]
    adapted_biases = [name for name in lone_biases if keys.split_name(name)[0] in adapted]
    if adapted_biases:
        adapter.bias = "lora_only" if len(adapted_biases) == len(lone_biases) else "all"
    by_bias = set(lone_biases) if adapter.bias == "all" else set(adapted_biases)
    heads = {head for head in HEADS.get(task_type or "", ()) if _is_declared(head, names)}
    modules = {keys.split_name(name)[0] for name in adapter.values if name not in by_bias}
    # A module that an entry names is saved in full, with all layers inside it.
    outer = {*heads, *(entry for entry in entries if any(keys.is_inside(module, entry) for module in modules))}
    modules = {module for module in modules if not any(keys.is_inside(module, entry) for entry in outer)}
    outer |= (composites := _find_composites(modules, adapted, names))
    adapter.saved = {
        *outer,
        *(x for x in modules if not any(keys.is_inside(x, entry) for entry in composites)),
        *entries,
    }

    def is_saved(name: str) -> bool:
        module, _ = keys.split_name(name)
        if module in adapter.saved or any(keys.is_inside(module, entry) for entry in outer):
            return True
        return _is_bias(name) and (adapter.bias == "all" or (adapter.bias == "lora_only" and module in adapted))

    if base is None:
        for name in dict.fromkeys(_find_missing(adapter, names, adapted, outer)):
            adapter.problems.append(
                f"{name}: PEFT saves full modules, and the biases of all modules or of all with factors; train it "
                "too, or pass base= to take it from the base"
            )
        return
    leaves = paths.flatten(base).as_dict()
    for path, binding in bindings_of(base, names):
        saved = [name for name, in_model in binding.in_model.items() if is_saved(in_model)]
        if all(binding.in_model[name] in adapter.values for name in saved):
            continue
        tensors = binding.split(np.asarray(leaves[path]))
        for name in saved:
            adapter.values.setdefault(binding.in_model[name], tensors[name])


def _find_composites(modules: Collection[str], adapted: Collection[str], names: Names) -> set[str]:
    """The outermost modules of several layers, such as a classification head, whose tensors are all saved."""
    composites = set()
    for outer in {module.partition(".")[0] for module in modules if "." in module}:
        rows = [row for row in names.weights if (row.in_model or row.name).startswith(f"{outer}.")]
        parts = {keys.split_name(name)[0] for row in rows for name in row.examples()}
        if parts <= set(modules) and not any(keys.is_inside(module, outer) for module in adapted):
            composites.add(outer)
    return composites


def _is_declared(entry: str, names: Names) -> bool:
    """Whether a table of names has tensors of a module."""
    return any(keys.is_inside(keys.split_name(name)[0], entry) for row in names.weights for name in row.examples())


def _find_missing(adapter: TorchAdapter, names: Names, adapted: set[str], outer: Collection[str]) -> Iterator[str]:
    """Yields tensors of saved modules that the adapter lacks, according to the table of names alone."""
    for row in names.weights:
        name = row.in_model or row.name
        if any(keys.is_inside(keys.split_name(name)[0], entry) for entry in outer):
            yield from (example for example in row.examples() if example not in adapter.values)
    for module in adapter.saved:
        for parameter in {keys.split_name(row.in_model or row.name)[1] for row in names.weights}:
            name = f"{module}.{parameter}"
            if name not in adapter.values and any(row.declares(name) for row in names.weights):
                yield name
    if adapter.bias == "none":
        return
    for module in adapted:
        name = f"{module}.bias"
        if name not in adapter.values and any(row.declares(name) for row in names.weights):
            yield name
    if adapter.bias == "all":
        for row in names.weights:
            if _is_bias(row.name) and not any(map(row.declares, adapter.values)):
                yield row.in_model or row.name


def _is_bias(name: str) -> bool:
    return keys.split_name(name)[1] == "bias"


def _weight_of(bias: str) -> str:
    return f"{keys.split_name(bias)[0]}.weight"
