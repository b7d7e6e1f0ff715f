"""Converts LoRA files of kohya's scripts, diffusers and mlx-lm to PEFT's tensors and config.

=========  ===========================================================================================================
kohya      `lora_unet_down_blocks_0_…_to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`: a module's
           dots are underscores. The scale is alpha / rank, or 1 if there is no alpha.
diffusers  `unet.down_blocks.0.….to_q.lora_A.weight` and `.lora_B.weight`; in older files `lora.down.weight` or
           `….processor.to_q_lora.down.weight`. Alphas are tensors, or in the file's metadata; otherwise the scale is 1.
mlx-lm     `….q_proj.lora_a` [in, rank], `.lora_b` [rank, out], `.m`; for experts `….switch_mlp.up_proj.lora_a`
           [experts, rank, in] and `.lora_b` [experts, out, rank]. `adapter_config.json` states the scale itself.
=========  ===========================================================================================================
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.checks import unusable
from lora_jax.peft import keys, mlx_experts
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.config import CONFIG, Config, exact_pattern
from lora_jax.peft.tensors import Tensors

MLX = "adapters.safetensors"
"""mlx-lm's file of tensors; its `adapter_config.json` has other fields than PEFT's."""

_KOHYA = re.compile(r"lora_(?:unet|te\d*|transformer|prior\w*?)_(?P<module>.+?)\.(?P<part>[a-z_]+(?:\.weight)?)")
_DIFFUSERS = (
    re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector|alpha)"),
    re.compile(r"(?P<module>.+)\.(?:lora|lora_linear_layer)\.(?P<part>(?:down|up)\.weight)"),
    re.compile(r"(?P<module>.+)\.processor\.(?P<to>to_\w+?)_lora\.(?P<part>(?:down|up)\.weight)"),
)
_PARTS = {
    "lora_down.weight": "a",
    "down.weight": "a",
    "lora_A.weight": "a",
    "lora_a": "a",
    "lora_up.weight": "b",
    "up.weight": "b",
    "lora_B.weight": "b",
    "lora_b": "b",
    "dora_scale": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "m": "magnitude",
    "alpha": "alpha",
}
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "shared")


_Parts = dict[str, str]
"""The keys of a module's tensors, by part."""


def convert_file(
    tensors: Tensors, metadata: Mapping[str, str], base_modules: Iterable[str]
) -> tuple[Config, AdapterTensors] | None:
    """Converts a file of kohya's scripts or of diffusers to PEFT's terms; returns None if it is neither.

    Args:
      tensors: The open file.
      metadata: The file's metadata.
      base_modules: The names of the base's modules, without a prefix, if available: they resolve underscores in kohya's
        names.
    """
    modules, rest = _kohya(tensors, base_modules)
    if not modules:
        modules, rest = _diffusers(tensors, base_modules)
    if not modules:
        return None
    alphas = {name: _read_number(tensors, parts["alpha"]) for name, parts in modules.items() if "alpha" in parts}
    if not alphas:
        alphas = _read_metadata(metadata, modules)
    ranks = {name: tensors[parts["a"]][0] for name, parts in modules.items() if "a" in parts}
    return _convert(tensors, modules, ranks, alphas, rest)


def convert_mlx(
    tensors: Tensors, content: Mapping[str, Any], base_modules: Iterable[str] = ()
) -> tuple[Config, AdapterTensors]:
    """Converts an adapter of mlx-lm to PEFT's terms.

    Args:
      tensors: The open file.
      content: The content of the config.
      base_modules: The names of the base's modules, if available: they resolve the names of an expert's matrices.

    Raises:
      ValueError: Its config has no valid scale.
    """
    parameters = content.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or unusable(scale, nonzero=True):
        raise ValueError(f"{CONFIG}: lora_parameters.scale is {scale!r}; expected a finite number other than zero.")
    modules: dict[str, _Parts] = {}
    experts: dict[str, int] = {}
    rest, base = [], set(base_modules)
    for key in tensors:
        module, _, part = key.rpartition(".")
        if part not in ("lora_a", "lora_b", "m"):
            rest.append(key)
        elif len(shape := tensors[key]) == 3:
            for expert, name in enumerate(mlx_experts.split_experts(module, shape[0], base)):
                modules.setdefault(name, {})[_PARTS[part]] = key
                experts[name] = expert
        else:
            modules.setdefault(module, {})[_PARTS[part]] = key
    # A is [in, rank], of experts [experts, rank, in].
    ranks = {x: tensors[parts["a"]][1] for x, parts in modules.items() if "a" in parts}
    alphas = {name: scale * rank for name, rank in ranks.items()}
    dropout = parameters.get("dropout", 0.0) if isinstance(parameters, Mapping) else 0.0
    return _convert(tensors, modules, ranks, alphas, rest, transpose=True, experts=experts, dropout=dropout)


