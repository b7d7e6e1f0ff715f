"""Loads models from, and saves parameters to, checkpoints in Hugging Face layout."""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax as lora
from experiments.errors import UserError
from experiments.models.stored_codes import StoredCodes
from experiments.models.stored_weights import StoredWeights
from experiments.pretrained.files import ModelFiles, open_files
from lora_jax import peft
from lora_jax.io import replace_directory
from lora_jax.quantization import Format, Plan

M = TypeVar("M", bound=nnx.Module)
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.txt")
_ROWS = 4096  # the number of rows of an embedding and a head that are compared at a time
NOTHING = r"(?!)"
"""A pattern that matches nothing."""


def read_config(path: Path, name: str = "config.json", *, untied: bool = False) -> dict[str, Any]:
    """Reads the model's `config.json`, or another JSON file of its directory; for a GGUF file, what it would contain.

    As in transformers, `tie_word_embeddings` is false if the weights contradict it: a stored head that differs from
    the embedding is a separate weight.

    Args:
      path: The model's directory or GGUF file.
      name: The name of the file.
      untied: Whether the head becomes a separate weight in any case.

    Raises:
      UserError: The file is missing or not a JSON object, or the weights cannot be read.
    """
    files = open_files(path)
    content = files.read_json(name)
    if name != "config.json":
        return content
    try:
        if not untied and (head := _separate_head(files, content)):
            warnings.warn(
                f"{path}: tie_word_embeddings is true, but {head} differs from the embedding and is used",
                stacklevel=2,
            )
            untied = True
    except ValueError as error:
        raise UserError(str(error)) from None
    return content | {"tie_word_embeddings": False} if untied else content


def _separate_head(files: ModelFiles, config: Mapping[str, Any]) -> str | None:
    """Returns the name of the head if a config ties it to the embedding but the checkpoint stores another one."""
    if not files.has_weights:
        return None
    with files.tensors() as tensors:
        for table, shape in tensors.items():
            head = peft.tied_head(table, config)
            if head is None or head not in tensors or tensors[head] != shape:
                continue
            for first in range(0, shape[0], _ROWS):
                rows = (slice(first, min(first + _ROWS, shape[0])),)
                if not np.array_equal(tensors.read(table, rows), tensors.read(head, rows)):
                    return head
    return None


