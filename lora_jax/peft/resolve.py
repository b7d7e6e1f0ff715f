"""Resolves the keys of an adapter: which tensor of the base each of them adapts."""

import dataclasses

from lora_jax.peft import keys
from lora_jax.peft.adapter_tensors import StoredTensor
from lora_jax.peft.keys import Key
from lora_jax.peft.load_context import LoadContext
from lora_jax.peft.module import ExpertSlice, Module


@dataclasses.dataclass(frozen=True)
class ResolvedKeys:
    """The tensors of an adapter of LoRA.

    Attributes:
      modules: By the base's tensor, the module with the factors that adapt it.
      values: Keys of tensors that replace one of the base.
      rows: Keys of trained rows.
    """

    modules: dict[str, Module[StoredTensor]]
    values: list[Key]
    rows: list[Key]

    @property
    def factor_keys(self) -> list[Key]:
        """The parsed keys of the modules' tensors."""
        stored = [tensor for module in self.modules.values() for tensor in module.tensors.values()]
        return [key for tensor in stored if (key := keys.parse(tensor.key)) is not None]


def resolve_keys(context: LoadContext) -> ResolvedKeys:
    """Resolves all keys of an adapter; those that the base has no tensor for become problems."""
    parsed = []
    for name in sorted(context.tensors):
        if keys.is_repeated(name, context.tensors):
            continue
        if key := keys.parse(name):
            parsed.append(key)
        else:
            context.problems.append(f"unused: {name!r} is not a key of PEFT's LoRA{context.ignore_hint(name)}")
    depths: dict[str, int] = {}
    for key in parsed:
        depths[key.module] = max(key.depth, depths.get(key.module, 0))
    modules: dict[str, Module[StoredTensor]] = {}
    for key in parsed:
        if key.part in ("value", "rows"):
            continue
        targets = _find_targets(context, key, depths[key.module])
        for name, target in targets.items():
            module = modules.get(name, target)
            tensors = {**module.tensors, key.part: StoredTensor(key.key, context.tensors)}
            modules[name] = dataclasses.replace(module, tensors=tensors)
        if not targets:
            context.problems.append(context.describe_unknown(key))
    return ResolvedKeys(modules, [k for k in parsed if k.part == "value"], [k for k in parsed if k.part == "rows"])


def _find_targets(context: LoadContext, key: Key, depth: int) -> dict[str, Module[StoredTensor]]:
    """The base's tensors that a factor adapts, with modules without tensors: one, or those of all experts."""
    base, path = context.base, context.base.bare(key.module)
    parameters: set[tuple[int, str, str]] = set()
    for outer, parameter in map(keys.split_name, context.config.target_parameters):
        if outer and not (keys.matches(key.module, [outer]) or keys.matches(path, [base.bare(outer)])):
            continue
        name = base.file_name(f"{path}.{parameter}")
        tensors = [tensor for tensor, _ in base.fused.get(name, ())] or [name]
        if tensors[0] in base.tensors:
            order = list(base.fused).index(name) if name in base.fused else base.rows[name]
            parameters.add((order, name, parameter))
    if parameters:
        # One wrapper per parameter, in the module's order; the innermost wrapper has the first parameter.
        number = depth - key.depth
        if number >= len(parameters):
            return {}
        _, name, parameter = sorted(parameters)[number]
        label = f"{key.module}.{parameter}"
        if name in base.fused:
            parts = base.fused[name]
            return {part: _make_module(context, part, label, True, position) for part, position in parts}
        return {name: _make_module(context, name, label, True)}
    for parameter in ("weight", "in_proj_weight"):
        name = base.file_name(f"{path}.weight") if parameter == "weight" else f"{path}.{parameter}"
        if key.depth == 0 and (name in base.tensors or name in base.tied):
            return {name: _make_module(context, name, f"{key.module}.{parameter}", False)}
    return {}


def _make_module(
    context: LoadContext, tensor: str, name: str, is_parameter: bool, expert: ExpertSlice | None = None
) -> Module[StoredTensor]:
    config, base = context.config, context.base
    label = name if is_parameter else keys.split_name(name)[0]
    return Module(
        name=name,
        kind=base.binding(base.tied.get(tensor, tensor)).kind,
        tensors={},
        rank=config.rank(label),
        scale=config.scale(label),
        dropout=config.lora_dropout,
        is_parameter=is_parameter,
        expert=expert,
        tied=tensor in base.tied,
    )
