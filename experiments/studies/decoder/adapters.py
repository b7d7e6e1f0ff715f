"""The adapter of a study: a new one from a config, or one that is read from a directory."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments.configs.decoder import DecoderConfig
from experiments.errors import UserError
from experiments.models.weights import flatten_weights
from lora_jax.io import join_names
from lora_jax.peft import read_json

LINEAR = {
    "attention": r"attention/(query|key|value|qkv|output)/kernel$",
    "feed-forward": r"feed_forward/(gate|up|down)/kernel$",
}
"""Patterns of the linear layers of all blocks, by target. A quantized base has all of them quantized."""

OTHERS = {
    **{name: rf"attention/{name}/kernel$" for name in ("query", "key", "value")},
    **{name: rf"feed_forward/{name}/kernel$" for name in ("gate", "up", "down")},
    "embedding": r"^token/embedding$",
    "head": r"^output/kernel$",
}
_OURS, _PEFT = "adapter.json", "adapter_config.json"  # files that identify the directory of an adapter
_FUSED, _PARTS = r"attention/qkv/kernel$", ("query", "key", "value")
_FULL = "Full"  # the kind of weights that are trained in full


def make_spec(config: DecoderConfig, base: Any) -> dict[str, Any]:
    """Returns the recipes of adapted weights by pattern; the pattern of full fine-tuning matches all weights.

    Raises:
      UserError: A pattern of `ranks` does not determine the rank of any weight.
    """
    dtype = jnp.dtype(config.adapter_dtype)
    if config.method == "full":
        return {"": lora.Full(dtype)}
    recipe = {"lora": lora.LoRA, "dora": lora.DoRA}[config.method]

    def with_rank(rank: int, blocks: Any) -> Any:
        return recipe(rank, config.alpha, blocks=blocks, dropout=config.dropout, dtype=dtype)

    targets = _blocks_by_pattern(config, base)
    patterns = config.rank_patterns()
    if not patterns:
        return {target: with_rank(config.rank, blocks) for target, blocks in targets.items()}
    blocks_of = {
        path: next((blocks for target, blocks in targets.items() if re.search(target, path)), None)
        for path in flatten_weights(base)
    }
    adapted = [path for path, blocks in blocks_of.items() if blocks is not None]
    first = {path: next((pattern for pattern in patterns if re.search(pattern, path)), None) for path in adapted}
    for pattern in patterns:
        if pattern not in first.values():
            earlier = any(re.search(pattern, path) for path in adapted)
            why = "matches only weights that an earlier pattern matches" if earlier else "matches no adapted weight"
            raise UserError(f"ranks: {pattern!r} {why}; these are adapted: {', '.join(adapted)}")
    unmatched = [target for target in targets if not any(re.search(target, path) for path in adapted)]
    ranks = [
        (f"^{re.escape(path)}$", patterns[pattern] if pattern else config.rank, path) for path, pattern in first.items()
    ]
    return {exact: with_rank(rank, blocks_of[path]) for exact, rank, path in ranks} | {
        target: with_rank(config.rank, targets[target]) for target in unmatched
    }


def _blocks_by_pattern(config: DecoderConfig, base: Any) -> dict[str, int | tuple[bool, ...]]:
    """Returns the patterns of a config's targets, and the parts of a weight that are adapted: of a fused kernel of
    query, key and value only those that are targets."""
    fused = any(re.search(_FUSED, path) for path in flatten_weights(base))
    blocks: dict[str, int | tuple[bool, ...]] = {}
    for target in config.targets:
        if fused and target in _PARTS:
            blocks[_FUSED] = tuple(part in config.targets for part in _PARTS)
        else:
            blocks[(LINEAR | OTHERS)[target]] = 1
    return blocks


def new_adapter(
    config: DecoderConfig, base: Any, apply: Callable, key: Any, tokens: Any, before: Mapping[str, Any]
) -> Any:
    """Returns the shapes of a new adapter, by recipes that precede those of the config, and those of the config.

    Raises:
      UserError: A target cannot be adapted.
    """
    tied = "output/kernel" not in flatten_weights(base)
    if "head" in config.targets and tied:
        raise UserError(
            f"--targets head: the head of {config.model} is its token embedding; --targets embedding adapts both"
        )
    spec = {**before, **make_spec(config, base)}
    try:
        return jax.eval_shape(lambda key, base: lora.init(key, base, spec, apply, tokens), key, base)
    except ValueError as error:
        raise UserError(f"--targets {' '.join(config.targets)}: {error}") from None


def read_adapter(directory: Path, base: Any, names: Any, dtype: jnp.dtype, flag: str = "--init-from") -> Any:
    """Reads an adapter into host memory.

    Args:
      directory: A directory that `lora_jax.save` or PEFT wrote.
      base: The parameters, or their shapes.
      names: The names of the base's weights in Hugging Face layout.
      dtype: The dtype of the trained leaves.
      flag: The flag that names the directory, for error messages.

    Raises:
      UserError: The directory has no adapter, or the adapter does not fit the base.
    """
    check_adapter(directory, flag)
    ours = (directory / _OURS).exists()
    try:
        delta = lora.load(directory, base) if ours else lora.peft.load(directory, base, names)
    except (OSError, ValueError) as error:
        if not ours and (match := re.search(r"^ *tied: (.*?), so that", str(error), re.MULTILINE)):
            raise UserError(
                f"{flag} {directory}: {match[1]}, but head and embedding of this model are one weight; merge the "
                "adapter with `lora-jax merge`, which stores both, and train the merged model (--model)"
            ) from None
        raise UserError(
            f"{flag}: {error}" if str(directory) in str(error) else f"{flag} {directory}: {error}"
        ) from None
    train, frozen = lora.partition(delta)
    return lora.join(jax.tree.map(lambda leaf: leaf.astype(dtype), train), frozen)


def is_adapter(directory: Path) -> bool:
    """Whether a directory contains an adapter."""
    return any((directory / name).exists() for name in (_OURS, _PEFT))


def is_full(directory: Path) -> bool:
    """Whether a directory contains weights that were trained in full, and no adapter of another kind."""
    if not (directory / _OURS).is_file():
        return False
    try:
        return {entry["kind"] for entry in read_json(directory / _OURS)["adapters"].values()} == {_FULL}
    except (ValueError, KeyError, TypeError, AttributeError):  # reading the adapter reports what is damaged
        return False


def trained_in_full(delta: Any) -> bool:
    """Whether a delta has no adapters, only weights that are trained in full."""
    return {adapter.kind for adapter in delta.values()} == {_FULL}


def save_peft(directory: Path, delta: Any, names: Any, model: str, task_type: str) -> bool:
    """Writes an adapter in PEFT's format, which has none for weights that were trained in full.

    Args:
      directory: The new directory.
      delta: The adapter.
      names: The names of the base's weights in Hugging Face layout.
      model: The name of the base.
      task_type: PEFT's name of the task.

    Returns:
      Whether it is written.
    """
    if trained_in_full(delta):
        return False
    lora.peft.save(directory, delta, names, base_model=model, task_type=task_type)
    return True


def check_adapter(directory: Path, flag: str = "--init-from") -> None:
    """Raises a UserError that names the flag if a directory does not contain an adapter."""
    if is_adapter(directory):
        return
    if not directory.is_dir():
        raise UserError(f"{flag} {directory}: no such directory")
    nested = [entry for pattern in ("*", "*/*") for entry in sorted(directory.glob(pattern)) if is_adapter(entry)]
    hint = f"; adapters are in {join_names(list(map(str, nested)))}" if nested else ""
    raise UserError(f"{flag} {directory}: expected a directory with {_OURS} (lora_jax) or {_PEFT} (PEFT){hint}")


def has_dropout(delta: Any) -> bool:
    """Whether an adapter to start from has a dropout rate above 0."""
    rates = [getattr(adapter, "dropout", None) for adapter in (delta or {}).values()]
    return any(rate is not None and np.any(np.asarray(rate) > 0) for rate in rates)
