"""Weights in Hugging Face layout: read tensor by tensor onto their shardings, and written back."""

import dataclasses
import json
import re
import shutil
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
from lora_jax import peft
from lora_jax.io import replace_directory
from lora_jax.quantization import Format, Plan, bitsandbytes_tensors, from_bitsandbytes, shardings

M = TypeVar("M", bound=nnx.Module)
Sharding = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "vocab.txt")
_LISTED = 12  # problems that are printed
_ROWS = 4096  # of an embedding and its head that are compared at a time
NOTHING = r"(?!)"
"""A pattern that matches nothing."""


def read_config(directory: Path, name: str = "config.json", *, untied: bool = False) -> dict[str, Any]:
    """The model's `config.json`, or another file of its directory.

    As transformers does, a `tie_word_embeddings` that the weights contradict is taken for false: a head that is stored
    and differs from the embedding is a weight of its own.

    Args:
      directory: Of the model.
      name: Of the file.
      untied: Whether the head is to be a weight of its own anyhow.

    Raises:
      UserError: There is none, or it is not a JSON object; or the weights cannot be read.
    """
    try:
        content = peft.read_json(directory / name)
        if name != "config.json":
            return content
        if not untied and (head := _own_head(directory, content)):
            warnings.warn(
                f"{directory}: tie_word_embeddings is true, and {head} differs from the embedding; it is used",
                stacklevel=2,
            )
            untied = True
    except ValueError as error:
        raise UserError(str(error)) from None
    return content | {"tie_word_embeddings": False} if untied else content


