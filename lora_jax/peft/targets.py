"""Readers of saved adapters: what each supports, how it computes the scale, and its files."""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.io.files import replace_directory
from lora_jax.peft import keys
from lora_jax.peft.arrays import fold_scale, pad_module
from lora_jax.peft.config import CONFIG, Config, exact_pattern
from lora_jax.peft.keys import ADAPTER
from lora_jax.peft.llama_cpp import common_alpha, complete_experts, round_alpha
from lora_jax.peft.mlx_experts import stack_experts
from lora_jax.peft.module import Module
from lora_jax.peft.tensor_files import ownership_test, write_tensors
from lora_jax.peft.torch_adapter import TorchAdapter

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `max_lora_rank`."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader of saved adapters.

    Attributes:
      reader: Its name in messages.
      refuse: Lists what it does not support.
      write: Writes the files: `write(directory, adapter, base_model, task_type)`.
    """

    reader: str
    refuse: Callable[[TorchAdapter], list[str]]
    write: Callable[[Path, TorchAdapter, str | None, str | None], None]


def _refuse_for_peft(adapter: TorchAdapter) -> list[str]:
    """PEFT has one dropout rate, and DoRA and biases on B for all modules or none."""
    modules = adapter.modules
    problems = []
    if not modules and not adapter.problems:  # otherwise the problems explain it
        problems.append("no factors: PEFT's LoRA requires them on at least one module")
    rates = sorted({module.dropout for module in modules if not module.is_parameter})
    if len(rates) > 1:
        problems.append(f"dropout of {', '.join(map(str, rates))}: PEFT has one rate for all modules")
    if len({"magnitude" in module.tensors for module in modules}) > 1:
        plain = [module.label for module in modules if "magnitude" not in module.tensors]
        problems.append(f"DoRA on some modules only: {', '.join(plain)} {'is' if len(plain) == 1 else 'are'} LoRA")
    if any("b_bias" in module.tensors for module in modules):
        unsupported = [m.label for m in modules if m.is_parameter or m.kind == "embedding" or "magnitude" in m.tensors]
        problems += [f"{label}: PEFT has no lora_bias with DoRA, parameters or embeddings" for label in unsupported]
    return problems


def _refuse_others(reader: str, kinds: Sequence[str], *, dora: bool = False) -> Callable[[TorchAdapter], list[str]]:
    """Makes a check that refuses everything except factors on modules of some kinds."""

    def refuse(adapter: TorchAdapter) -> list[str]:
        problems = []
        for module in adapter.modules:
            if module.kind not in kinds:
                problems.append(f"{module.label}: {reader} has no factors on a module of the kind {module.kind!r}")
            if "magnitude" in module.tensors and not dora:
                problems.append(f"{module.label}: {reader} has no DoRA")
            if "b_bias" in module.tensors and module.tensors["b_bias"].any():
                problems.append(f"{module.label}: {reader} has no bias on B")
        problems += [f"{name}: {reader} supports no tensors that are trained in full" for name in adapter.values]
        problems += [f"{module}: {reader} supports no trained rows" for module in adapter.rows]
        if not adapter.modules:
            problems.append(f"{reader} requires factors on at least one module")
        return problems

    return refuse


def _refuse_for_vllm(adapter: TorchAdapter) -> list[str]:
    kinds = ("linear", "conv1d", "embedding", "experts", "transposed_experts")
    problems = _refuse_others("vLLM", kinds)(adapter)
    parameters = collections.defaultdict(set)
    for module in adapter.modules:
        if module.kind.endswith("experts"):
            parameters[module.path].add(module.parameter)
    problems += [
        f"{module}: vLLM supports factors of gate_up_proj and down_proj together, not {', '.join(sorted(names))} alone"
        for module, names in parameters.items()
        if names != {"gate_up_proj", "down_proj"}
    ]
    largest = max((module.rank for module in adapter.modules), default=0)
    if largest > MAX_LORA_RANKS[-1]:
        problems.append(f"rank {largest}: vLLM supports {MAX_LORA_RANKS[-1]} at most")
    return problems


def refuse_for_gguf(adapter: TorchAdapter, kinds: Sequence[str] = ("linear", "conv1d", "embedding")) -> list[str]:
    """llama.cpp looks up the factors of a tied head under the embedding's name, and transposes them."""
    problems = _refuse_others("llama.cpp", kinds)(adapter)
    tied = [module.label for module in adapter.modules if module.tied]
    return problems + [
        f"{label}: llama.cpp supports no factors of a head that is the embedding (tied)" for label in tied
    ]


