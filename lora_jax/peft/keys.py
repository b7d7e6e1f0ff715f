"""The keys of PEFT's `adapter_model.safetensors`: the module and the part that each names."""

import dataclasses
import re
from collections.abc import Container, Iterable, Iterator, Sequence

ADAPTER = "adapter_model.safetensors"
PREFIX = "base_model.model."
WRAPPED = "base_layer"

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_B.bias": "b_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # releases before 0.12
    "token_adapter.trainable_tokens_delta": "rows",
    "trainable_tokens_delta": "rows",  # of TRAINABLE_TOKENS
}
_KEY = re.compile(rf"{re.escape(PREFIX)}(?P<module>.+?)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")

_INSIDE_SAVED = (
    re.compile(r"\.(modules_to_save|original_module)(?=\.)"),
    re.compile(r"\.modules_to_save\.[^.]+(?=\.)"),  # of a module with several layers: followed by the adapter's name
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A parsed key.

    Attributes:
      key: The stored key.
      module: The module, without PEFT's wrappers.
      part: 'a', 'b', 'b_bias', 'magnitude', 'rows', or 'value' for a tensor that replaces one of the base.
      depth: The number of wrappers between the module and the part: one for each further parameter of the module that
        has factors.
      embedding: Whether it is a factor of a lookup.
      name: For a 'value', the name of the base's tensor.
      wrapped: For a 'value', whether its module has factors too.
    """

    key: str
    module: str
    part: str
    depth: int = 0
    embedding: bool = False
    name: str = ""
    wrapped: bool = False


def parse(key: str) -> Key | None:
    """Parses a key; returns None if it is not one of PEFT's LoRA."""
    if match := _KEY.fullmatch(key):
        segments = match["module"].split(".")
        depth = 0
        while segments[-1:] == [WRAPPED]:
            segments.pop()
            depth += 1
        module = ".".join(x for x in segments if x != WRAPPED)
        if not module:
            return None
        return Key(key, module, _PARTS[match["part"]], depth, "embedding" in match["part"])
    if not key.startswith(PREFIX) or "." not in key.removeprefix(PREFIX):
        return None
    *segments, parameter = key.removeprefix(PREFIX).split(".")
    module = ".".join(x for x in segments if x != WRAPPED)
    return Key(key, module, "value", name=f"{module}.{parameter}", wrapped=segments[-1:] == [WRAPPED])


def is_repeated(key: str, stored: Container[str]) -> bool:
    """Whether a key repeats another one: if `bias` is set, PEFT stores the biases of saved modules twice."""
    return any((plain := pattern.sub("", key)) != key and plain in stored for pattern in _INSIDE_SAVED)


def factor_keys(module: str, *, embedding: bool, depth: int = 0) -> dict[str, str]:
    """Returns the keys of a module's parts."""
    inside = PREFIX + ".".join([module, *[WRAPPED] * depth])
    a, b = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return {
        "a": f"{inside}.{a}",
        "b": f"{inside}.{b}",
        "b_bias": f"{inside}.lora_B.bias",
        "magnitude": f"{inside}.lora_magnitude_vector",
    }


def rows_key(module: str) -> str:
    """Returns the key of a module's trained rows."""
    return f"{PREFIX}{module}.token_adapter.trainable_tokens_delta"


def value_key(module: str, parameter: str, *, wrapped: bool) -> str:
    """Returns the key of a replaced tensor, in a module that has factors if `wrapped`."""
    return f"{PREFIX}{module}.{WRAPPED + '.' if wrapped else ''}{parameter}"


def wrap_path(module: str, parents: Iterable[str]) -> str:
    """Returns a module's path in keys if some of its ancestors are wrapped, because their parameters have factors."""
    wrapped = set(parents)
    segments = module.split(".")
    path: list[str] = []
    for count, segment in enumerate(segments, 1):
        path.append(segment)
        if count < len(segments) and ".".join(segments[:count]) in wrapped:
            path.append(WRAPPED)
    return ".".join(path)


def wrapped_parents(key: str) -> Iterator[str]:
    """Yields the modules in a key that have wrappers and contain another module of the key."""
    segments = key.removeprefix(PREFIX).split(".")
    for number, segment in enumerate(segments[:-3]):
        if segment == WRAPPED and segments[number + 1] != WRAPPED:
            yield ".".join(x for x in segments[:number] if x != WRAPPED)


def split_name(name: str) -> tuple[str, str]:
    """Splits a tensor's name into the module and the parameter."""
    module, _, parameter = name.rpartition(".")
    return module, parameter


def is_parameter(name: str) -> bool:
    """Whether PEFT targets the tensor as a parameter of its module instead of the module."""
    return split_name(name)[1] not in ("weight", "in_proj_weight")


def matches(module: str, targets: Sequence[str]) -> bool:
    """Whether one of the targets is a module's name or a suffix of it."""
    return any(module == target or module.endswith(f".{target}") for target in targets)


def is_inside(module: str, target: str) -> bool:
    """Whether a target names a module, or one that contains it."""
    segments = module.split(".")
    return any(matches(".".join(segments[:count]), [target]) for count in range(1, len(segments) + 1))


def saved_module(module: str, entries: Sequence[str]) -> str:
    """Returns the module that PEFT wraps for `modules_to_save`: this one or one that contains it; empty for neither.

    PEFT compares suffixes of paths as text: `norm` also matches `post_attention_layernorm`.

    Example:
      >>> saved_module("layers.0.input_layernorm", ["norm"]), saved_module("score.out", ["score"])
      ('layers.0.input_layernorm', 'score')
      >>> saved_module("up", ["norm"])
      ''
    """
    segments = module.split(".")
    outer = (".".join(segments[:count]) for count in range(1, len(segments) + 1))
    return next((name for name in outer if name.endswith(tuple(entries))), "")
