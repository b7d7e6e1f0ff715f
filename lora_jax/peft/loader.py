"""The delta of an adapter of LoRA."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from lora_jax.adapters.protocol import Adapter
from lora_jax.peft.adapter_tensors import StoredTensor
from lora_jax.peft.completeness import check_complete, check_shared, find_untied
from lora_jax.peft.load_context import LoadContext
from lora_jax.peft.low_rank import make_low_rank
from lora_jax.peft.module import Module
from lora_jax.peft.problems import collect_problems
from lora_jax.peft.replacements import load_offsets, load_rows, load_values
from lora_jax.peft.resolve import resolve_keys


def load_delta(context: LoadContext) -> dict[str, Adapter]:
    """Loads all tensors of an adapter of LoRA; the delta is complete if there are no problems."""
    keys = resolve_keys(context)
    check_shared(context, [*keys.factor_keys, *keys.values])
    untied = find_untied(context, [*keys.factor_keys, *keys.values, *keys.rows])
    delta = _load_factors(context, keys.modules)
    _add(context, delta, load_offsets(context, keys.modules).items())
    values = [key for key in keys.values if context.base.file_name(key.name) not in untied]
    _add(context, delta, load_values(context, values, keys.modules).items())
    _add(context, delta, load_rows(context, keys.rows, untied))
    check_complete(context, keys)
    return delta


def _load_factors(context: LoadContext, modules: Mapping[str, Module[StoredTensor]]) -> dict[str, Adapter]:
    base, config = context.base, context.config
    by_leaf: dict[str, dict[tuple[int, ...], Module[StoredTensor]]] = collections.defaultdict(dict)
    for name, module in modules.items():
        if name in base.tied:
            continue
        if not config.lora_bias or base.bias(name) is not None:  # an offset of the layer's bias, not a part of the LoRA
            tensors = {part: tensor for part, tensor in module.tensors.items() if part != "b_bias"}
            module = dataclasses.replace(module, tensors=tensors)
        binding, index = base.tensors[name]
        by_leaf[binding.path][index] = module
    bindings = {base.binding(name).path: base.binding(name) for name in modules if name not in base.tied}
    delta: dict[str, Adapter] = {}
    for path, leaf_modules in by_leaf.items():
        with collect_problems(context.problems):
            delta[path] = make_low_rank(bindings[path], leaf_modules, base.leaves[path], use_dora=config.use_dora)
    return delta


def _add(context: LoadContext, delta: dict[str, Adapter], adapters: Iterable[tuple[str, Adapter]]) -> None:
    for path, node in adapters:
        if path in delta:
            context.problems.append(f"twice: {path!r} would have {delta[path].kind} and {node.kind}")
        delta[path] = node
