"""Who reads an exported adapter: what each can hold, how it computes the scale, and its files."""

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
from lora_jax.peft import experts, keys
from lora_jax.peft.config import CONFIG, Config, exactly
from lora_jax.peft.exported import Exported, Module
from lora_jax.peft.keys import ADAPTER
from lora_jax.peft.tensors import write, written_here

MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
      reader: Its name in messages.
      refuses: Names what it cannot hold.
      write: Writes the files: `write(directory, exported, base_model, task_type)`.
    """

    reader: str
    refuses: Callable[[Exported], list[str]]
    write: Callable[[Path, Exported, str | None, str | None], None]


def _refuses_for_peft(exported: Exported) -> list[str]:
    """PEFT has one dropout, and DoRA and biases on B for all modules or none."""
    modules = exported.modules
    problems = []
    if not modules and not exported.problems:  # whose factors nobody could write
        problems.append("no factors: PEFT's LoRA needs them on some module, whatever else is trained")
    rates = sorted({module.dropout for module in modules if not module.parameter})
    if len(rates) > 1:
        problems.append(f"dropout of {', '.join(map(str, rates))}: PEFT has one rate for all modules")
    if len({module.magnitude is None for module in modules}) > 1:
        plain = [module.label for module in modules if module.magnitude is None]
        problems.append(f"DoRA on some modules only: {', '.join(plain)} {'is' if len(plain) == 1 else 'are'} LoRA")
    if any(module.offset is not None for module in modules):
        without = [m.label for m in modules if m.parameter or m.kind == "embedding" or m.magnitude is not None]
        problems += [f"{label}: PEFT has no lora_bias beside DoRA, parameters or embeddings" for label in without]
    return problems


def _refuses_but(reader: str, kinds: Sequence[str], *, dora: bool = False) -> Callable[[Exported], list[str]]:
    """Refuses all but factors on modules of some kinds."""

    def refuses(exported: Exported) -> list[str]:
        problems = []
        for module in exported.modules:
            if module.kind not in kinds:
                problems.append(f"{module.label}: {reader} has no factors on a module of the kind {module.kind!r}")
            if module.magnitude is not None and not dora:
                problems.append(f"{module.label}: {reader} has no DoRA")
            if module.offset is not None and module.offset.any():
                problems.append(f"{module.label}: {reader} has no bias on B")
        problems += [f"{name}: {reader} takes no tensors that are trained outright" for name in exported.values]
        problems += [f"{module}: {reader} takes no trained rows" for module in exported.rows]
        if not exported.modules:
            problems.append(f"{reader} needs factors on some module")
        return problems

    return refuses


def _refuses_for_vllm(exported: Exported) -> list[str]:
    kinds = ("linear", "conv1d", "embedding", "experts", "transposed_experts")
    problems = _refuses_but("vLLM", kinds)(exported)
    parameters = collections.defaultdict(set)
    for module in exported.modules:
        if module.kind.endswith("experts"):
            parameters[module.module].add(module.parameter)
    problems += [
        f"{module}: vLLM takes factors of gate_up_proj and down_proj together, not of {', '.join(sorted(names))} alone"
        for module, names in parameters.items()
        if names != {"gate_up_proj", "down_proj"}
    ]
    largest = max((module.rank for module in exported.modules), default=0)
    if largest > MAX_LORA_RANKS[-1]:
        problems.append(f"rank {largest}: vLLM takes {MAX_LORA_RANKS[-1]} at most")
    return problems


def _refuses_for_gguf(exported: Exported) -> list[str]:
    """llama.cpp looks the factors of a tied head up under the embedding's name, and has them the other way round."""
    problems = _refuses_but("llama.cpp", ("linear", "conv1d", "embedding"))(exported)
    tied = [module.label for module in exported.modules if module.tied]
    return problems + [f"{label}: llama.cpp takes no factors of a head that is the embedding (tied)" for label in tied]


def _refuses_for_mlx(exported: Exported) -> list[str]:
    problems = _refuses_but("mlx-lm", ("linear", "conv1d", "embedding"), dora=True)(exported)
    if any(module.kind == "experts" for module in exported.modules):
        problems.append("mlx-lm has each expert's matrices apart; base= (--base) tells them from the fused parameter")
    for name, module, a, _ in experts.switched(exported.modules):
        if a.ndim == 3 and module.magnitude is not None:
            problems.append(f"{name}: mlx-lm has no DoRA on experts")
    return problems + _refuses_for_peft(exported)


