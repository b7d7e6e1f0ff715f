"""Deltas in the form of PEFT's other methods."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import paths
from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.ia3 import IA3Adapter
from lora_jax.adapters.protocol import BATCH, OUT, Adapter
from lora_jax.adapters.terms import is_low_rank
from lora_jax.io.read_errors import list_problems
from lora_jax.peft import keys
from lora_jax.peft.config import TOKENS, exactly
from lora_jax.peft.exported import Exported, ends_alike, export, multiplied
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.ia3 import IA3Method, is_bias_gain
from lora_jax.peft.methods.method import Method, factor_layout
from lora_jax.peft.methods.table import METHODS
from lora_jax.peft.methods.vera import VeRAMethod, shared_pair
from lora_jax.peft.modules_to_save import complete
from lora_jax.peft.names import Names
from lora_jax.peft.targets import write_files


@dataclasses.dataclass
class _Plan:
    """What a method's files hold.

    Attributes:
      method: Of PEFT.
      tensors: By key.
      nodes: The adapters, by module.
      scales: What the modules' terms are multiplied by.
      gains: Of (IA)³'s biases, by module.
    """

    method: Method
    tensors: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    nodes: dict[str, Any] = dataclasses.field(default_factory=dict)
    scales: dict[str, float] = dataclasses.field(default_factory=dict)
    gains: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def method_of(delta: Mapping[str, Adapter], names: Names) -> str | None:
    """The `peft_type` of a delta whose adapters are all of one method of PEFT other than LoRA, or trained outright.

    None where PEFT's LoRA is the form: of LoRA itself, and of low-rank adapters that their own method cannot hold (a
    VeRA whose pairs are no corners of one pair).
    """
    others = [node for node in delta.values() if not isinstance(node, FullAdapter)]
    if not others:
        return "LN_TUNING" if _are_norms(delta, names) else None
    if all(isinstance(node, RowsAdapter) for node in delta.values()):
        ids = {tuple(np.asarray(node.ids).tolist()) for node in delta.values() if isinstance(node, RowsAdapter)}
        return TOKENS if len(ids) == 1 else None
    for kind, method in METHODS.items():
        if all(isinstance(node, method.adapters) for node in others):
            fits = not method().check({path: node for path, node in delta.items() if not isinstance(node, FullAdapter)})
            if issubclass(method, VeRAMethod):
                fits = fits and shared_pair(_fits(delta, names, method)) is not None
            return kind if fits or not all(map(is_low_rank, others)) else None
    return None


def save_method(
    directory: Path,
    kind: str,
    delta: Mapping[str, Adapter],
    names: Names,
    *,
    base: Any,
    base_model: str | None,
    task_type: str | None,
) -> None:
    """Writes a delta in the form of one of PEFT's methods, as :func:`method_of` names it.

    Raises:
      ValueError: PEFT's method cannot hold all of it; what it cannot is named, and nothing is written.
    """
    shared = {"base_model_name_or_path": base_model, "task_type": task_type, "inference_mode": True}
    if kind in METHODS:
        plan, problems = _planned(METHODS[kind](), delta, names, base)
        rest = {path: node for path, node in delta.items() if isinstance(node, FullAdapter)}
        exported = _exported(rest, names, base, task_type)
        settings: dict[str, Any] = {}
        problems += exported.problems
        try:
            settings = plan.method.config(plan.nodes, plan.scales)
        except ValueError as error:
            problems.append(str(error))
        content = {**_targets(list(plan.nodes), names), **settings, "modules_to_save": sorted(exported.saved) or None}
        tensors = plan.tensors | _values(exported)
    elif kind == TOKENS:
        exported = export(delta, names)
        problems = exported.problems
        rows = exported.rows | {
            keys.split_name(other)[0]: exported.rows[keys.split_name(name)[0]]
            for path, node in delta.items()
            if (binding := names.get(path, node.shape())) is not None
            for other, name in binding.tied.items()
            if keys.split_name(name)[0] in exported.rows
        }
        tensors = {f"{keys.PREFIX}{name}.trainable_tokens_delta": values for name, (_, values) in rows.items()}
        ids = next(iter(exported.rows.values()))[0] if exported.rows else []
        content = {"target_modules": sorted(exported.rows), "token_indices": ids}
    else:
        exported = _exported(delta, names, base, task_type)
        problems = exported.problems
        tensors = {
            f"{keys.PREFIX}{module}.ln_tuning_layers.{parameter}": value
            for (module, parameter), value in ((keys.split_name(n), v) for n, v in exported.values.items())
        }
        content = _targets(sorted(exported.saved), names)
    if problems:
        raise ValueError(f"The delta cannot be written for PEFT's {kind} {list_problems(problems)}")
    write_files(directory, tensors, {**shared, **content, "peft_type": kind})


def _exported(delta: Mapping[str, Adapter], names: Names, base: Any, task_type: str | None) -> Exported:
    exported = export(delta, names)
    complete(exported, names, base, task_type, ())
    return exported


def _values(exported: Exported) -> dict[str, np.ndarray]:
    return {keys.value_key(*keys.split_name(name), wrapped=False): value for name, value in exported.values.items()}


def _targets(modules: list[str], names: Names) -> dict[str, Any]:
    """PEFT takes a listed name for every module whose path ends so; a pattern is matched with the whole path."""
    if ends_alike(names, modules):
        return {"target_modules": "|".join(exactly(module).removeprefix("^") for module in sorted(modules))}
    return {"target_modules": sorted(modules)}


def _are_norms(delta: Mapping[str, Adapter], names: Names) -> bool:
    """Whether all that is trained are scales and biases of norms: vectors whose module has no matrix."""
    for path, node in delta.items():
        binding = names.get(path, node.shape())
        if binding is None or binding.roles is not None or len(binding.tensor_axes) != 1:
            return False
        modules = {keys.split_name(name)[0] for name in binding.tensors}
        others = [row for row in names.weights if row.module or (row.layout and "->" in row.layout)]
        if any(row.declares(f"{module}.weight") for row in others for module in modules):
            return False
    return True


def _fits(delta: Mapping[str, Adapter], names: Names, method: type[Method]) -> list[tuple[Any, FactorLayout]]:
    nodes = [(path, node) for path, node in delta.items() if isinstance(node, method.adapters)]
    return [(node, FactorLayout(names.find(path, node.shape()))) for path, node in nodes]


def _planned(method: Method, delta: Mapping[str, Adapter], names: Names, base: Any) -> tuple[_Plan, list[str]]:
    """A method's tensors, and what cannot be put in its form."""
    plan, problems = _Plan(method), []
    for path, node in delta.items():
        if isinstance(node, FullAdapter):
            continue
        try:
            binding = names.find(path, node.shape())
            if isinstance(node, IA3Adapter) and is_bias_gain(node):
                values = binding.split(np.asarray(node.gain).reshape(binding.shape))
                plan.gains |= {keys.split_name(binding.in_model[name])[0]: gain for name, gain in values.items()}
                continue
            _add(plan, path, node, factor_layout(method, binding))
        except ValueError as error:
            problems.append(str(error))
    problems += method.check(plan.nodes)
    for module, (part, factor) in method.rescale(plan.nodes, plan.scales).items():
        key = f"{keys.PREFIX}{module}.{part}"
        plan.tensors[key] = multiplied(plan.tensors[key], factor)
    if isinstance(method, IA3Method):
        problems += _check_gains(plan, names, base)
    if isinstance(method, VeRAMethod):
        pair = shared_pair(_fits(delta, names, VeRAMethod))
        if pair is None:
            problems.append("the random pairs of its adapters are no corners of one pair, which PEFT's VeRA has")
        else:
            plan.tensors |= pair
    return plan, problems


