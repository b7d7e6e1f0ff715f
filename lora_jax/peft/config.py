"""PEFT's `adapter_config.json`, and the rank and scale that it gives each module."""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.checks import unusable
from lora_jax.io.read_errors import reading
from lora_jax.peft.tensors import read_json

CONFIG = "adapter_config.json"
TOKENS = "TRAINABLE_TOKENS"
"""PEFT's method that only trains rows, which is loaded as LoRA without factors."""
METHODS = ("LORA", "ADALORA", "HIRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", TOKENS, "VERA")
"""The supported values of `peft_type`."""
_READER = "experiments.baselines.peft_virtual_tokens.load, in lora_jax's repository, reads it for the models there"
_VIRTUAL = {
    **dict.fromkeys(("PREFIX_TUNING", "PROMPT_TUNING"), _READER),
    **dict.fromkeys(("P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE"), "it is not supported"),
}
"""The values of `peft_type` of methods that train inputs, or keys and values; and what to do with each."""
_COMMON_FIELDS = ("base_model_name_or_path", "modules_to_save", "task_type", "trainable_token_indices")

# Fields that change what an adapter computes, without counterpart in this library.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
# Initializers that also change the base: PEFT repeats that when it loads the adapter on the original base.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of an `adapter_config.json` that define what an adapter computes; the names are PEFT's.

    Attributes:
      trainable_token_indices: By module (or a suffix of it) the rows; the key `""` is the input embedding.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_modules: Sequence[str] | str = ()
    exclude_modules: Sequence[str] | str = ()
    layers_to_transform: Sequence[int] | int | None = None
    layers_pattern: Sequence[str] | str = ()
    target_parameters: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    @classmethod
    def read(cls, directory: Path) -> "Config":
        """Reads the config of an adapter directory; for methods other than LoRA, only their common fields.

        Raises:
          ValueError: It is missing or damaged, or its method or variant of LoRA is not supported; the message names the
            field.
        """
        file = directory / CONFIG
        content = read_json(file)
        with reading(file):
            kind = content.get("peft_type")
            if kind in _VIRTUAL:
                raise ValueError(f"{file}: peft_type is {kind!r}, virtual tokens instead of weights; {_VIRTUAL[kind]}.")
            if kind not in METHODS:
                raise ValueError(f"{file}: peft_type is {kind!r}; expected one of {', '.join(map(repr, METHODS))}.")
            if used := [name for name in _REFUSED if content.get(name)]:
                raise ValueError(f"{file}: {used[0]} = {content[used[0]]!r} is not supported.")
            init = content.get("init_lora_weights")
            if isinstance(init, str) and init.startswith(_CHANGE_BASE):
                raise ValueError(
                    f"{file}: init_lora_weights = {init!r} changed the base, and no file has the change; PEFT's "
                    "save_pretrained(path_initial_model_for_weight_conversion=…) writes an ordinary adapter."
                )
            if kind == "LORA" and not content.get("target_modules") and not content.get("target_parameters"):
                raise ValueError(f"{file}: has neither target_modules nor target_parameters.")
            tokens = content.get("token_indices" if kind == TOKENS else "trainable_token_indices")
            content["trainable_token_indices"] = {"": tokens} if isinstance(tokens, list) else tokens
            defaults = {
                field.name: field.default_factory if field.default is dataclasses.MISSING else field.default
                for field in dataclasses.fields(cls)
            }
            fields = defaults if kind == "LORA" else _COMMON_FIELDS
            values = {name: content[name] for name in fields if content.get(name) is not None}
            for name, value in values.items():
                _check(file, name, value)
        return cls(**values)

    @functools.cached_property
    def _ranks(self) -> "Patterns":
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> "Patterns":
        return Patterns(self.alpha_pattern)

    def rank(self, module: str) -> int:
        """Returns the rank of a module's factors."""
        return int(self._ranks.get(module, self.r))

    def alpha(self, module: str) -> float:
        """Returns the numerator of a module's scale."""
        return self._alphas.get(module, self.lora_alpha)

    def scale(self, module: str) -> float:
        """Returns the scale of a module's low-rank term."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def tokens(self, module: str) -> Sequence[int] | None:
        """Returns the trained rows of a module; None if there are none."""
        return next(
            (
                ids
                for key, ids in self.trainable_token_indices.items()
                if key in ("", module) or module.endswith(f".{key}")
            ),
            None,
        )

    def is_target(self, module: str) -> bool:
        """Whether `target_modules` selects a module; False for 'all-linear', which depends on the model."""
        targets = self.target_modules
        if targets == "all-linear" or not _selects(targets, module) or _selects(self.exclude_modules, module):
            return False
        if self.layers_to_transform is None:
            return True
        layers = [self.layers_to_transform] if isinstance(self.layers_to_transform, int) else self.layers_to_transform
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        for pattern in patterns or [r"[^.]*"]:
            if match := re.match(rf"(?:.*\.)?{pattern}\.(\d+)\.", module):
                return int(match[1]) in layers
        return False

    def to_json(self) -> dict[str, Any]:
        """Returns the content of an `adapter_config.json` that PEFT loads."""
        fields, targets = dataclasses.asdict(self), self.target_modules
        return {
            **dict(sorted(fields.items())),
            "peft_type": "LORA",
            "inference_mode": True,
            "init_lora_weights": True,
            "modules_to_save": list(self.modules_to_save) or None,
            "target_modules": targets if isinstance(targets, str) else list(targets),
            "target_parameters": list(self.target_parameters) or None,
            "trainable_token_indices": {k: list(v) for k, v in self.trainable_token_indices.items()} or None,
        }


def exact_pattern(label: str) -> str:
    """Returns a pattern that matches one module only; PEFT prepends `(.*\\.)?` to patterns, which match suffixes."""
    return f"^{re.escape(label)}"


def _selects(targets: Sequence[str] | str, module: str) -> bool:
    if isinstance(targets, str):
        return bool(targets) and re.fullmatch(targets, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in targets)


class Patterns:
    """Values by pattern; the first one in the file's order that matches a module's name or a suffix of it applies.

    Patterns are regular expressions. Most are plain names, and there may be one for each of thousands of modules,
    so these are looked up in a dict.
    """

    def __init__(self, pattern: Mapping[str, Any]):
        self._plain: dict[str, tuple[int, Any]] = {}
        self._others: list[tuple[int, re.Pattern, Any]] = []
        for number, (key, value) in enumerate(pattern.items()):
            name = re.sub(r"\\(.)", r"\1", key)
            if re.escape(name) == key:
                self._plain.setdefault(name, (number, value))
            else:
                self._others.append((number, re.compile(rf"(.*\.)?({key})$"), value))

    def get(self, module: str, default: Any) -> Any:
        """Returns the value for a module."""
        segments = module.split(".")
        suffixes = (".".join(segments[start:]) for start in range(len(segments)))
        matches = [self._plain[suffix] for suffix in suffixes if suffix in self._plain]
        first, value = min(matches, key=lambda entry: entry[0], default=(math.inf, default))
        return next((v for number, regex, v in self._others if number < first and regex.match(module)), value)


_KINDS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float),
    "bias": (str,),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "trainable_token_indices": (dict,),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "layers_pattern": (list, str),
    "target_parameters": (list,),
    "modules_to_save": (list,),
}


def _check(file: Path, name: str, value: Any) -> None:
    kinds = _KINDS.get(name, (str,) if name in ("base_model_name_or_path", "task_type") else (bool,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{file}: {name} is {value!r}; expected {' or '.join(kind.__name__ for kind in kinds)}.")
    if problem := _check_entries(name, value):
        raise ValueError(f"{file}: {name} is {value!r}; {problem}.")
    if name == "lora_alpha" and unusable(value, nonzero=True):
        raise ValueError(f"{file}: lora_alpha is {value!r}; expected a finite number other than zero.")
    if name == "lora_dropout" and not 0 <= value <= 1:
        raise ValueError(f"{file}: lora_dropout is {value!r}; a rate is at least 0 and at most 1.")
    if name == "r" and value < 1:
        raise ValueError(f"{file}: r is {value}; a rank is at least 1.")
    if name == "bias" and value not in ("none", "all", "lora_only"):
        raise ValueError(f"{file}: bias is {value!r}; expected 'none', 'all' or 'lora_only'.")


def _check_entries(name: str, value: Any) -> str:
    """Describes the first invalid entry of a list or an object; empty if all are valid."""
    patterns: list[Any] = []
    if name in ("rank_pattern", "alpha_pattern"):
        patterns = list(value)
        least = 1 if name == "rank_pattern" else -math.inf
        kinds = (int,) if name == "rank_pattern" else (int, float)
        if not all(isinstance(x, kinds) and not isinstance(x, bool) and x >= least for x in value.values()):
            return "expected a number for each pattern" + (", a rank of at least 1" if name == "rank_pattern" else "")
        if name == "alpha_pattern" and any(unusable(alpha, nonzero=True) for alpha in value.values()):
            return "expected finite numbers other than zero"
    elif name in ("target_modules", "exclude_modules") and isinstance(value, str):
        patterns = [value]
    elif name == "layers_to_transform" and isinstance(value, list):
        return "" if all(isinstance(x, int) for x in value) else "expected indices of layers"
    elif name == "trainable_token_indices":
        lists = [ids for ids in value.values() if isinstance(ids, list)]
        is_valid = len(lists) == len(value) and all(isinstance(i, int) for ids in lists for i in ids)
        return "" if is_valid else "expected a list of rows for each module"
    elif isinstance(value, list) and not all(isinstance(x, str) for x in value):
        return "expected a list of names"
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            return f"{pattern!r} is not a regular expression: {error}"
    return ""
