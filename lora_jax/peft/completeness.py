"""Checks that an adapter has every tensor that its config announces, and that its base can hold what it does."""

import collections
from collections.abc import Collection, Sequence

from lora_jax.leaves import is_abstract
from lora_jax.peft import keys, ties
from lora_jax.peft.keys import Key
from lora_jax.peft.load_context import LoadContext
from lora_jax.peft.resolve import ResolvedKeys


def check_shared(context: LoadContext, adapted: Sequence[Key]) -> None:
    """Reports modules that PEFT wraps without effect: PyTorch's model calls other modules with the same weight."""
    base = context.base
    for module in dict.fromkeys(key.module for key in adapted):
        name = base.file_name(f"{module}.weight")
        if name not in base.tensors or is_abstract(base.leaves[base.binding(name).path]):
            continue  # an abstract base is inferred from the adapter, and may lack other modules
        parts = [key.part for key in adapted if key.module == module]
        is_copy = parts == ["value"] and not keys.saved_module(module, context.config.modules_to_save)
        if not is_copy and ties.is_shared(name, base.tensors):
            context.problems.append(f"{ties.describe_shared(module)}; ignore=({base.bare(module)!r},) passes it over")


def find_untied(context: LoadContext, adapted: Sequence[Key]) -> set[str]:
    """Returns the weights that are one leaf of the base and two in the adapter; each pair is a problem."""
    base = context.base
    by_tensor = collections.defaultdict(list)
    for key in adapted:
        by_tensor[base.file_name(f"{key.module}.weight")].append(key)
    untied: set[str] = set()
    for other, primary in base.tied.items():
        if reason := ties.untied_reason(by_tensor[primary], by_tensor[other], context.config, context.tensors):
            untied |= {primary, other}
            context.problems.append(
                f"tied: {reason}, so that PEFT's model has two weights; {base.in_model[primary]} and {other} are one "
                f"leaf of this base: load the model untied, with a leaf and a row of names for {other}, or merge "
                "the adapter into the checkpoint (lora-jax merge)"
            )
    return untied


def check_complete(context: LoadContext, adapter_keys: ResolvedKeys) -> None:
    """Reports tensors that the config announces and the adapter lacks."""
    _check_targets(context, adapter_keys)
    adapted = {context.base.file_name(key.name) for key in adapter_keys.values}
    _check_biases(context, adapter_keys.modules, adapted)
    for entry in context.config.modules_to_save:
        for name, in_model in context.base.in_model.items():
            module, parameter = keys.split_name(in_model)
            if name not in adapted and not context.tensors.ignores(in_model) and keys.is_inside(module, entry):
                context.problems.append("missing: " + keys.value_key(module, parameter, wrapped=False))
    for module in context.config.trainable_token_indices:
        has_rows = any(not module or keys.matches(key.module, [module]) for key in adapter_keys.rows)
        if not has_rows and not context.tensors.ignores(module):
            context.problems.append(f"missing: the trained tokens of {module or 'the embedding'}")


def _check_targets(context: LoadContext, adapter_keys: ResolvedKeys) -> None:
    """Every target of the config must have factors."""
    base, config, modules = context.base, context.config, adapter_keys.modules
    matrices = [name for name, (binding, _) in base.tensors.items() if binding.roles and not keys.is_parameter(name)]
    for name in (*matrices, *base.tied):
        module = keys.split_name(base.in_model.get(name, name))[0]
        is_saved = any(keys.is_inside(module, entry) for entry in config.modules_to_save)
        if name in modules or is_saved or not config.is_target(module) or context.tensors.ignores(module):
            continue
        if name in base.tied and not config.ensure_weight_tying:
            continue
        embedding = name in base.tensors and base.binding(name).kind == "embedding"
        expected = keys.factor_keys(module, embedding=embedding)
        context.problems.append(f"missing: {expected['a']}, {expected['b']}")
    for target in config.target_parameters:
        has_factors = any(keys.matches(module.label, [target]) for module in modules.values())
        if not has_factors and not context.tensors.ignores(target):
            context.problems.append(f"missing: the factors of the parameter {target}")


def _check_biases(context: LoadContext, modules: Collection[str], adapted: Collection[str]) -> None:
    """Every bias that the config's `bias` trains must be stored."""
    base, bias = context.base, context.config.bias
    for name in base.tensors:
        in_model = base.in_model[name]
        module, parameter = keys.split_name(in_model)
        if name in adapted or parameter != "bias" or context.tensors.ignores(in_model):
            continue
        has_factors = base.file_name(f"{module}.weight") in modules
        if bias == "all" or (bias == "lora_only" and has_factors):
            context.problems.append("missing: " + keys.value_key(module, parameter, wrapped=has_factors))
