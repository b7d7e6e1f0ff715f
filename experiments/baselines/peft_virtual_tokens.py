"""Loads and saves PEFT's adapters of prefix tuning and prompt tuning.

PEFT's file holds one tensor, `prompt_embeddings`: for prompt tuning `[tokens, width]`, for prefix tuning
`[tokens, layers · 2 · groups · head]`, keys before values; a network that computes them is not stored. Heads of
classifiers are beside it under their names in PyTorch.
"""

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

import lora_jax as lora
from experiments.baselines import prefix_layer_tuning, prefix_tuning, prompt_tuning
from experiments.errors import UserError, reading
from experiments.models.virtual import Shape
from lora_jax import io, peft

CONFIG, TENSORS, KEY = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_ENTRIES = {"PREFIX_TUNING": prefix_tuning.NAME, "PROMPT_TUNING": prompt_tuning.NAME}
_FILES = (CONFIG, TENSORS, "README.md")  # of an adapter, as PEFT writes it
_PREFIX = "base_model."
_CLASSIFIERS = ("classifier", "score")


def load(directory: str | os.PathLike, base: Any, names: peft.Names, shape: Shape) -> dict[str, Any]:
    """Returns the base with the virtual tokens of an adapter, and with the modules that it replaces.

    Args:
      directory: Contains `adapter_config.json` and `adapter_model.safetensors`.
      base: The parameters that the adapter is for; a nested dict.
      names: The names of the base's leaves in PyTorch.
      shape: The sizes of the model, `model.shape` of a decoder or an encoder.

    Returns:
      Parameters for `prefix_tuning.adapt(apply_fn)` or `prompt_tuning.adapt(apply_fn)`, with the entry 'prefix' or
      'prompt'. To train further, `lora.init` with `lora.Full()` starts from these values.

    Raises:
      UserError: The files are missing, damaged, of another method or for another model.

    Example:
      >>> import pathlib, tempfile
      >>> from experiments.models import llama, location
      >>> model = llama.load(location.find("tiny-llama"))
      >>> apply_fn, base = lora.nnx.functional(model)
      >>> base |= {"prompt": prompt_tuning.init(jax.random.key(0), base["token"]["embedding"], length=8)}
      >>> delta = lora.init(jax.random.key(1), base, {"^prompt$": lora.Full()})
      >>> directory = pathlib.Path(tempfile.mkdtemp()) / "adapter"
      >>> save(directory, base, delta, llama.names(model.config), model.shape)
      >>> load(directory, base, llama.names(model.config), model.shape)["prompt"].shape
      (8, 64)
    """
    directory = Path(directory)
    with reading(directory / CONFIG):
        content = peft.read_json(directory / CONFIG)
    kind = content.get("peft_type")
    if kind not in _ENTRIES:
        raise UserError(
            f"{directory / CONFIG}: peft_type is {kind!r}, expected {' or '.join(map(repr, _ENTRIES))}; "
            "lora_jax.peft.load reads adapters of weights"
        )
    if content.get("num_transformer_submodules") not in (None, 1):
        raise UserError(f"{directory / CONFIG}: the adapter is for a model with an encoder and a decoder")
    file = directory / TENSORS
    with reading(file), peft.Tensors([file]) as tensors:
        arrays = {name: np.asarray(tensors.read(name), np.float32) for name in tensors}
    if KEY not in arrays:
        raise UserError(f"{file}: has no tensor {KEY!r}")
    entry = _entry(file, kind, arrays.pop(KEY), base, shape)
    values = dict(_saved_modules(file, arrays, base, names))
    replaced = jax.tree_util.tree_map_with_path(lambda keys, leaf: values.get(_path(keys), leaf), base)
    return replaced | {_ENTRIES[kind]: entry}