def _add(plan: _Plan, path: str, node: Any, layout: FactorLayout) -> None:
    method, binding = plan.method, layout.binding
    if node.axes != layout.axes:
        raise ValueError(f"{path!r}: the adapter's axes are {node.axes}, those of its PyTorch module {layout.axes}")
    arrays, lead = method.arrays(node), layout.leading_sizes
    batch = layout.axes.count(BATCH)
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, index in binding.tensors.items():
        module = keys.split_name(binding.in_model[name])[0]
        layers[module] = {
            field: array.reshape((*lead, *array.shape[batch:]))[layout.slices(index)] if array.ndim >= batch else array
            for field, array in arrays.items()
        }
    used = [module for module, fields in layers.items() if not _is_neutral(method, fields)] or list(layers)
    for module in used:
        plan.nodes[module] = node
        plan.scales[module] = float(layers[module].get("scale", 1.0))
        parts = method.tensors(layers[module], layout)
        plan.tensors |= {f"{keys.PREFIX}{module}.{part}": np.ascontiguousarray(array) for part, array in parts.items()}


def _is_neutral(method: Method, fields: Mapping[str, np.ndarray]) -> bool:
    """Whether a layer of a stacked leaf has no adapter."""
    return all(
        np.array_equal(value, method.identity_like(name, value.shape))
        for name, value in fields.items()
        if name != "scale"
    )


def _check_gains(plan: _Plan, names: Names, base: Any) -> list[str]:
    """PEFT multiplies a module's whole output, its bias by the same gains."""
    problems = []
    leaves = {} if base is None else paths.flatten(base).as_dict()
    biases = {
        keys.split_name(new)[0]: path
        for path, leaf in leaves.items()
        if (binding := names.get(path, leaf.shape)) is not None
        for new in binding.in_model.values()
        if keys.split_name(new)[1] == "bias"
    }
    for module, node in plan.nodes.items():
        gain = plan.tensors[f"{keys.PREFIX}{module}.ia3_l"].reshape(-1)
        if node.on != OUT:
            continue
        if module in plan.gains:
            if not np.array_equal(plan.gains.pop(module), gain):
                problems.append(f"{module}.bias: PEFT multiplies the bias by the gains of the weight; these are others")
        elif module in biases:
            problems.append(
                f"{module}.bias: PEFT multiplies the bias too; adapt {biases[module]!r} with IA3(axes=('out',))"
            )
        elif base is None and any(row.declares(f"{module}.bias") for row in names.weights):
            problems.append(f"{module}.bias: PEFT multiplies it too, where there is one: give base=")
    problems += [f"{module}.bias: its gains are no module's" for module in plan.gains]
    return problems
