"""A checkpoint's tensors as leaves for an adapter: which of them it adapts, and what their axes are."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.commands.layout import (
    Kind,
    Levels,
    Shape,
    Stored,
    factor_shapes,
    leaf_path,
    parameters_of,
    parsed_keys,
    table_of,
)
from lora_jax.peft import experts, keys, renames, ties
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.names import Fused, Names
from lora_jax.peft.opening import is_mlx, opened
from lora_jax.peft.tensors import FLOATS, Tensors
from lora_jax.peft.view import View

# What transformers' models do with a square tensor, where its shape does not tell.
CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_TRANSPOSED_EXPERTS_MODELS = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")


class Fitting(NamedTuple):
    """A checkpoint as an adapter sees it.

    Attributes:
      base: The tensors as leaves.
      names: Where they stand.
      untied: Heads that the checkpoint does not store, as leaves of their own: by name, the table whose values each
        has, and why the adapter does not leave the two one weight.
    """

    base: dict[str, Any]
    names: Names
    untied: dict[str, tuple[str, str]]


def of_checkpoint(
    checkpoint: Tensors, directory: Path, model: Mapping[str, Any] | None = None, ignore: Sequence[str] = ()
) -> Fitting:
    """A checkpoint's tensors as leaves for an adapter.

    Args:
      checkpoint: Open.
      directory: The adapter's.
      model: The content of the checkpoint's `config.json`: tells axes where shapes do not, and which weights are tied.
      ignore: Tensors of the adapter that are passed over; see :class:`Tensors`.

    Raises:
      ValueError: As :func:`of_adapter`; a weight with factors is quantized; or what a square weight's axes are
        cannot be told.
    """
    model = model or {}
    model_type = str(model.get("model_type") or "")
    shapes = {name: checkpoint[name] for name in checkpoint}
    with opened(directory, ignore, [keys.split_name(name)[0] for name in shapes]) as (config, tensors):
        parsed = parsed_keys(tensors)
        factors = factor_shapes(tensors, parsed)
        sizes = {key: tensors[key.key] for key in parsed}
        renamed = {new: name for name in shapes for new in renames.running(name)}
        modules = {keys.split_name(name)[0] for name in (*shapes, *renamed)}
        prefix = prefix_of(modules, {key.module for key in parsed})
        bare = {new.removeprefix(prefix): name for new, name in renamed.items()}
        bare |= {name.removeprefix(prefix): name for name in shapes}
        square = _Squares(config, model_type)
        kinds: dict[str, Kind] = {}
        order: list[str] = []
        fused: list[Fused] = []
        for (module, embedding), levels in factors.items():
            module = module.removeprefix(prefix)
            parameters = {f"{module}.{p}": shapes[bare[f"{module}.{p}"]] for p in parameters_of(module, config, bare)}
            fused += experts.of_checkpoint(module, parameters_of(module, config), bare) if not parameters else []
            if parameters:
                parameter_kinds = _parameter_kinds(parameters, levels, config, model_type)
                kinds |= {bare[name]: kind for name, kind in parameter_kinds.items()}
                order += [bare[name] for name in parameter_kinds]
            elif (name := bare.get(f"{module}.weight")) and len(levels) == 1:
                kinds[name] = "embedding" if embedding else square.kind(name, shapes[name], *levels[0])
            adapted = [bare[name] for name in parameters] or [bare.get(f"{module}.{x}") for x in ("weight", "qweight")]
            _check_floats(checkpoint, [name for name in adapted if name])
        if is_mlx(directory):
            fused += experts.of_matrices(keys.split_name(name)[0] for name in kinds)
        kinds |= square.kinds()
        of_experts = [x for parts in experts.shares(Names((), fused=tuple(fused)), shapes).values() for x, _ in parts]
        _check_floats(checkpoint, of_experts)
        kinds.update((name, "linear") for name in of_experts)
        for key in parsed:
            if key.part == "rows" and (name := bare.get(f"{key.module.removeprefix(prefix)}.weight")):
                kinds[name] = "embedding"
        heads = _tied(sizes, bare, shapes, kinds, prefix)
        heads = {x: head for x in shapes if (head := ties.tied_head(x, model, config.task_type))} | heads
        tied, untied = _parted(
            {x: head for x, head in heads.items() if head not in shapes}, parsed, config, tensors, prefix
        )
    kinds.update((head, kind) for head, (_, _, kind) in untied.items())
    shapes = {name: shapes[name] for name in dict.fromkeys((*order, *shapes))}
    base = {leaf_path(name): Stored(shape, lambda name=name: checkpoint.read(name)) for name, shape in shapes.items()}
    base |= {leaf_path(head): base[leaf_path(table)] for head, (table, _, _) in untied.items()}
    adapter_names = {bare.get(name.removeprefix(prefix), ""): name for name in _adapted(parsed, config)}
    names = table_of([*shapes, *untied], kinds, tied, prefix, adapter_names)
    untied = {head: (table, why) for head, (table, why, _) in untied.items()}
    return Fitting(base, dataclasses.replace(names, fused=tuple(fused)), untied)


def _parted(
    heads: Mapping[str, str], parsed: Iterable[Key], config: Config, tensors: Tensors | View, prefix: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, str, Kind]]]:
    """Of embeddings that are their model's heads too, those that an adapter leaves so, and those that it does not.

    Args:
      heads: By the embedding's tensor, the head's, which the checkpoint does not store.
      parsed: The adapter's keys.
      config: Its config.
      tensors: Its tensors, open.
      prefix: Of names on one side alone.

    Returns:
      By the embedding's tensor, the heads that are the same weight; by the head's tensor, the embedding's, why they are
      two weights, and what the head is.
    """
    by_module: dict[str, list[Key]] = collections.defaultdict(list)
    for key in parsed:
        by_module[key.module.removeprefix(prefix)].append(key)
    tied: dict[str, tuple[str, ...]] = {}
    untied: dict[str, tuple[str, str, Kind]] = {}
    for table, head in heads.items():
        one, other = (by_module.get(_module(name, prefix), []) for name in (table, head))
        if why := ties.parted(one, other, config, tensors):
            untied[head] = table, why, "embedding" if any(key.part == "rows" for key in other) else "linear"
        elif one or other:
            tied[table] = (head,)
    return tied, untied


def _adapted(parsed: Iterable[Key], config: Config) -> Iterator[str]:
    """The names of the tensors that an adapter changes, as it has them."""
    for key in parsed:
        if key.part == "value":
            yield key.name
        elif parameters := parameters_of(key.module, config):
            yield from (f"{key.module}.{parameter}" for parameter in parameters)
        else:
            yield from (f"{key.module}.{parameter}" for parameter in ("weight", "in_proj_weight", "bias"))


def _module(name: str, prefix: str) -> str:
    """The module of a tensor, without a prefix."""
    return keys.split_name(name.removeprefix(prefix))[0]


class _Squares:
    """Which matrices are `in × out`, as GPT-2's: shapes tell of most, these of the square ones.

    The config has one `fan_in_fan_out` for all modules: that of the last one, where there are both kinds.
    """

    def __init__(self, config: Config, model_type: str):
        self._flag = config.fan_in_fan_out
        self._conv1d_model = model_type in CONV1D_MODELS
        self._open: list[str] = []
        self._told: dict[str, set[Kind]] = collections.defaultdict(set)

    def kind(self, name: str, shape: Shape, a: Shape, b: Shape) -> Kind:
        """What the module of a weight is; square ones are told later."""
        if len(shape) != 2:
            return "conv"
        if shape == (b[0], a[1]) == (a[1], b[0]):
            self._open.append(name)
            return "linear"
        kind: Kind = "conv1d" if shape == (a[1], b[0]) else "linear"
        self._told[_last(name)].add(kind)
        return kind

    def kinds(self) -> dict[str, Kind]:
        """What the modules of the square weights are."""
        stated: Kind = "conv1d" if self._flag else "linear"
        elsewhere = set().union(*self._told.values())
        kinds: dict[str, Kind] = {}
        for name in self._open:
            alike = self._told.get(_last(name), set())
            if len(alike) == 1:
                (kinds[name],) = alike
            elif self._conv1d_model and re.search(r"\.\d+\.", name):
                kinds[name] = "conv1d"
            elif elsewhere - {stated}:
                raise ValueError(
                    f"{name!r} is square, and whether it is stored in × out or out × in cannot be told: the adapter's "
                    "config says one of them for all modules, and there are both (the model_type of the base's "
                    "config.json would tell)."
                )
            else:
                kinds[name] = stated
        return kinds


def _last(name: str) -> str:
    return keys.split_name(name)[0].rpartition(".")[2]


def _parameter_kinds(shapes: dict[str, Shape], levels: Levels, config: Config, model_type: str) -> dict[str, Kind]:
    """The kinds of one module's parameters, in the module's order: the one order that the shapes allow.

    Whether experts are stored `in × out` is one answer for all parameters of a module.
    """
    fitting: dict[tuple[tuple[str, Kind], ...], bool] = {}
    if len(levels) == len(shapes):
        for transposed, order in itertools.product((False, True), itertools.permutations(shapes)):
            pairs = zip(order, reversed(levels))
            kinds = {name: _parameter_kind(shapes[name], a, b, config.rank(name), transposed) for name, (a, b) in pairs}
            if all(kinds.values()):
                fitting.setdefault(tuple(kinds.items()), transposed)
    if len(set(fitting.values())) > 1 and model_type:
        expected = model_type in _TRANSPOSED_EXPERTS_MODELS
        fitting = {kinds: transposed for kinds, transposed in fitting.items() if transposed == expected}
    if len(fitting) == 1:
        return dict(*fitting)
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if not fitting:
        factors = ", ".join(f"A {a} and B {b}" for a, b in levels)
        raise ValueError(f"{listed}: no order of these parameters fits the adapter's factors {factors}.")
    hint = "" if model_type else " (the model_type of the base's config.json might tell)"
    raise ValueError(f"{listed}: these parameters fit the adapter's factors in more than one way{hint}.")


def _parameter_kind(shape: Shape, a: Shape, b: Shape, rank: int, transposed: bool) -> Kind:
    """What a parameter is, if factors of these shapes are for it."""
    if len(shape) == 2:
        return "linear" if shape == (b[0], a[1]) and a[0] == rank else ""
    if len(shape) != 3 or a[0] != rank * shape[0] or b[1] != rank * shape[0]:
        return ""
    if transposed:
        return "transposed_experts" if shape[1:] == (a[1], b[0]) else ""
    return "experts" if shape[1:] == (b[0], a[1]) else ""


def prefix_of(modules: set[str], adapted: set[str]) -> str:
    """What the checkpoint's modules or the adapter's have in front of the others' ('bert.')."""
    votes = collections.Counter({"": len(modules & adapted)})
    for one, other in ((modules, adapted), (adapted, modules)):
        for module in one:
            segments = module.split(".")
            for count in range(1, min(4, len(segments))):
                if ".".join(segments[count:]) in other:
                    votes[".".join(segments[:count]) + "."] += 1
    return max(votes, key=lambda prefix: (votes[prefix], not prefix))


