"""LoRA files of kohya's scripts, diffusers and mlx-lm, as PEFT's tensors and config.

=========  ===========================================================================================================
kohya      `lora_unet_down_blocks_0_…_to_q.lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`: a module's
           dots are underscores. The scale is alpha / rank, 1 without alpha.
diffusers  `unet.down_blocks.0.….to_q.lora_A.weight` and `.lora_B.weight`; in older files `lora.down.weight` or
           `….processor.to_q_lora.down.weight`. Alphas are tensors, or in the file's metadata; 1 is the scale without.
mlx-lm     `….q_proj.lora_a` [in, rank], `.lora_b` [rank, out], `.m`; of experts `….switch_mlp.up_proj.lora_a`
           [experts, rank, in] and `.lora_b` [experts, out, rank]. `adapter_config.json` states the scale itself.
=========  ===========================================================================================================
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.checks import unusable
from lora_jax.peft import experts, keys
from lora_jax.peft.config import CONFIG, Config, exactly
from lora_jax.peft.tensors import Tensors
from lora_jax.peft.view import View

MLX = "adapters.safetensors"
"""The file of mlx-lm, beside an `adapter_config.json` of its own."""

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


@dataclasses.dataclass
class _Module:
    """The keys of one module's tensors, by part; `expert` is its index in tensors of all experts."""

    parts: dict[str, str] = dataclasses.field(default_factory=dict)
    expert: int | None = None


def of_file(tensors: Tensors, metadata: Mapping[str, str], base_modules: Iterable[str]) -> tuple[Config, View] | None:
    """A file of kohya's scripts or of diffusers in PEFT's terms; None where it is neither.

    Args:
      tensors: The open file.
      metadata: Of the file.
      base_modules: The names of the base's modules, without a prefix, as far as they are known: they tell where the
        underscores of kohya's names are dots.
    """
    modules, rest = _kohya(tensors, base_modules)
    if not modules:
        modules, rest = _diffusers(tensors, base_modules)
    if not modules:
        return None
    stated = {name: module.parts["alpha"] for name, module in modules.items() if "alpha" in module.parts}
    alphas = {name: _number(tensors, key) for name, key in stated.items()}
    if not alphas:
        alphas = _from_metadata(metadata, modules, tensors)
    return _in_peft(tensors, modules, alphas, rest)


def of_mlx(tensors: Tensors, content: Mapping[str, Any], base_modules: Iterable[str] = ()) -> tuple[Config, View]:
    """An adapter of mlx-lm in PEFT's terms.

    Args:
      tensors: The open file.
      content: Of the config.
      base_modules: The names of the base's modules, as far as they are known: they tell what an expert's matrices are
        called.

    Raises:
      ValueError: Its config states no scale.
    """
    parameters = content.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or unusable(scale, nonzero=True):
        raise ValueError(f"{CONFIG}: lora_parameters.scale is {scale!r}; expected a finite number other than zero.")
    modules: dict[str, _Module] = {}
    rest, base = [], set(base_modules)
    for key in tensors:
        module, _, part = key.rpartition(".")
        if part in ("lora_a", "lora_b", "m") and len(shape := tensors[key]) == 3:
            for expert, name in enumerate(experts.separate(module, shape[0], base)):
                modules.setdefault(name, _Module(expert=expert)).parts[_PARTS[part]] = key
        elif part in ("lora_a", "lora_b", "m"):
            modules.setdefault(module, _Module()).parts[_PARTS[part]] = key
        else:
            rest.append(key)
    alphas = {name: scale * _rank(x, tensors, True) for name, x in modules.items() if "a" in x.parts}
    dropout = parameters.get("dropout", 0.0) if isinstance(parameters, Mapping) else 0.0
    return _in_peft(tensors, modules, alphas, rest, transposed=True, dropout=dropout)


def _kohya(tensors: Tensors, base_modules: Iterable[str]) -> tuple[dict[str, _Module], list[str]]:
    dotted = {name.replace(".", "_"): name for name in base_modules}
    modules: dict[str, _Module] = {}
    rest = []
    for key in tensors:
        match = _KOHYA.fullmatch(key)
        if match and (part := _PARTS.get(match["part"])):
            flat = match["module"]
            modules.setdefault(dotted.get(flat, flat), _Module()).parts[part] = key
        else:
            rest.append(key)
    return modules, rest


def _diffusers(tensors: Tensors, base_modules: Iterable[str]) -> tuple[dict[str, _Module], list[str]]:
    base = set(base_modules)
    modules: dict[str, _Module] = {}
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
        modules.setdefault(module, _Module()).parts[_PARTS[match["part"]]] = key
    return modules, rest


def _in_peft(
    tensors: Tensors,
    modules: Mapping[str, _Module],
    alphas: Mapping[str, float],
    rest: Iterable[str],
    *,
    transposed: bool = False,
    dropout: float = 0.0,
) -> tuple[Config, View]:
    names = {key: key for key in rest}  # the loader names what it has no use for
    turned, slices = [], {}
    ranks, of_modules = {}, {}
    for name, module in modules.items():
        shown = keys.factor_keys(name, embedding=name.rpartition(".")[2] in _TABLES)
        for part, key in module.parts.items():
            if part != "alpha":
                names[shown[part]] = key
                if module.expert is not None:
                    slices[shown[part]] = module.expert
                elif transposed and part in ("a", "b"):
                    turned.append(shown[part])
        if "a" in module.parts:
            ranks[name] = _rank(module, tensors, transposed)
            of_modules[name] = alphas.get(name, ranks[name])
    rank, alpha = next(iter(ranks.values()), 1), next(iter(of_modules.values()), 1)
    config = Config(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=any("magnitude" in module.parts for module in modules.values()),
        rank_pattern={exactly(name): r for name, r in ranks.items() if r != rank},
        alpha_pattern={exactly(name): a for name, a in of_modules.items() if a != alpha},
        target_modules=tuple(modules),
    )
    return config, View(tensors, names, turned, slices)


def _rank(module: _Module, tensors: Tensors, transposed: bool) -> int:
    shape = tensors[module.parts["a"]]
    return shape[1] if module.expert is not None else shape[-1] if transposed else shape[0]


def _number(tensors: Tensors, key: str) -> float:
    value = tensors.read(key)
    number = float(value.astype(np.float32).reshape(-1)[0]) if value.size == 1 else float("nan")
    if unusable(number, nonzero=True):
        raise ValueError(f"{tensors.file_of(key)}: {key} is {number}; expected a finite number other than zero.")
    return number


def _from_metadata(metadata: Mapping[str, str], modules: Mapping[str, _Module], tensors: Tensors) -> dict[str, float]:
    """Alphas of diffusers: the config of PEFT by component, as JSON in the file's metadata."""
    try:
        content = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        return {}
    alphas = {}
    for name, module in modules.items():
        key = next(iter(module.parts.values()))
        component = key.partition(".")[0]
        alpha = content.get(f"{component}.lora_alpha") if isinstance(content, Mapping) else None
        pattern = content.get(f"{component}.alpha_pattern") or {} if alpha is not None else {}
        alpha = next((value for end, value in pattern.items() if name == end or name.endswith(f".{end}")), alpha)
        if isinstance(alpha, int | float) and not isinstance(alpha, bool) and not unusable(alpha, nonzero=True):
            alphas[name] = float(alpha)
    return alphas
