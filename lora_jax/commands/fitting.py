"""A checkpoint's tensors as the base of an adapter: which of them it adapts, and what their axes are."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.commands.factor_shapes import factor_shapes, parameters_of, parse_keys
from lora_jax.commands.leaves import Kind, LazyTensor, leaf_path, make_names
from lora_jax.commands.module_kinds import CONV1D_MODELS, MatrixKinds, parameter_kinds
from lora_jax.commands.tied_heads import find_tied, split_untied
from lora_jax.peft import experts, keys, mlx_experts, renames, ties
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.methods import METHODS, method_in
from lora_jax.peft.methods.loading import NORMS, find_parts
from lora_jax.peft.names import Fused, Names
from lora_jax.peft.opening import adapter_files, is_mlx, open_adapter
from lora_jax.peft.tensors import FLOATS, Tensors


class Fitting(NamedTuple):
    """A checkpoint as the base of an adapter.

    Attributes:
      base: The tensors as leaves.
      names: The table of their names.
      untied: Heads that the checkpoint does not store and that get their own leaves: by name, the embedding that
        provides the values, and why the adapter makes the two different weights.
    """

    base: dict[str, Any]
    names: Names
    untied: dict[str, tuple[str, str]]


def fit_checkpoint(
    checkpoint: Tensors, directory: Path, model: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> Fitting:
    """Makes the base of an adapter from a checkpoint's tensors.

    Args:
      checkpoint: The checkpoint's open tensors.
      directory: The adapter's directory.
      model: The content of the checkpoint's `config.json`, which defines axes that shapes do not, and tied weights.
      ignore: Tensors of the adapter to ignore; see :class:`Tensors`.

    Raises:
      ValueError: The adapter's files are missing or damaged, or its factors are inconsistent; a weight with factors is
        quantized; or the axes of a square weight are ambiguous.
    """
    if (kind := method_in(directory)) is not None:
        return _fit_method(checkpoint, directory, kind, model or {}, ignore)
    return _fit_lora(checkpoint, directory, model or {}, ignore)


def _fit_lora(checkpoint: Tensors, directory: Path, model: Mapping[str, Any], ignore: Sequence[str]) -> Fitting:
    model_type = str(model.get("model_type") or "")
    shapes = {name: checkpoint[name] for name in checkpoint}
    with open_adapter(directory, ignore, [keys.split_name(name)[0] for name in shapes]) as (config, tensors):
        parsed = parse_keys(tensors)
        renamed = {new: name for name in shapes for new in renames.model_names(name)}
        modules = {keys.split_name(name)[0] for name in (*shapes, *renamed)}
        prefix = _find_prefix(modules, {key.module for key in parsed})
        in_files = {new.removeprefix(prefix): name for new, name in renamed.items()}
        in_files |= {name.removeprefix(prefix): name for name in shapes}
        matrices = MatrixKinds(config, model_type)
        kinds: dict[str, Kind] = {}
        order: list[str] = []
        fused: list[Fused] = []
        for (module, embedding), levels in factor_shapes(tensors, parsed).items():
            module = module.removeprefix(prefix)
            weights = {f"{module}.{p}": in_files[f"{module}.{p}"] for p in parameters_of(module, config, in_files)}
            if weights:
                weight_shapes = {name: shapes[file_name] for name, file_name in weights.items()}
                weight_kinds = parameter_kinds(weight_shapes, levels, config, model_type)
                kinds |= {weights[name]: kind for name, kind in weight_kinds.items()}
                order += [weights[name] for name in weight_kinds]
            else:
                fused += experts.find_fused(module, parameters_of(module, config), in_files)
                if (name := in_files.get(f"{module}.weight")) and len(levels) == 1:
                    kinds[name] = "embedding" if embedding else matrices.kind(name, shapes[name], *levels[0])
            adapted = list(weights.values()) or [in_files.get(f"{module}.{x}") for x in ("weight", "qweight")]
            _check_floats(checkpoint, [name for name in adapted if name])
        if is_mlx(directory):
            fused += mlx_experts.find_fused(keys.split_name(name)[0] for name in kinds)
        kinds |= matrices.square_kinds()
        fused_parts = experts.find_parts(Names((), fused=tuple(fused)), shapes)
        expert_weights = [name for parts in fused_parts.values() for name, _ in parts]
        _check_floats(checkpoint, expert_weights)
        kinds.update((name, "linear") for name in expert_weights)
        for key in parsed:
            if key.part == "rows" and (name := in_files.get(f"{key.module.removeprefix(prefix)}.weight")):
                kinds[name] = "embedding"
        heads = {x: head for x in shapes if (head := ties.tied_head(x, model, config.task_type))}
        heads |= find_tied({key: tensors[key.key] for key in parsed}, in_files, shapes, kinds, prefix)
        not_stored = {table: head for table, head in heads.items() if head not in shapes}
        tied, untied = split_untied(not_stored, parsed, config, tensors, prefix)
    kinds.update((head, untied_head.kind) for head, untied_head in untied.items())
    shapes = {name: shapes[name] for name in dict.fromkeys((*order, *shapes))}
    base = _lazy_leaves(checkpoint, shapes)
    base |= {leaf_path(head): base[leaf_path(untied_head.table)] for head, untied_head in untied.items()}
    in_model = {in_files.get(name.removeprefix(prefix), ""): name for name in _adapted_names(parsed, config)}
    names = make_names([*shapes, *untied], kinds, tied, prefix, in_model)
    reasons = {head: (untied_head.table, untied_head.reason) for head, untied_head in untied.items()}
    return Fitting(base, dataclasses.replace(names, fused=tuple(fused)), reasons)


def _fit_method(
    checkpoint: Tensors, directory: Path, kind: str, model: Mapping[str, Any], ignore: Sequence[str]
) -> Fitting:
    """:func:`fit_checkpoint` for methods other than LoRA."""
    with adapter_files(directory, ignore) as tensors:
        stored = [key.removeprefix(keys.PREFIX) for key in tensors if key.startswith(keys.PREFIX)]
        modules = {key.rpartition(".")[0] for key in stored}
        if kind in METHODS:
            adapted = set(find_parts(tensors, METHODS[kind].parts))
        else:
            adapted = {key.removeprefix(keys.PREFIX).partition(NORMS)[0] for key in tensors if NORMS in key}
    shapes = {name: checkpoint[name] for name in checkpoint}
    prefix = _find_prefix({keys.split_name(name)[0] for name in shapes}, adapted | modules)
    matrix: Kind = "conv1d" if model.get("model_type") in CONV1D_MODELS else "linear"
    kinds: dict[str, Kind] = {}
    for module in adapted:
        name = next((n for n in (f"{module}.weight", f"{prefix}{module}.weight") if n in shapes), None)
        name = name or f"{module.removeprefix(prefix)}.weight"
        if name in shapes and len(shapes[name]) > 1:
            kinds[name] = matrix if len(shapes[name]) == 2 else "conv"
    return Fitting(_lazy_leaves(checkpoint, shapes), make_names(shapes, kinds, {}, prefix), {})


def _lazy_leaves(checkpoint: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        leaf_path(name): LazyTensor(shape, lambda name=name: checkpoint.read(name)) for name, shape in shapes.items()
    }


def _adapted_names(parsed: Iterable[Key], config: Config) -> Iterator[str]:
    """Yields the adapter's names of the tensors that it may change."""
    for key in parsed:
        if key.part == "value":
            yield key.name
        elif parameters := parameters_of(key.module, config):
            yield from (f"{key.module}.{parameter}" for parameter in parameters)
        else:
            yield from (f"{key.module}.{parameter}" for parameter in ("weight", "in_proj_weight", "bias"))


def _find_prefix(modules: set[str], adapted: set[str]) -> str:
    """Returns the prefix that either the checkpoint's modules or the adapter's have in addition ('bert.')."""
    votes = collections.Counter({"": len(modules & adapted)})
    for one, other in ((modules, adapted), (adapted, modules)):
        for module in one:
            segments = module.split(".")
            for count in range(1, min(4, len(segments))):
                if ".".join(segments[count:]) in other:
                    votes[".".join(segments[:count]) + "."] += 1
    return max(votes, key=lambda prefix: (votes[prefix], not prefix))


def _check_floats(checkpoint: Tensors, names: Iterable[str]) -> None:
    for name in names:
        if checkpoint.dtype(name) not in FLOATS:
            raise ValueError(
                f"{checkpoint.file_of(name)}: {name!r} is quantized (stored as {checkpoint.dtype(name)}); an adapter "
                "fits the original floats, not these."
            )