def _tied(
    sizes: Mapping[Key, Shape],
    bare: Mapping[str, str],
    shapes: Mapping[str, Shape],
    kinds: Mapping[str, Kind],
    prefix: str,
) -> dict[str, str]:
    """Weights of the adapter that a checkpoint stores once, under the name of an embedding: tied heads, by table."""
    tied: dict[str, str] = {}
    wanted: dict[str, list[Shape]] = collections.defaultdict(list)
    for key, shape in sizes.items():
        name = f"{key.module.removeprefix(prefix)}.weight"
        if name not in bare and not key.embedding and (key.part in ("a", "b") or key.name == f"{key.module}.weight"):
            wanted[name].append(shape)
    tables: dict[Shape, list[str]] = collections.defaultdict(list)
    if wanted:
        for name, shape in shapes.items():
            if kinds.get(name) == "embedding" or re.search(r"emb|wte|shared", _last(name)):
                tables[shape].append(name)
    for name, needed in wanted.items():
        # Of factors (r, in) and (out, r), in either order; or of the whole weight.
        fitting = {
            x for x in tables if x in needed or any(a and b and (b[0], a[-1]) == x for a in needed for b in needed)
        }
        candidates = [table for shape in fitting for table in tables[shape]]
        chosen = [x for x in candidates if kinds.get(x) == "embedding"] or candidates
        if len(chosen) == 1 and not re.search(r"\.\d+\.", name):
            tied[chosen[0]] = name
    return tied


def _check_floats(checkpoint: Tensors, names: Iterable[str]) -> None:
    for name in names:
        if checkpoint.dtype(name) not in FLOATS:
            raise ValueError(
                f"{checkpoint.file_of(name)}: {name!r} is quantized (stored as {checkpoint.dtype(name)}); an adapter "
                "fits the original floats, not these."
            )
