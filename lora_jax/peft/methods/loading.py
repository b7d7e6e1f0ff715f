"""Loads the adapters of PEFT's methods other than LoRA."""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapters.protocol import BATCH, OUT, Adapter
from lora_jax.peft import keys
from lora_jax.peft.adapter_tensors import AdapterTensors, StoredTensor
from lora_jax.peft.config import CONFIG, Config
from lora_jax.peft.factor_layout import FactorLayout, pad_rank
from lora_jax.peft.load_context import LoadContext
from lora_jax.peft.loader import load_delta
from lora_jax.peft.methods.ia3 import IA3Method, bias_gain
from lora_jax.peft.methods.method import Method, Read, Settings, factor_layout
from lora_jax.peft.methods.table import METHODS, NORM_TUNING
from lora_jax.peft.methods.vera import PAIR
from lora_jax.peft.module import Module
from lora_jax.peft.names import Names
from lora_jax.peft.opening import adapter_files
from lora_jax.peft.problems import collect_problems
from lora_jax.peft.tensors import Tensors, read_json
from lora_jax.peft.weights import Binding

NORMS = ".ln_tuning_layers."


def method_in(directory: Path) -> str | None:
    """Returns the `peft_type` of an adapter directory of another method than LoRA; None for others."""
    if not (directory / CONFIG).is_file():
        return None
    kind = str(read_json(directory / CONFIG).get("peft_type"))
    return kind if kind in METHODS or kind == NORM_TUNING else None


def load_method(
    directory: Path, content: Mapping[str, Any], base: Any, names: Names, ignore: Sequence[str] = ()
) -> dict[str, Adapter]:
    """Loads an adapter of another method than LoRA.

    Args:
      directory: The adapter's directory.
      content: The content of its `adapter_config.json`.
      base: See :func:`lora_jax.peft.load`.
      names: See :func:`lora_jax.peft.load`.
      ignore: See :func:`lora_jax.peft.load`.

    Raises:
      ValueError: See :func:`lora_jax.peft.load`.
    """
    kind, settings = content["peft_type"], Settings(content)
    saved = settings.names("modules_to_save")
    with adapter_files(directory, ignore) as tensors:
        if kind == NORM_TUNING:
            config = Config(modules_to_save=_list_names(saved, settings.names("target_modules")))
            renamed = AdapterTensors(tensors, {name.replace(NORMS, "."): name for name in tensors})
            context = LoadContext(config, renamed, base, names)
            return context.finish(directory, load_delta(context))
        method, parts = METHODS[kind](), find_parts(tensors, METHODS[kind].parts)
        used = {key for module_parts in parts.values() for key in module_parts.values()} | set(PAIR)
        rest = AdapterTensors(tensors, {name: name for name in tensors if name not in used})
        context = LoadContext(Config(modules_to_save=_list_names(saved)), rest, base, names)
        if set(PAIR) <= set(tensors):
            settings = Settings({**content, "pair": tuple(map(tensors.read, PAIR))})
        modules = _make_modules(context, parts, AdapterTensors(tensors))
        delta = _load_adapters(context, method, modules, settings)
        return context.finish(directory, delta | load_delta(context))


def _list_names(*names: Sequence[str] | str) -> tuple[str, ...]:
    """Concatenates lists of modules' names; regular expressions contribute none."""
    return tuple(name for some in names if not isinstance(some, str) for name in some)