def save(
    directory: str | os.PathLike,
    base: Any,
    delta: dict[str, lora.Adapter],
    names: peft.Names,
    shape: Shape,
    *,
    base_model: str | None = None,
) -> None:
    """Saves trained virtual tokens, and leaves that are trained in full, as PEFT does.

    Args:
      directory: A new or empty directory, or one with an adapter, which is replaced.
      base: The parameters, with the entry 'prefix' or 'prompt'. The network of a prefix is folded.
      delta: Adapters of the entry and of the head of a classifier, from `lora.Full()`.
      names: The names of the base's leaves in PyTorch.
      shape: The sizes of the model, `model.shape` of a decoder or an encoder.
      base_model: The name of the base model on the hub, for the file.

    Raises:
      UserError: The directory holds other files or cannot be written, or PEFT's methods cannot represent the delta.
    """
    entries = [name for name in _ENTRIES.values() if name in base]
    if len(entries) != 1:
        hint = "; PEFT has no method that trains the inputs of layers" if prefix_layer_tuning.NAME in base else ""
        raise UserError(f"the base has the entries {', '.join(base)}, expected one of 'prefix' and 'prompt'{hint}")
    (name,) = entries
    merged = lora.merge(base, delta)
    if name == prompt_tuning.NAME:
        matrix_PE = merged[name]
    else:
        folded = prefix_tuning.fold(merged[name])
        split_NP2GK = jnp.stack([folded["keys"], folded["values"]], axis=2)
        matrix_PE = split_NP2GK.swapaxes(0, 1).reshape(split_NP2GK.shape[1], -1)
    tensors = {KEY: np.asarray(matrix_PE, np.float32)}
    modules = set(_CLASSIFIERS) if any(head in base for head in _CLASSIFIERS) else set()
    leaves = lora.paths.flatten(merged).as_dict()
    for path, adapter in delta.items():
        if path.partition("/")[0] == name:
            continue
        binding = names.get(path, leaves[path].shape)
        if adapter.kind != "Full" or binding is None:
            raise UserError(
                f"{path}: PEFT's files of virtual tokens hold no {adapter.kind} of this leaf; merge its adapter into "
                "the base, or save it by lora_jax.peft.save"
            )
        for tensor, value in binding.split(np.asarray(leaves[path], np.float32)).items():
            key = binding.in_model[tensor]
            tensors[f"{_PREFIX}{key}"] = np.ascontiguousarray(value)
            if key.partition(".")[0] not in modules:
                modules.add(key.rpartition(".")[0])
    config = _config(name, len(matrix_PE), shape, base_model, sorted(modules))
    try:
        with io.replace_directory(directory, CONFIG, what="adapter", owns=lambda file: file.name in _FILES) as fresh:
            save_file(tensors, fresh / TENSORS, metadata={"format": "pt"})
            (fresh / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(str(error)) from None


def _entry(file: Path, kind: str, matrix_PE: np.ndarray, base: Any, shape: Shape) -> Any:
    """Returns virtual tokens from the tensor of a file."""
    sizes = (shape.layers, 2, shape.groups, shape.head) if kind == "PREFIX_TUNING" else (_width(base, shape),)
    if matrix_PE.ndim != 2 or matrix_PE.shape[1] != math.prod(sizes):
        form = f"{math.prod(sizes)}] ({' · '.join(map(str, sizes))})" if len(sizes) > 1 else f"{sizes[0]}]"
        raise UserError(f"{file}: {KEY} has the shape {list(matrix_PE.shape)}, expected [tokens, {form} for this model")
    if kind == "PROMPT_TUNING":
        return jnp.asarray(matrix_PE)
    return prefix_tuning.split(jnp.asarray(matrix_PE).reshape(-1, *sizes))


def _width(base: Any, shape: Shape) -> int:
    """Returns the width of the embeddings, which may be smaller than that of the layers."""
    paths = lora.paths.flatten(base)
    tables = (
        leaf for path, leaf in zip(paths.paths, paths.leaves) if path.endswith(("word/embedding", "token/embedding"))
    )
    return next((table.shape[-1] for table in tables), shape.width)


def _saved_modules(
    file: Path, arrays: dict[str, np.ndarray], base: Any, names: peft.Names
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the path and the new value of every leaf whose tensors the file has."""
    rest = dict(arrays)
    for path, leaf in lora.paths.flatten(base).as_dict().items():
        binding = names.get(path, leaf.shape)
        if binding is None or not all(f"{_PREFIX}{key}" in arrays for key in binding.in_model.values()):
            continue
        tensors = {tensor: rest.pop(f"{_PREFIX}{key}") for tensor, key in binding.in_model.items()}
        for tensor, array in tensors.items():
            if array.shape != binding.tensor_shape:
                expected = list(binding.tensor_shape)
                raise UserError(f"{file}: {tensor} has the shape {list(array.shape)}, expected {expected}")
        yield path, jnp.asarray(binding.join(functools.partial(_read, tensors), leaf.dtype))
    if rest:
        raise UserError(f"{file}: {', '.join(sorted(rest))} belong to no leaf of the base")


def _read(tensors: Mapping[str, np.ndarray], name: str, part: tuple[slice, ...]) -> np.ndarray:
    return tensors[name][part]


def _config(name: str, length: int, shape: Shape, base_model: str | None, modules: list[str]) -> dict[str, Any]:
    """Returns the content of `adapter_config.json`."""
    prefix = name == prefix_tuning.NAME
    width = shape.groups * shape.head if prefix else shape.width
    special = {"encoder_hidden_size": width, "prefix_projection": False} if prefix else {"prompt_tuning_init": "RANDOM"}
    return special | {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "modules_to_save": modules or None,
        "num_attention_heads": shape.groups,
        "num_layers": shape.layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "peft_type": next(kind for kind, entry in _ENTRIES.items() if entry == name),
        "task_type": "SEQ_CLS" if set(_CLASSIFIERS) <= set(modules) else "CAUSAL_LM",
        "token_dim": width,
    }


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")