def _own_head(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The head of a model whose config ties it, where the checkpoint has another one than the embedding."""
    if not any((directory / file).is_file() for file in (peft.WEIGHTS, peft.INDEX)):
        return None
    with peft.Tensors(peft.model_files(directory)) as tensors:
        for table, shape in tensors.items():
            head = peft.tied_head(table, config)
            if head not in tensors or tensors[head] != shape:
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
) -> M:
    """A model with the weights of a checkpoint; random initial values are computed of new weights only.

    Weights that bitsandbytes quantized to four or eight bits stay so, as leaves with the same codes. Each device gets
    its part of a weight straight from the files: beside what is on the devices, the host's memory holds one such part
    at a time, which is read once for all devices that share it.

    Args:
      build: Makes the model.
      names: Of its weights in the checkpoint.
      directory: Holds `model.safetensors`, or its shards with `model.safetensors.index.json`.
      dtype: What every weight is cast to; None keeps what is stored.
      sharding: The sharding of a weight, from its path and shape; None puts all on the default device.
      spellings: (pattern, replacement) that bring other spellings of a tensor's name to the usual one.
      unused: Pattern of tensors that the model does without, in the names of the bare model. They are lost:
        what :func:`save` writes lacks them (an encoder's pooler, a head for masked words).
      fresh: Pattern of paths of weights that are initialized, whatever the checkpoint holds (a new head).
      optional: Pattern of paths of weights that are initialized where the checkpoint lacks all of their tensors.
      seed: Of the initialized weights.
      rules: Weights to quantize as they come, for :func:`lora_jax.quantize`. They do so layer by layer where layers are
        stacked: beside the codes no more than one layer's weight is held in floats.
      example: Arguments of a call of the model, which is traced for `rules`; shapes will do.
      copies: Tensors that start as copies of others where the checkpoint lacks them: a head that is untied.

    Raises:
      UserError: Files are missing or damaged, or any tensors are missing, unexpected or of another shape:
        all of them are named at once.
    """
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    plan = None
    if rules:
        apply, shapes = lora.nnx.functional(abstract)
        plan = Plan.of(shapes, rules, apply, *example)
    graph, params, _ = nnx.split(abstract, nnx.Param, ...)
    wanted = {"/".join(map(str, path)): variable for path, variable in nnx.to_flat_state(params)}
    shardings = {
        path: None if sharding is None else sharding(path, variable.get_value().shape)
        for path, variable in wanted.items()
    }
    values: dict[str, Any] = {}
    try:
        with peft.Tensors(peft.model_files(directory)) as tensors:
            if eight := [name for name in tensors if tensors.dtype(name).startswith("F8")]:
                raise UserError(
                    f"{tensors.file_of(eight[0])}: {eight[0]} is stored in FP8 ({tensors.dtype(eight[0])}), as are "
                    f"{len(eight) - 1} other tensors; FP8 is not supported yet: take the model's bfloat16 weights"
                )
            places = {path: names.find(path, variable.get_value().shape) for path, variable in wanted.items()}
            stored = _Stored(tensors, names.prefix, spellings, copies or {})
            new = {
                path
                for path, place in places.items()
                if re.search(fresh, path) or (re.search(optional, path) and not stored.any_of(place))
            }
            read = [place for path, place in places.items() if path not in new]
            stored.check(directory, read, {name for path in new for name in places[path].tensors}, unused)
            for place in read:
                # waited for: copies under way would keep one part after another in the host's memory
                values[place.path] = jax.block_until_ready(stored.leaf(place, dtype, shardings[place.path], plan))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None

    # What is not read is computed: random state, new weights. The compiler drops all other initial weights.
    def initial() -> tuple[Any, dict[str, jax.Array]]:
        made, others = nnx.state(build(nnx.Rngs(seed)), nnx.Param, ...)
        flat = {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(made)}
        return others, {path: flat[path].astype(dtype or flat[path].dtype) for path in new}

    others, made = jax.jit(initial, out_shardings=(None, {path: shardings[path] for path in new}))()
    values |= made
    flat = [(path, variable.replace(values["/".join(map(str, path))])) for path, variable in nnx.to_flat_state(params)]
    return nnx.merge(graph, nnx.from_flat_state(flat), others)


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
    """Writes parameters in Hugging Face layout, so that transformers opens them.

    All is written beside the directory, which then appears whole or, after an error, not at all.

    Args:
      directory: New, or empty.
      base: The parameters, `lora.merge(base, delta)` for one; every array within reach of this process.
      names: Of the weights in the checkpoint.
      config: The content of `config.json`, written as it is.
      tokenizer: A directory whose tokenizer files are copied.
      bare: The names are those of a checkpoint of the bare model, without what `names.prefix` says.
      shard_bytes: The largest size of a file.

    Raises:
      UserError: The directory holds something already or cannot be written, or a parameter has no name.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: holds files already")
    try:
        with replace_directory(directory, "config.json", what="checkpoint", owns=lambda entry: False) as fresh:
            peft.write_model(fresh, _tensors_of(base, names, bare), shard_bytes=shard_bytes)
            (fresh / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n", encoding="utf-8")
            for file in [tokenizer / name for name in _COPIED] if tokenizer else ():
                if file.is_file():
                    shutil.copyfile(file, fresh / file.name)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error})") from None
    except ValueError as error:
        raise UserError(str(error)) from None


def _tensors_of(base: Any, names: peft.Names, bare: bool) -> Iterator[tuple[str, np.ndarray]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(base):
        place = names.find("/".join(str(key.key) for key in path), leaf.shape)
        for name, tensor in place.split(np.asarray(leaf)).items():
            yield name.removeprefix(names.prefix) if bare else name, tensor


def _divides_first(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> bool:
    """Whether a sharding divides the first axis."""
    return sharding.shard_shape(shape)[0] != shape[0]


class _Stored:
    """The tensors of a checkpoint under their usual names, less the prefix of a bare model's names."""

    def __init__(
        self, tensors: peft.Tensors, prefix: str, spellings: Sequence[tuple[str, str]], copies: Mapping[str, str]
    ):
        self._tensors = tensors
        self._prefix = prefix
        self._names: dict[str, str] = {}  # usual name -> name in the file
        for name in tensors:
            usual = name
            for pattern, replacement in spellings:
                usual = re.sub(pattern, replacement, usual)
            usual = usual.removeprefix(prefix)
            if usual in self._names:
                raise UserError(f"{tensors.file_of(name)}: {name} and {self._names[usual]} are the same weight")
            self._names[usual] = name
        for name, like in copies.items():
            if (like := like.removeprefix(prefix)) in self._names:
                self._names.setdefault(name.removeprefix(prefix), self._names[like])
        self._quantized = bitsandbytes_tensors(self._names)

    def any_of(self, place: peft.Binding) -> bool:
        """Whether one of the weight's tensors is there."""
        return any(name.removeprefix(self._prefix) in self._names for name in place.tensors)

    def leaf(self, place: peft.Binding, dtype: Any, sharding: jax.sharding.Sharding | None, plan: Plan | None) -> Any:
        """The weight on its devices, quantized where the checkpoint or the plan has it so."""
        if any(name.removeprefix(self._prefix) in self._quantized for name in place.tensors):
            if plan is not None and place.path in plan.chosen:
                raise UserError(f"{place.path}: to be quantized, and quantized in the checkpoint already")
            leaf = self._quantized_leaf(place, dtype)
            if leaf.shape != place.shape:
                raise UserError(f"{place.path}: is {leaf.shape} in the checkpoint, the model wants {place.shape}")
            return leaf if sharding is None else jax.device_put(leaf, shardings(leaf, sharding))
        if plan is None or place.path not in plan.chosen:
            return self._placed(place, dtype, sharding, slice(None))
        by_layer = bool(place.stacked) and (sharding is None or not _divides_first(sharding, place.shape))
        layers = [slice(i, i + 1) for i in range(place.shape[0])] if by_layer else [slice(None)]
        parts = [jax.block_until_ready(plan(place.path, self._placed(place, dtype, sharding, at))) for at in layers]
        return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if by_layer else parts[0]

    def _quantized_leaf(self, place: peft.Binding, dtype: Any) -> Any:
        """A weight that is quantized in the checkpoint, with its codes."""
        if (place.weight.layout != peft.LINEAR and place.weight.module != "conv1d") or len(place.stacked) > 1:
            raise UserError(f"{place.path}: quantized in the checkpoint, which is read of linear layers only")
        leaves = []
        for name in place.tensors:
            usual = name.removeprefix(self._prefix)
            if usual not in self._quantized:
                raise UserError(f"{name}: not quantized, and other layers of {place.path} are: unroll the layers")
            tensors = {part: self._tensors.read(self._names[part]) for part in self._quantized[usual]}
            leaf = from_bitsandbytes(tensors)[usual]
            leaves.append(dataclasses.replace(leaf, dtype=np.dtype(dtype or leaf.dtype)))
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves) if place.stacked else leaves[0]

    def _placed(
        self, place: peft.Binding, dtype: Any, sharding: jax.sharding.Sharding | None, layers: slice
    ) -> jax.Array:
        """The weight, or these of its leading entries, on its devices."""
        dtype = jnp.dtype(dtype or self._dtype(place))
        first, last, _ = layers.indices(place.shape[0] if place.shape else 0)
        shape = (last - first, *place.shape[1:]) if place.shape else ()
        window = (layers, *(slice(None) for _ in place.shape[1:])) if place.shape else None
        if sharding is None:
            return jax.device_put(place.join(self._read, dtype, window))
        sharing: dict[tuple, list[jax.Device]] = {}
        for device, part in sharding.addressable_devices_indices_map(shape).items():
            sharing.setdefault(tuple(axis.indices(n)[:2] for axis, n in zip(part or (), shape)), []).append(device)
        arrays = []
        for part, devices in sharing.items():
            limits = [(start + first, stop + first) for start, stop in part[:1]] + list(part[1:])
            values = place.join(self._read, dtype, tuple(slice(*limit) for limit in limits))
            for device in devices:
                where = jax.sharding.SingleDeviceSharding(device, memory_kind=sharding.memory_kind)
                arrays.append(jax.device_put(values, where))
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _dtype(self, place: peft.Binding) -> np.dtype:
        """The dtype of the weight's first tensor."""
        return self._read(next(iter(place.tensors)), tuple(slice(0, 0) for _ in place.tensor_axes)).dtype

    def _read(self, name: str, part: tuple[slice, ...]) -> np.ndarray:
        return self._tensors.read(self._names[name.removeprefix(self._prefix)], part)

    def check(self, directory: Path, places: Sequence[peft.Binding], replaced: set[str], unused: str) -> None:
        """Compares names and shapes; every difference is reported at once."""
        wanted = {name.removeprefix(self._prefix): shape for place in places for name, shape in place.shapes.items()}
        expected = wanted.keys() | {name.removeprefix(self._prefix) for place in places for name in place.tied}
        expected |= {name.removeprefix(self._prefix) for name in replaced}
        parts = {part for weight, parts in self._quantized.items() for part in parts if part != weight}
        available = {name: self._tensors[stored] for name, stored in self._names.items() if name not in parts}
        # What is packed has a shape of its own; that of the weight is compared when it is read.
        available |= {name: wanted.get(name, available[name]) for name in self._quantized if name in available}
        problems = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in available]
        problems += [
            f"unexpected: {name} {available[name]}"
            for name in sorted(available.keys() - expected)
            if not re.search(unused, name)
        ]
        problems += [
            f"shape: {name} is {available[name]}, the model wants {shape}"
            for name, shape in wanted.items()
            if name in available and available[name] != shape
        ]
        if problems:
            more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
            listed = "\n  ".join([*problems[:_LISTED], *more])
            raise UserError(f"{directory}: the weights do not fit the model ({len(problems)} problems):\n  {listed}")