def _write_peft(directory: Path, exported: Exported, base_model: str | None, task_type: str | None) -> None:
    ranks = {m.label: m.rank for m in exported.modules}
    config = Config(**_shared(exported, base_model, task_type), **_scales(exported.modules, ranks))
    _write(directory, exported, config)


def _write_vllm(directory: Path, exported: Exported, base_model: str | None, task_type: str | None) -> None:
    """One scale for all modules, the config's alpha by the config's r."""
    modules = _one_scale(exported.modules)
    rank = max(module.rank for module in modules)
    exported = dataclasses.replace(exported, modules=[module.pad_rank(rank) for module in modules])
    alpha = _rounded(exported.modules[0].scale * rank, rank)
    _write(directory, exported, Config(**_shared(exported, base_model, task_type), r=rank, lora_alpha=alpha))
    least = min(n for n in MAX_LORA_RANKS if n >= rank)
    print(f"vLLM needs max_lora_rank of at least {least} for this adapter of rank {rank}.")


def _write_gguf(directory: Path, exported: Exported, base_model: str | None, task_type: str | None) -> None:
    """One alpha for all modules, by the rank of each module's own B."""
    alphas = [_rounded(module.scale * module.rank, module.rank) for module in exported.modules]
    alpha = alphas[0]
    modules = exported.modules
    if any(other != alpha for other in alphas):
        alpha = collections.Counter(alphas).most_common(1)[0][0]
        modules = [m if a == alpha else m.folded(m.scale * m.rank / alpha) for m, a in zip(modules, alphas)]
    exported = dataclasses.replace(exported, modules=modules)
    ranks = collections.Counter(module.rank for module in modules)
    rank = ranks.most_common(1)[0][0]
    pattern = {exactly(m.label): m.rank for m in modules if m.rank != rank}
    shared = _shared(exported, base_model, task_type)
    _write(directory, exported, Config(**shared, r=rank, lora_alpha=alpha, rank_pattern=pattern))


def _write_mlx(directory: Path, exported: Exported, base_model: str | None, task_type: str | None) -> None:
    """Files of its own: factors the other way round, one raw scale and one rank; an embedding's serve a tied head."""
    del task_type  # it has none
    modules = _one_scale([module for module in exported.modules if not module.tied])
    rank = max(module.rank for module in modules)
    tensors = {}
    switched = experts.switched(module.pad_rank(rank) for module in modules)
    for name, module, a, b in switched:
        tensors[f"{name}.lora_a"] = a
        tensors[f"{name}.lora_b"] = b
        if module.magnitude is not None:
            tensors[f"{name}.m"] = module.magnitude
    layers = [(re.match(r"(.*\.\d+)\.(.+)", name), name) for name, *_ in switched]
    config = {
        "fine_tune_type": "dora" if modules[0].magnitude is not None else "lora",
        "num_layers": -1,  # all; a number would mean the last ones
        "lora_parameters": {
            "rank": rank,
            "scale": float(modules[0].scale),
            "dropout": modules[0].dropout,
            "keys": sorted({found[2] if found else name for found, name in layers}),
        },
    }
    if base_model is not None:
        config["model"] = base_model
    with replace_directory(
        directory, CONFIG, what="adapter directory", owns=written_here({CONFIG}), keep=True
    ) as fresh:
        write(fresh / "adapters.safetensors", tensors)
        _write_json(fresh / CONFIG, config)


TARGETS = {
    "peft": Target("PEFT", _refuses_for_peft, _write_peft),
    "vllm": Target("vLLM", _refuses_for_vllm, _write_vllm),
    "gguf": Target("llama.cpp (gguf)", _refuses_for_gguf, _write_gguf),
    "mlx": Target("mlx-lm", _refuses_for_mlx, _write_mlx),
}


def _one_scale(modules: Sequence[Module]) -> list[Module]:
    """Modules with one scale: their own where it is the same, otherwise 1, with theirs folded into B."""
    if all(np.float32(module.scale) == np.float32(modules[0].scale) for module in modules):
        return list(modules)
    return [module.folded(module.scale) for module in modules]


