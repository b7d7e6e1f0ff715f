"""The weights that readers compute from an adapter directory, derived from its files alone."""

import math
import re

import numpy as np

from tests.peft.cases import PREFIX


def modules_of(base_tensors, tied=()):
    """The modules that have parameters of their own."""
    return {name.rpartition(".")[0] for name in (*base_tensors, *tied)}


def _listed(key, patterns):
    if isinstance(patterns, str):
        return re.fullmatch(patterns, key) is not None
    return key in patterns or any(key.endswith(f".{pattern}") for pattern in patterns)


def targeted(config, modules):
    """The modules that PEFT would adapt."""
    result = set()
    for key in modules:
        if config.get("exclude_modules") and _listed(key, config["exclude_modules"]):
            continue
        if any(re.match(rf"(^|.*\.){m}($|\..*)", key) for m in config.get("modules_to_save") or ()):
            continue
        if not _listed(key, config.get("target_modules") or ()):
            continue
        layers = config.get("layers_to_transform")
        if layers is not None and key not in config["target_modules"]:
            patterns = config.get("layers_pattern") or [r"[^.]*"]
            patterns = [patterns] if isinstance(patterns, str) else patterns
            at = [m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", key))]
            if not at or int(at[0][1]) not in ([layers] if isinstance(layers, int) else layers):
                continue
        result.add(key)
    return result


def first(patterns, key, otherwise):
    """The value of the first pattern that matches."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", key):
            return value
    return otherwise


def rank_and_scale(config, key):
    rank = first(config.get("rank_pattern"), key, config["r"])
    alpha = first(config.get("alpha_pattern"), key, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def meaning(config, base_tensors, tied=(), inputs="embed_tokens"):
    """A config reduced to what it says of each module and tensor of a model.

    Args:
      config: adapter_config.json.
      base_tensors: Names of the model's tensors.
      tied: Names of tensors that are other tensors.
      inputs: The input embedding's module, which a plain list of token indices means.
    """
    modules = targeted(config, modules_of(base_tensors, tied))
    if config.get("ensure_weight_tying"):
        modules -= modules_of(tied)
    parameters = {
        name
        for name in base_tensors
        if any(name == target or name.endswith(f".{target}") for target in config.get("target_parameters") or ())
    }
    saved = {
        name
        for name in base_tensors
        for module in config.get("modules_to_save") or ()
        if re.match(rf"(.*\.)?{re.escape(module)}(\.|$)", name)
    }
    tokens = config.get("trainable_token_indices") or {}
    tokens = tokens if isinstance(tokens, dict) else {inputs: tokens}
    # A module's weight as a parameter is the same as the module.
    adapted = modules | {name.removesuffix(".weight") for name in parameters}
    return {
        "peft_type": config["peft_type"],
        "modules": {key: (r, round(s, 6)) for key in adapted for r, s in [rank_and_scale(config, key)]},
        "saved": saved,
        "tokens": tokens,
        "dropout": round(config.get("lora_dropout") or 0.0, 6),
        "dora": bool(config.get("use_dora")),
        "bias": config.get("bias") or "none",
        "lora_bias": bool(config.get("lora_bias")),
        "tying": bool(config.get("ensure_weight_tying")),
    }


def bare(name):
    return name.removeprefix(PREFIX)


def by_module(tensors):
    """`{module: {'A': …, 'B': …}}` of a directory in PEFT's format, as consumers in its format read it."""
    result = {}
    for name, array in tensors.items():
        match = re.fullmatch(r"(.*)\.lora_(embedding_)?([AB])(\.weight)?", bare(name))
        assert match, f"{name} is no factor"
        result.setdefault(match[1], {"embedding": bool(match[2])})[match[3]] = array.astype(np.float64)
    return result


def deltas(tensors, scale_of):
    """ΔW of each module in torch's layout, `scale_of(module, rank of its tensors)` times B·A."""
    result = {}
    for module, factors in by_module(tensors).items():
        delta = scale_of(module, factors["A"].shape[0]) * factors["B"] @ factors["A"]
        result[module] = delta.T if factors["embedding"] else delta
    return result
