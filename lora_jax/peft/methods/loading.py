"""Adapters of PEFT's other methods, as deltas."""

import collections
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.adapters.protocol import BATCH, OUT, Adapter
from lora_jax.peft import keys
from lora_jax.peft.config import Config
from lora_jax.peft.factor_layout import FactorLayout, pad_rank
from lora_jax.peft.loading import OTHER_METHODS, Loader, finished
from lora_jax.peft.methods.ia3 import IA3Method, bias_gain
from lora_jax.peft.methods.method import Method, Read, Settings, factor_layout
from lora_jax.peft.methods.table import METHODS
from lora_jax.peft.methods.vera import PAIR
from lora_jax.peft.names import Binding, Names
from lora_jax.peft.opening import adapter_tensors
from lora_jax.peft.stored import Stored
from lora_jax.peft.tensors import Tensors
from lora_jax.peft.view import View

NORMS = ".ln_tuning_layers."


def load_method(
    directory: Path, content: Mapping[str, Any], base: Any, names: Names, ignore: Sequence[str] = ()
) -> dict[str, Adapter]:
    """The delta of an adapter of another method than LoRA.

    Args:
      directory: Of the adapter.
      content: Of its `adapter_config.json`.
      base: As for :func:`lora_jax.peft.load`.
      names: Likewise.
      ignore: Likewise.

    Raises:
      ValueError: As there.
    """
    kind, settings = content["peft_type"], Settings(content)
    saved = settings.names("modules_to_save")
    with adapter_tensors(directory, ignore) as tensors:
        if kind == "LN_TUNING":
            config = Config(modules_to_save=_listed(saved, settings.names("target_modules")))
            view = View(tensors, {name.replace(NORMS, "."): name for name in tensors})
            loader = Loader(Stored(config, view), base, names)
            return finished(directory, loader, loader.delta())
        method, by_module = METHODS[kind](), modules_of(tensors, METHODS[kind].parts)
        used = {key for parts in by_module.values() for key in parts.values()} | set(PAIR)
        view = View(tensors, {name: name for name in tensors if name not in used})
        loader = Loader(Stored(Config(modules_to_save=_listed(saved)), view), base, names)
        if set(PAIR) <= set(tensors):
            settings = Settings({**content, "pair": tuple(map(tensors.read, PAIR))})
        delta = _adapters(method, by_module, Stored(loader.config, tensors), loader, settings)
        return finished(directory, loader, delta | loader.delta())


OTHER_METHODS.update(dict.fromkeys((*METHODS, "LN_TUNING"), load_method))


def _listed(*names: Sequence[str] | str) -> tuple[str, ...]:
    """Names of modules; a regular expression names none."""
    return tuple(name for some in names if not isinstance(some, str) for name in some)


def modules_of(tensors: Tensors, parts: Sequence[str]) -> dict[str, dict[str, str]]:
    """The keys of a method's tensors, by module and part."""
    pattern = re.compile(rf"{re.escape(keys.PREFIX)}(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, parts))})")
    by_module: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for key in tensors:
        if match := pattern.fullmatch(key):
            by_module[match["module"]][match["part"]] = key
    return by_module


def _adapters(
    method: Method, by_module: Mapping[str, Mapping[str, str]], stored: Stored, loader: Loader, settings: Settings
) -> dict[str, Adapter]:
    by_leaf: dict[str, dict[tuple[int, ...], dict[str, np.ndarray]]] = collections.defaultdict(dict)
    bindings: dict[str, Binding] = {}
    for module, parts in by_module.items():
        name = loader.in_file(f"{module}.weight")
        if name not in loader.where:
            some = next(iter(parts.values()))
            loader.problems.append(f"unused: {some} {stored.tensors[some]}: the base has no {name}")
            continue
        binding, index = loader.where[name]
        with loader.collecting():
            read = _reader(stored, module, parts)
            by_leaf[binding.path][index] = method.fields(factor_layout(method, binding), read, module, settings)
            bindings[binding.path] = binding
    _check_targets(method, by_module, loader, settings)
    delta: dict[str, Adapter] = {}
    for path, binding in bindings.items():
        with loader.collecting():
            layout = factor_layout(method, binding)
            arrays = _stacked(method, layout, by_leaf[path])
            delta[path] = method.build(arrays, layout, settings)
            if isinstance(method, IA3Method):
                delta |= _bias_gain(arrays, binding, loader)
    return delta


def _reader(stored: Stored, module: str, parts: Mapping[str, str]) -> Read:
    def read(part: str, shape: Sequence[int] | None) -> np.ndarray:
        if part not in parts:
            raise _Missing(f"missing: {keys.PREFIX}{module}.{part}")
        key = keys.Key(parts[part], module, part)
        return stored.read(key, stored.tensors[key.key] if shape is None else shape)

    return read


class _Missing(ValueError, KeyError):
    """A part that is not there; methods that know another form catch it as a KeyError."""

    def __str__(self) -> str:
        return str(self.args[0])


def _stacked(
    method: Method, layout: FactorLayout, layers: Mapping[tuple[int, ...], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The fields of all layers of a leaf."""
    names = {name for fields in layers.values() for name in fields}
    lead, batch = layout.leading_sizes, layout.sizes(layout.labels(BATCH))
    arrays = {}
    for name in sorted(names):
        values = {index: fields[name] for index, fields in layers.items() if name in fields}
        if len(values) < len(layers):
            raise ValueError(f"cannot be held: the layers of {layout.binding.path!r} have different parts")
        if name in method.rank_fields:
            rank = max(value.shape[0] for value in values.values())
            values = {index: pad_rank(value, rank, 0) for index, value in values.items()}
        shapes = {value.shape for value in values.values()}
        if len(shapes) > 1:
            listed = " and ".join(map(str, sorted(shapes)))
            raise ValueError(f"cannot be held: {name} of the layers of {layout.binding.path!r} has shapes {listed}")
        dtype = np.result_type(*values.values())
        (shape,) = shapes
        whole = np.broadcast_to(method.identity_like(name, shape), (*lead, *shape)).astype(dtype)
        for index, value in values.items():
            whole[layout.slices(index)] = value
        arrays[name] = whole.reshape((*batch, *shape))
    return arrays


def _bias_gain(arrays: Mapping[str, np.ndarray], binding: Binding, loader: Loader) -> dict[str, Adapter]:
    """PEFT multiplies a module's whole output, so a bias of the base gets the same gains."""
    if f"gain {OUT}" not in arrays:
        return {}
    first = next(iter(binding.tensors))
    bias = keys.split_name(loader.bare(first))[0] + ".bias"
    if bias not in loader.where:
        return {}
    leaf = loader.where[bias][0]
    gain = arrays[f"gain {OUT}"].reshape(leaf.shape)
    axes = (BATCH,) * (len(leaf.shape) - len(leaf.tensor_axes)) + (OUT,) * len(leaf.tensor_axes)
    return {leaf.path: bias_gain(gain, axes)}


def _check_targets(
    method: Method, by_module: Mapping[str, Mapping[str, str]], loader: Loader, settings: Settings
) -> None:
    """What the config announces must be there."""
    targets = Config(target_modules=settings.names("target_modules"), exclude_modules=settings.names("exclude_modules"))
    for name, (binding, _) in loader.where.items():
        module, parameter = keys.split_name(loader.in_model.get(name, name))
        saved = any(keys.inside(module, entry) for entry in loader.config.modules_to_save)
        if (
            parameter == "weight"
            and binding.roles
            and not saved
            and targets.targets(module)
            and module not in by_module
        ):
            loader.problems.append(f"missing: {keys.PREFIX}{module}.{method.parts[0]}")
