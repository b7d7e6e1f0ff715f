"""The shapes of the factors in an adapter's files, and the parameters that they are for."""

from collections.abc import Iterable

from lora_jax.peft import experts, keys
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key

Shape = tuple[int, ...]
Levels = list[tuple[Shape, Shape]]
"""The shapes of a module's factors: one pair, or one for each of its parameters, the outermost wrapper's first."""


def parse_keys(tensors: AdapterTensors) -> list[Key]:
    """Parses the keys of an adapter, without those that repeat others."""
    return [key for name in tensors if not keys.is_repeated(name, tensors) and (key := keys.parse(name))]


def factor_shapes(tensors: AdapterTensors, parsed: Iterable[Key]) -> dict[tuple[str, bool], Levels]:
    """Returns the shapes of each module's factors, by module and whether it is a lookup.

    Raises:
      ValueError: A factor is missing, or has less than two axes.
    """
    by_depth: dict[tuple[str, bool], dict[int, dict[str, Shape]]] = {}
    for key in parsed:
        if key.part in ("a", "b"):
            shape = tensors[key.key]
            if len(shape) < 2:
                file = tensors.file_of(key.key)
                raise ValueError(f"{file}: {key.key} has the shape {shape}, expected two axes or more.")
            by_depth.setdefault((key.module, key.embedding), {}).setdefault(key.depth, {})[key.part] = shape
    for (module, embedding), levels in by_depth.items():
        for depth, parts in levels.items():
            if missing := {"a", "b"} - parts.keys():
                key = keys.factor_keys(module, embedding=embedding, depth=depth)[missing.pop()]
                file = tensors.file_of(next(iter(tensors)))
                raise ValueError(f"{file}: {key} is missing, and the other factor of its module is not.")
    return {
        module: [(levels[depth]["a"], levels[depth]["b"]) for depth in sorted(levels)]
        for module, levels in by_depth.items()
    }


def parameters_of(module: str, config: Config, available: Iterable[str] | None = None) -> list[str]:
    """Returns the parameters of a module that have their own factors, in the module's order if it is known.

    A target without a module selects the parameter in every module that has it.
    """
    targets = [keys.split_name(name) for name in config.target_parameters]
    parameters = [parameter for outer, parameter in targets if outer and keys.matches(module, [outer])]
    if not parameters and not config.is_target(module):
        parameters = [parameter for outer, parameter in targets if not outer]
    parameters = experts.sort_parameters(parameters)
    if available is None:
        return parameters
    return [parameter for parameter in parameters if f"{module}.{parameter}" in available]