def _refuse_for_mlx(adapter: TorchAdapter) -> list[str]:
    problems = _refuse_others("mlx-lm", ("linear", "conv1d", "embedding"), dora=True)(adapter)
    if any(module.kind == "experts" for module in adapter.modules):
        problems.append(
            "mlx-lm stores each expert's matrices separately; pass base= (--base) to split the fused parameter"
        )
    for name, module, a, _ in stack_experts(adapter.modules):
        if a.ndim == 3 and "magnitude" in module.tensors:
            problems.append(f"{name}: mlx-lm has no DoRA on experts")
    return problems + _refuse_for_peft(adapter)


def _write_peft(directory: Path, adapter: TorchAdapter, base_model: str | None, task_type: str | None) -> None:
    ranks = {m.label: m.rank for m in adapter.modules}
    config = Config(**_common_fields(adapter, base_model, task_type), **_scales(adapter.modules, ranks))
    _write(directory, adapter, config)


def _write_vllm(directory: Path, adapter: TorchAdapter, base_model: str | None, task_type: str | None) -> None:
    """vLLM has one scale for all modules: the config's alpha over the config's r."""
    modules = _equalize_scales(adapter.modules)
    rank = max(module.rank for module in modules)
    adapter = dataclasses.replace(adapter, modules=[pad_module(module, rank) for module in modules])
    alpha = round_alpha(adapter.modules[0].scale * rank, rank)
    _write(directory, adapter, Config(**_common_fields(adapter, base_model, task_type), r=rank, lora_alpha=alpha))
    least = min(n for n in MAX_LORA_RANKS if n >= rank)
    print(f"vLLM needs max_lora_rank of at least {least} for this adapter of rank {rank}.")


def _write_gguf(directory: Path, adapter: TorchAdapter, base_model: str | None, task_type: str | None) -> None:
    """llama.cpp's converter ignores patterns, rsLoRA, and the orientation of GPT-2's weights."""
    alpha, modules = common_alpha(complete_experts(adapter.modules, adapter.tensors))
    adapter = dataclasses.replace(adapter, modules=modules)
    ranks = collections.Counter(module.rank for module in modules)
    rank = ranks.most_common(1)[0][0]
    pattern = {exact_pattern(m.label): m.rank for m in modules if m.rank != rank}
    fields = _common_fields(adapter, base_model, task_type)
    _write(directory, adapter, Config(**fields, r=rank, lora_alpha=alpha, rank_pattern=pattern))
    if any(module.kind == "conv1d" for module in modules):
        print(
            "llama.cpp's converter exchanges A and B of GPT-2's modules, and llama.cpp does not load its file; "
            "lora-jax convert --target gguf-file writes one that it loads."
        )


def _write_mlx(directory: Path, adapter: TorchAdapter, base_model: str | None, task_type: str | None) -> None:
    """mlx-lm has transposed factors, one scale and one rank; an embedding's factors apply to a tied head, too."""
    del task_type  # not in mlx-lm's config
    modules = _equalize_scales([module for module in adapter.modules if not module.tied])
    rank = max(module.rank for module in modules)
    tensors = {}
    stacked = stack_experts(pad_module(module, rank) for module in modules)
    for name, module, a, b in stacked:
        tensors[f"{name}.lora_a"] = a
        tensors[f"{name}.lora_b"] = b
        if "magnitude" in module.tensors:
            tensors[f"{name}.m"] = module.tensors["magnitude"]
    layers = [(re.match(r"(.*\.\d+)\.(.+)", name), name) for name, *_ in stacked]
    config = {
        "fine_tune_type": "dora" if "magnitude" in modules[0].tensors else "lora",
        "num_layers": -1,  # all layers; a positive number selects the last ones
        "lora_parameters": {
            "rank": rank,
            "scale": float(modules[0].scale),
            "dropout": modules[0].dropout,
            "keys": sorted({match[2] if match else name for match, name in layers}),
        },
    }
    if base_model is not None:
        config["model"] = base_model
    with replace_directory(
        directory, CONFIG, what="adapter directory", owns=ownership_test({CONFIG}), keep=True
    ) as fresh:
        write_tensors(fresh / "adapters.safetensors", tensors)
        _write_json(fresh / CONFIG, config)


TARGETS = {
    "peft": Target("PEFT", _refuse_for_peft, _write_peft),
    "vllm": Target("vLLM", _refuse_for_vllm, _write_vllm),
    "gguf": Target("llama.cpp (gguf)", refuse_for_gguf, _write_gguf),
    "mlx": Target("mlx-lm", _refuse_for_mlx, _write_mlx),
}