def find_parts(tensors: Tensors, parts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Returns the keys of a method's tensors, by module and part."""
    pattern = re.compile(rf"{re.escape(keys.PREFIX)}(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, parts))})")
    by_module: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for key in tensors:
        if match := pattern.fullmatch(key):
            by_module[match["module"]][match["part"]] = key
    return by_module


def _make_modules(
    context: LoadContext, parts: Mapping[str, Mapping[str, str]], tensors: AdapterTensors
) -> dict[str, Module[StoredTensor]]:
    """Makes the modules of an adapter, by the base's tensor; those without a tensor become problems."""
    modules: dict[str, Module[StoredTensor]] = {}
    for path, module_parts in parts.items():
        name = context.base.file_name(f"{path}.weight")
        if name not in context.base.tensors:
            key = next(iter(module_parts.values()))
            context.problems.append(f"unused: {tensors.describe(key)}: the base has no {name}")
            continue
        stored = {part: StoredTensor(key, tensors) for part, key in module_parts.items()}
        modules[name] = Module(name=f"{path}.weight", kind=context.base.binding(name).kind, tensors=stored)
    return modules


def _load_adapters(
    context: LoadContext, method: Method, modules: Mapping[str, Module[StoredTensor]], settings: Settings
) -> dict[str, Adapter]:
    by_leaf: dict[str, dict[tuple[int, ...], dict[str, np.ndarray]]] = collections.defaultdict(dict)
    bindings: dict[str, Binding] = {}
    for name, module in modules.items():
        binding, index = context.base.tensors[name]
        with collect_problems(context.problems):
            layout = factor_layout(method, binding)
            by_leaf[binding.path][index] = method.fields(layout, _reader(module), module.path, settings)
            bindings[binding.path] = binding
    _check_targets(context, method, modules, settings)
    delta: dict[str, Adapter] = {}
    for path, binding in bindings.items():
        with collect_problems(context.problems):
            layout = factor_layout(method, binding)
            arrays = _stack_layers(method, layout, by_leaf[path])
            delta[path] = method.build(arrays, layout, settings)
            if isinstance(method, IA3Method):
                delta |= _load_bias_gain(context, arrays, binding)
    return delta


def _reader(module: Module[StoredTensor]) -> Read:
    def read(part: str, shape: Sequence[int] | None) -> np.ndarray:
        if part not in module.tensors:
            raise _MissingPartError(f"missing: {keys.PREFIX}{module.path}.{part}")
        return module.tensors[part].read(shape)

    return read


class _MissingPartError(ValueError, KeyError):
    """A missing part; methods that have several forms catch it as a KeyError."""

    def __str__(self) -> str:
        return str(self.args[0])


def _stack_layers(
    method: Method, layout: FactorLayout, layers: Mapping[tuple[int, ...], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Stacks the fields of all layers of a leaf."""
    names = {name for fields in layers.values() for name in fields}
    lead, batch = layout.leading_sizes, layout.sizes(layout.labels(BATCH))
    arrays = {}
    for name in sorted(names):
        values = {index: fields[name] for index, fields in layers.items() if name in fields}
        if len(values) < len(layers):
            raise ValueError(f"unsupported: the layers of {layout.binding.path!r} have different parts")
        if name in method.rank_fields:
            rank = max(value.shape[0] for value in values.values())
            values = {index: pad_rank(value, rank, 0) for index, value in values.items()}
        shapes = {value.shape for value in values.values()}
        if len(shapes) > 1:
            listed = " and ".join(map(str, sorted(shapes)))
            raise ValueError(f"unsupported: {name} of the layers of {layout.binding.path!r} has shapes {listed}")
        (shape,) = shapes
        stacked = np.broadcast_to(method.identity_like(name, shape), (*lead, *shape))
        stacked = stacked.astype(np.result_type(*values.values()))
        for index, value in values.items():
            stacked[layout.slices(index)] = value
        arrays[name] = stacked.reshape((*batch, *shape))
    return arrays


def _load_bias_gain(context: LoadContext, arrays: Mapping[str, np.ndarray], binding: Binding) -> dict[str, Adapter]:
    """PEFT multiplies a module's whole output, so a bias of the base gets the same gains."""
    name = context.base.bias(context.base.bare(next(iter(binding.tensors))))
    if f"gain {OUT}" not in arrays or name is None:
        return {}
    bias = context.base.binding(name)
    axes = (BATCH,) * (len(bias.shape) - len(bias.tensor_axes)) + (OUT,) * len(bias.tensor_axes)
    return {bias.path: bias_gain(arrays[f"gain {OUT}"].reshape(bias.shape), axes)}


def _check_targets(
    context: LoadContext, method: Method, modules: Mapping[str, Module[StoredTensor]], settings: Settings
) -> None:
    """Every target of the config must have tensors."""
    targets = Config(target_modules=settings.names("target_modules"), exclude_modules=settings.names("exclude_modules"))
    for name, (binding, _) in context.base.tensors.items():
        module, parameter = keys.split_name(context.base.in_model.get(name, name))
        is_saved = any(keys.is_inside(module, entry) for entry in context.config.modules_to_save)
        if parameter != "weight" or not binding.roles or is_saved or name in modules:
            continue
        if targets.is_target(module):
            context.problems.append(f"missing: {keys.PREFIX}{module}.{method.parts[0]}")