def _scales(modules: Sequence[Module], ranks: dict[str, int]) -> dict[str, Any]:
    """r, alpha and their patterns that give each module its rank and scale."""
    if not modules:
        return {}
    plain = {m.label: _rounded(m.scale * m.rank, m.rank) for m in modules}
    rooted = {m.label: _rounded(m.scale * math.sqrt(m.rank), math.sqrt(m.rank)) for m in modules}
    # rsLoRA where that alone makes every alpha a whole number, as people choose them
    use_rslora = all(map(_whole, rooted.values())) and not all(map(_whole, plain.values()))
    alphas = rooted if use_rslora else plain
    rank, alpha = (collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": {exactly(label): r for label, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(label): a for label, a in alphas.items() if a != alpha},
    }


def _rounded(alpha: float, divisor: float) -> float:
    """The shortest number that gives the same float32 scale."""
    for digits in range(1, 10):
        short = float(f"{alpha:.{digits}g}")
        if np.float32(short / divisor) == np.float32(alpha / divisor):
            return int(short) if short.is_integer() else short
    return alpha


def _whole(value: float) -> bool:
    return float(value).is_integer()


def _shared(exported: Exported, base_model: str | None, task_type: str | None) -> dict[str, Any]:
    """The fields of the config that do not depend on ranks and scales."""
    modules = exported.modules
    attention = {m.module for m in modules if m.name.endswith(".in_proj_weight")}
    # PEFT reaches the output of an attention module by itself.
    targets = {m.module for m in modules if not m.parameter and m.module.rpartition(".")[0] not in attention}
    return {
        # PEFT takes a listed name for every module whose path ends so; a pattern is matched with the whole path.
        "target_modules": "|".join(map(re.escape, sorted(targets))) if exported.ends_alike else sorted(targets),
        "target_parameters": [m.name for m in modules if m.parameter],
        # PEFT refuses dropout beside parameters, where there is none
        "lora_dropout": 0.0 if any(m.parameter for m in modules) else max((m.dropout for m in modules), default=0.0),
        "use_dora": any(m.magnitude is not None for m in modules),
        "lora_bias": any(m.offset is not None for m in modules),
        "fan_in_fan_out": bool(modules) and any(m.kind == "conv1d" for m in modules),
        "ensure_weight_tying": any(m.tied for m in modules),
        "bias": exported.bias,
        "modules_to_save": sorted(exported.saved),
        "trainable_token_indices": {module: ids for module, (ids, _) in exported.rows.items()},
        "base_model_name_or_path": base_model,
        "task_type": task_type,
    }


def _write(directory: Path, exported: Exported, config: Config) -> None:
    write_files(directory, dict(_tensors(exported)), config.to_json())


def write_files(directory: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    """Writes the two files of an adapter of PEFT; an adapter that is there is replaced when they are complete."""
    with replace_directory(
        directory, CONFIG, what="adapter directory", owns=written_here({CONFIG}), keep=True
    ) as fresh:
        write(fresh / ADAPTER, tensors)
        _write_json(fresh / CONFIG, config)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(exported: Exported) -> Iterable[tuple[str, np.ndarray]]:
    """The tensors with their keys."""
    by_module = collections.defaultdict(list)
    for module in exported.modules:
        by_module[module.module].append(module)
    wrapped = {m.module for m in exported.modules if m.parameter or m.name.endswith(".in_proj_weight")}
    for name, own in by_module.items():
        inside = keys.under_wrappers(name, wrapped)
        for number, module in enumerate(own):
            known = keys.factor_keys(inside, embedding=module.kind == "embedding", depth=len(own) - 1 - number)
            yield known["a"], module.a
            yield known["b"], module.b
            if module.offset is not None:
                yield known["b_bias"], module.offset
            if module.magnitude is not None:
                ones = (1,) * (module.a.ndim - 2)
                yield known["magnitude"], module.magnitude.reshape((1, -1, *ones) if ones else (-1,))
    for name, value in exported.values.items():
        module, parameter = keys.split_name(name)
        yield keys.value_key(module, parameter, wrapped=module in by_module), value
    for name, (_, rows) in exported.rows.items():
        yield keys.rows_key(name), rows