def _equalize_scales(modules: Sequence[Module[np.ndarray]]) -> list[Module[np.ndarray]]:
    """Returns modules with a common scale: if theirs differ, 1, with their scales folded into B."""
    if all(np.float32(module.scale) == np.float32(modules[0].scale) for module in modules):
        return list(modules)
    return [fold_scale(module, module.scale) for module in modules]


def _scales(modules: Sequence[Module[np.ndarray]], ranks: dict[str, int]) -> dict[str, Any]:
    """The fields r, alpha and their patterns, for the rank and scale of each module."""
    if not modules:
        return {}
    plain = {m.label: round_alpha(m.scale * m.rank, m.rank) for m in modules}
    rooted = {m.label: round_alpha(m.scale * math.sqrt(m.rank), math.sqrt(m.rank)) for m in modules}
    # rsLoRA if only that makes every alpha an integer, as users choose them.
    use_rslora = all(map(_is_integer, rooted.values())) and not all(map(_is_integer, plain.values()))
    alphas = rooted if use_rslora else plain
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {exact_pattern(label): r for label, r in ranks.items() if r != rank},
        "alpha_pattern": {exact_pattern(label): a for label, a in alphas.items() if a != alpha},
    }


def _is_integer(value: float) -> bool:
    return float(value).is_integer()


def _common_fields(adapter: TorchAdapter, base_model: str | None, task_type: str | None) -> dict[str, Any]:
    """The config's fields that do not depend on ranks and scales."""
    modules = adapter.modules
    attention = {m.path for m in modules if m.name.endswith(".in_proj_weight")}
    # PEFT adapts the output of an attention module without a target.
    targets = {m.path for m in modules if not m.is_parameter and m.path.rpartition(".")[0] not in attention}
    return {
        # PEFT matches a listed name with every module whose path ends in it, a pattern with the full path.
        "target_modules": "|".join(map(re.escape, sorted(targets))) if adapter.ambiguous else sorted(targets),
        "target_parameters": [m.name for m in modules if m.is_parameter],
        # PEFT refuses dropout if there are target_parameters
        "lora_dropout": 0.0 if any(m.is_parameter for m in modules) else max((m.dropout for m in modules), default=0.0),
        "use_dora": any("magnitude" in m.tensors for m in modules),
        "lora_bias": any("b_bias" in m.tensors for m in modules),
        "fan_in_fan_out": bool(modules) and any(m.kind == "conv1d" for m in modules),
        "ensure_weight_tying": any(m.tied for m in modules),
        "bias": adapter.bias,
        "modules_to_save": sorted(adapter.saved),
        "trainable_token_indices": {module: ids for module, (ids, _) in adapter.rows.items()},
        "base_model_name_or_path": base_model,
        "task_type": task_type,
    }


def _write(directory: Path, adapter: TorchAdapter, config: Config) -> None:
    write_files(directory, dict(_tensors(adapter)), config.to_json())


def write_files(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Writes the two files of a PEFT adapter; an existing adapter is replaced when they are complete."""
    with replace_directory(
        directory, CONFIG, what="adapter directory", owns=ownership_test({CONFIG}), keep=True
    ) as fresh:
        write_tensors(fresh / ADAPTER, tensors)
        _write_json(fresh / CONFIG, config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(adapter: TorchAdapter) -> Iterable[tuple[str, np.ndarray]]:
    """Yields the tensors with their keys."""
    by_path = collections.defaultdict(list)
    for module in adapter.modules:
        by_path[module.path].append(module)
    wrapped = {m.path for m in adapter.modules if m.is_parameter or m.parameter == "in_proj_weight"}
    for path, modules in by_path.items():
        inside = keys.wrap_path(path, wrapped)
        for number, module in enumerate(modules):
            depth = len(modules) - 1 - number
            module_keys = keys.factor_keys(inside, embedding=module.kind == "embedding", depth=depth)
            for part, tensor in module.tensors.items():
                if part == "magnitude":
                    ones = (1,) * (module.tensors["a"].ndim - 2)
                    tensor = tensor.reshape((1, -1, *ones) if ones else (-1,))
                yield module_keys[part], tensor
    for name, value in adapter.values.items():
        path, parameter = keys.split_name(name)
        yield keys.value_key(path, parameter, wrapped=path in by_path), value
    for path, (_, rows) in adapter.rows.items():
        yield keys.rows_key(path), rows