def _kohya(tensors: Tensors, base_modules: Iterable[str]) -> tuple[dict[str, _Parts], list[str]]:
    dotted = {name.replace(".", "_"): name for name in base_modules}
    modules: dict[str, _Parts] = {}
    rest = []
    for key in tensors:
        match = _KOHYA.fullmatch(key)
        if match and (part := _PARTS.get(match["part"])):
            flat = match["module"]
            modules.setdefault(dotted.get(flat, flat), {})[part] = key
        else:
            rest.append(key)
    return modules, rest


def _diffusers(tensors: Tensors, base_modules: Iterable[str]) -> tuple[dict[str, _Parts], list[str]]:
    base = set(base_modules)
    modules: dict[str, _Parts] = {}
    rest = []
    for key in tensors:
        match = next(filter(None, (pattern.fullmatch(key) for pattern in _DIFFUSERS)), None)
        if match is None or key.startswith(keys.PREFIX):
            rest.append(key)
            continue
        module = match["module"]
        if "to" in match.groupdict():
            module += f".{match['to']}" + (".0" if match["to"] == "to_out" else "")
        component, _, inside = module.partition(".")
        if inside and module not in base and (inside in base or component in ("unet", "transformer", "text_encoder")):
            module = inside
        modules.setdefault(module, {})[_PARTS[match["part"]]] = key
    return modules, rest


def _convert(
    tensors: Tensors,
    modules: Mapping[str, _Parts],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    rest: Iterable[str],
    *,
    transpose: bool = False,
    experts: Mapping[str, int] | None = None,
    dropout: float = 0.0,
) -> tuple[Config, AdapterTensors]:
    """Renames tensors to PEFT's keys and makes the config.

    Args:
      tensors: The open file.
      modules: The keys of each module's tensors.
      ranks: The rank of each module.
      alphas: The alpha of each module; missing ones equal the rank.
      rest: Keys of other tensors, which retain their names.
      transpose: Whether A is `[in, rank]` and B `[rank, out]`.
      experts: By module of an expert, its index in the stored tensors, whose factors are not transposed.
      dropout: The dropout rate.
    """
    experts = experts or {}
    names = {key: key for key in rest}  # the loader reports those that it does not use
    transposed, slices = [], {}
    for name, parts in modules.items():
        peft_keys = keys.factor_keys(name, embedding=name.rpartition(".")[2] in _TABLES)
        for part, key in parts.items():
            if part == "alpha":
                continue
            names[peft_keys[part]] = key
            if name in experts:
                slices[peft_keys[part]] = experts[name]
            elif transpose and part in ("a", "b"):
                transposed.append(peft_keys[part])
    alphas = {name: alphas.get(name, rank) for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values()), 1), next(iter(alphas.values()), 1)
    config = Config(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=any("magnitude" in parts for parts in modules.values()),
        rank_pattern={exact_pattern(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={exact_pattern(name): a for name, a in alphas.items() if a != alpha},
        target_modules=tuple(modules),
    )
    return config, AdapterTensors(tensors, names, transposed, slices)


def _read_number(tensors: Tensors, key: str) -> float:
    value = tensors.read(key)
    number = float(value.astype(np.float32).reshape(-1)[0]) if value.size == 1 else float("nan")
    if unusable(number, nonzero=True):
        raise ValueError(f"{tensors.file_of(key)}: {key} is {number}; expected a finite number other than zero.")
    return number


def _read_metadata(metadata: Mapping[str, str], modules: Mapping[str, _Parts]) -> dict[str, float]:
    """Reads diffusers' alphas: the file's metadata contains PEFT's config of each component as JSON."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    alphas = {}
    for name, parts in modules.items():
        key = next(iter(parts.values()))
        component = key.partition(".")[0]
        alpha = content.get(f"{component}.lora_alpha") if isinstance(content, Mapping) else None
        pattern = content.get(f"{component}.alpha_pattern") or {} if alpha is not None else {}
        alpha = next((value for end, value in pattern.items() if name == end or name.endswith(f".{end}")), alpha)
        if isinstance(alpha, int | float) and not isinstance(alpha, bool) and not unusable(alpha, nonzero=True):
            alphas[name] = float(alpha)
    return alphas