def load(
    build: Callable[[nnx.Rngs], M],
    names: peft.Names,
    directory: Path,
    *,
    dtype: Any = jnp.float32,
    sharding: Sharding | None = None,
    spellings: Sequence[tuple[str, str]] = (),
    unused: str = NOTHING,
    fresh: str = NOTHING,
    optional: str = NOTHING,
    seed: int = 0,
    rules: Mapping[str, Format | None] | None = None,
    example: Sequence[Any] = (),
    copies: Mapping[str, str] | None = None,
    stored: bool = False,
) -> M:
    """Returns a model with the weights of a checkpoint; random initial values are computed for new weights only.

    Weights that bitsandbytes quantized to four or eight bits become quantized leaves with the same codes. Each device
    receives its shard of a weight directly from the files. The host's memory holds one shard at a time, which is read
    once for all devices that share it.

    Args:
      build: Builds the model.
      names: The names of its weights in the checkpoint.
      directory: A directory with `model.safetensors`, or its shards and `model.safetensors.index.json`; or a GGUF
        file, or a directory that holds one, whose codes are dequantized.
      dtype: The dtype of all weights; None keeps the stored dtypes.
      sharding: A function from a weight's path and shape to its sharding; None uses the default device.
      spellings: Pairs (pattern, replacement) that convert other spellings of a tensor's name to the usual one.
      unused: A pattern of tensors that the model does not use, by the names of the bare model. They are dropped, so
        :func:`save` does not write them (an encoder's pooler, a head for masked words).
      fresh: A pattern of paths of weights that are initialized even if the checkpoint holds them (a new head).
      optional: A pattern of paths of weights that are initialized if the checkpoint holds none of their tensors.
      seed: The seed of initialized weights.
      rules: The weights to quantize while loading; see :func:`lora_jax.quantize`. Stacked layers are quantized one by
        one, so at most one layer's weight is in memory unquantized.
      example: Arguments, or their shapes, of a call of the model, which is traced for `rules`.
      copies: Tensors that are copies of others if the checkpoint does not hold them (an untied head).
      stored: Whether weights that a GGUF file stores as codes become quantized leaves with the same codes, instead of
        being dequantized.

    Raises:
      UserError: Files are missing or damaged, or tensors are missing, unexpected or of other shapes; the error lists
        all of them.
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    plan = None
    if rules:
        apply, shapes = lora.nnx.functional(abstract)
        plan = Plan.of(shapes, rules, apply, *example)
    graph, params, _ = nnx.split(abstract, nnx.Param, ...)
    variables = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    shardings = {
        path: None if sharding is None else sharding(path, variable.get_value().shape)
        for path, variable in variables.items()
    }
    values: dict[str, Any] = {}
    try:
        with open_files(directory).tensors() as tensors:
            if eight := [name for name in tensors if tensors.dtype(name).startswith("F8")]:
                raise UserError(
                    f"{tensors.file_of(eight[0])}: {eight[0]} is stored in FP8 ({tensors.dtype(eight[0])}), as are "
                    f"{len(eight) - 1} other tensors; FP8 is not supported, use the model's bfloat16 weights"
                )
            bindings = {path: names.find(path, variable.get_value().shape) for path, variable in variables.items()}
            codes = require_codes(directory, copies) if stored else None
            weights = StoredWeights(tensors, names.prefix, spellings, copies or {}, codes)
            new = {
                path
                for path, binding in bindings.items()
                if re.search(fresh, path) or (re.search(optional, path) and not weights.has_any(binding))
            }
            read = [binding for path, binding in bindings.items() if path not in new]
            weights.check(directory, read, {name for path in new for name in bindings[path].tensors}, unused)
            for binding in read:
                # Pending copies would hold several shards in the host's memory.
                leaf = weights.leaf(binding, dtype, shardings[binding.path], plan)
                values[binding.path] = jax.block_until_ready(leaf)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None

    # Computes random state and new weights; the compiler drops all other initial weights.
    def initial() -> tuple[Any, dict[str, jax.Array]]:
        initialized, others = nnx.state(build(nnx.Rngs(seed)), nnx.Param, ...)
        flat = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(initialized)}
        return others, {path: flat[path].astype(dtype or flat[path].dtype) for path in new}

    others, initialized = jax.jit(initial, out_shardings=(None, {path: shardings[path] for path in new}))()
    values |= initialized
    flat = [(path, variable.replace(values["/".join(map(str, path))])) for path, variable in nnx.to_flat_state(params)]
    return nnx.merge(graph, nnx.from_flat_state(flat), others)


def require_codes(path: Path, copies: Mapping[str, str] | None = None) -> StoredCodes:
    """Returns the codes of a GGUF file.

    Args:
      path: The file, or a directory that holds one.
      copies: See :func:`load`.

    Raises:
      UserError: It stores no codes.
    """
    codes = open_files(path).codes()
    if codes is None:
        raise UserError(f"{path}: holds no codes of GGUF's formats to use as stored; use --quantize nf4 or int8")
    return StoredCodes(codes, copies)


def save(
    directory: Path,
    base: Any,
    names: peft.Names,
    config: Mapping[str, Any],
    *,
    tokenizer: Path | None = None,
    bare: bool = False,
    shard_bytes: int = peft.SHARD_BYTES,
) -> None:
    """Writes parameters in Hugging Face layout, which transformers opens.

    The directory appears with all files or, after an error, not at all.

    Args:
      directory: A new or empty directory.
      base: The parameters, such as `lora.merge(base, delta)`. This process must be able to address every array.
      names: The names of the weights in the checkpoint.
      config: The content of `config.json`.
      tokenizer: A directory or GGUF file whose tokenizer files are copied.
      bare: Whether to omit `names.prefix`, as in a checkpoint of the bare model.
      shard_bytes: The maximum size of a file.

    Raises:
      UserError: The directory is not empty or cannot be written, or a parameter has no name.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: holds files already")
    try:
        with replace_directory(directory, "config.json", what="checkpoint", owns=lambda entry: False) as fresh:
            peft.write_model(fresh, _tensors_of(base, names, bare), shard_bytes=shard_bytes)
            (fresh / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
            copied = {name: open_files(tokenizer).read(name) for name in _COPIED} if tokenizer else {}
            for name, text in copied.items():
                if text is not None:
                    (fresh / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    except ValueError as error:
        raise UserError(str(error)) from None


def _tensors_of(base: Any, names: peft.Names, bare: bool) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        binding = names.find("/".join(str(key.key) for key in path), leaf.shape)
        for name, tensor in binding.split(np.asarray(leaf)).items():
            yield name.removeprefix(names.prefix) if bare else name, tensor
