"""Names for PyTorch's own tensors: leaves that are the tensors of a checkpoint, or of an adapter, as they are."""

import collections
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lora_jax.peft import experts, keys, renames, ties
from lora_jax.peft.config import CONFIG, Config
from lora_jax.peft.keys import ADAPTER, Key
from lora_jax.peft.names import Fused, Module, Names, Weight
from lora_jax.peft.tensors import FLOATS, Tensors, absent, pickle_beside

Shape = tuple[int, ...]
Levels = list[tuple[Shape, Shape]]
"""The shapes of a module's factors: one pair, or one for each of its parameters, the outermost wrapper's first."""
Kind = Module | Literal[""]

# What transformers' models do with a square tensor, where its shape does not tell.
_CONV1D_MODELS = ("clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")
_TRANSPOSED_EXPERTS_MODELS = ("aria", "aria_text", "gpt_oss", "openai_privacy_filter")


def located(directory: Path) -> Path:
    """The directory that holds an adapter: this one, or the one that is inside (`default/`, `checkpoint-500/`).

    Raises:
      ValueError: Several are inside.
    """
    if (directory / CONFIG).exists() or (directory / CONFIG).is_symlink():
        return directory
    inside = sorted(path.parent for path in directory.glob(f"*/{CONFIG}"))
    inside = inside or sorted(path.parent for path in directory.glob(f"*/*/{CONFIG}"))
    if len(inside) > 1:
        listed = ", ".join(str(path.relative_to(directory)) for path in inside[:_LISTED])
        more = f" and {len(inside) - _LISTED} more" if len(inside) > _LISTED else ""
        raise ValueError(f"{directory}: holds {len(inside)} adapters ({listed}{more}); name one of them.")
    return inside[0] if inside else directory


_LISTED = 8


def adapter_tensors(directory: Path, ignore: Sequence[str] = ()) -> Tensors:
    """The tensors of an adapter directory.

    Args:
      directory: The adapter's.
      ignore: Tensors that are passed over; see :class:`Tensors`.

    Raises:
      ValueError: It has none in safetensors.
    """
    if not (directory / ADAPTER).is_file():
        raise ValueError(f"{absent(directory / ADAPTER).removesuffix('.')}{pickle_beside(directory)}.")
    return Tensors([directory / ADAPTER], ignore)


def of_adapter(directory: Path, ignore: Sequence[str] = ()) -> tuple[dict[str, Any], Names]:
    """The weights that an adapter is for, as far as it tells: their names, and shapes in PyTorch's layout.

    A matrix that PEFT stores beside the factors (see :func:`copies`) is taken for the base's own.

    Raises:
      ValueError: The adapter's files are missing or damaged, or its factors do not go together.
    """
    config = Config.read(directory)
    shapes: dict[str, Shape] = {}
    kinds: dict[str, Kind] = {}
    stored: dict[str, Stored] = {}
    with adapter_tensors(directory, ignore) as tensors:
        parsed = _parsed(tensors)
        wrapped = {parent for key in parsed for parent in keys.wrapped_parents(key.key)}
        for (module, embedding), levels in _factors(tensors, parsed).items():
            for name, (a, b) in _named(module, levels, config, module in wrapped).items():
                kinds[name], shapes[name] = _weight(config, name, a, b, embedding)
        for key in parsed:
            if key.part == "value" and key.name not in shapes:
                shapes[key.name] = tensors[key.key]
            elif key.part == "rows" and f"{key.module}.weight" not in shapes:
                ids = [i for i in config.tokens(key.module) or () if isinstance(i, int)]
                shapes[f"{key.module}.weight"] = (max(ids, default=0) + 1, *tensors[key.key][1:])
                kinds[f"{key.module}.weight"] = "embedding"
            elif key.part == "b_bias":
                shapes.setdefault(f"{key.module}.bias", tensors[key.key])
        for key in _copies(parsed, config):
            stored[key.name] = Stored(tensors[key.key], lambda key=key: _read(directory, key))
        tied = _twins(parsed, kinds, config, tensors) if config.ensure_weight_tying else {}
    base = {
        leaf_path(name): stored.get(name, jax.ShapeDtypeStruct(shape, np.float32))
        for name, shape in shapes.items()
        if (name,) not in tied.values()
    }
    return base, _names(shapes, kinds, tied)


def _twins(
    parsed: Iterable[Key], kinds: Mapping[str, Kind], config: Config, tensors: Tensors
) -> dict[str, tuple[str, ...]]:
    """Embeddings, and the heads that the adapter changes in the same way."""
    by_module: dict[str, list[Key]] = collections.defaultdict(list)
    for key in parsed:
        by_module[key.module].append(key)
    return {
        table: (f"{head}.weight",)
        for table, kind in kinds.items()
        for head in by_module
        if kind == "embedding" and kinds.get(f"{head}.weight") == "linear" and not re.search(r"\.\d+\.", head)
        if not ties.parted(by_module[keys.split_name(table)[0]], by_module[head], config, tensors)
    }


def copies(directory: Path, ignore: Sequence[str] = ()) -> list[str]:
    """The weights that an adapter holds whole, although its config does not say that they were trained.

    PEFT stores embeddings so, where they have factors or the vocabulary may have grown; only the base tells
    whether they changed.
    """
    config = Config.read(directory)
    with adapter_tensors(directory, ignore) as tensors:
        return [key.name for key in _copies(_parsed(tensors), config)]


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
      ValueError: As :func:`of_adapter`; a weight with factors is quantised; or what a square weight's axes are
        cannot be told.
    """
    config, model = Config.read(directory), model or {}
    model_type = str(model.get("model_type") or "")
    shapes = {name: checkpoint[name] for name in checkpoint}
    with adapter_tensors(directory, ignore) as tensors:
        parsed = _parsed(tensors)
        factors = _factors(tensors, parsed)
        sizes = {key: tensors[key.key] for key in parsed}
        renamed = {new: name for name in shapes for new in renames.running(name)}
        known = {keys.split_name(name)[0] for name in (*shapes, *renamed)}
        prefix = _prefix(known, {key.module for key in parsed})
        bare = {new.removeprefix(prefix): name for new, name in renamed.items()}
        bare |= {name.removeprefix(prefix): name for name in shapes}
        square = _Squares(config, model_type)
        kinds: dict[str, Kind] = {}
        order: list[str] = []
        fused: list[Fused] = []
        for (module, embedding), levels in factors.items():
            module = module.removeprefix(prefix)
            own = {f"{module}.{p}": shapes[bare[f"{module}.{p}"]] for p in _parameters(module, config, bare)}
            fused += experts.of_checkpoint(module, _parameters(module, config), bare) if not own else []
            if own:
                found = _parameter_kinds(own, levels, config, model_type)
                kinds |= {bare[name]: kind for name, kind in found.items()}
                order += [bare[name] for name in found]
            elif (name := bare.get(f"{module}.weight")) and len(levels) == 1:
                kinds[name] = "embedding" if embedding else square.kind(name, shapes[name], *levels[0])
            adapted = [bare[name] for name in own] or [bare.get(f"{module}.{x}") for x in ("weight", "qweight")]
            _check_floats(checkpoint, [name for name in adapted if name])
        kinds |= square.kinds()
        of_experts = [x for parts in experts.shares(Names((), fused=tuple(fused)), shapes).values() for x, _ in parts]
        _check_floats(checkpoint, of_experts)
        kinds.update((name, "linear") for name in of_experts)
        for key in parsed:
            if key.part == "rows" and (name := bare.get(f"{key.module.removeprefix(prefix)}.weight")):
                kinds[name] = "embedding"
        by_module: dict[str, list[Key]] = collections.defaultdict(list)
        for key in parsed:
            by_module[key.module.removeprefix(prefix)].append(key)
        heads = _tied(sizes, bare, shapes, kinds, prefix)
        for name in shapes:
            head = ties.tied_head(name, model, config.task_type)
            if name not in heads and head is not None and head not in shapes:
                heads |= {name: head} if {_module(name, prefix), _module(head, prefix)} & by_module.keys() else {}
        tied, untied = {}, {}
        for table, head in heads.items():
            one, other = (by_module[_module(name, prefix)] for name in (table, head))
            if why := ties.parted(one, other, config, tensors):
                untied[head] = table, why
                kinds[head] = "embedding" if any(key.part == "rows" for key in other) else "linear"
            else:
                tied[table] = (head,)
    shapes = {name: shapes[name] for name in dict.fromkeys((*order, *shapes))}
    base = {leaf_path(name): Stored(shape, lambda name=name: checkpoint.read(name)) for name, shape in shapes.items()}
    base |= {leaf_path(head): base[leaf_path(table)] for head, (table, _) in untied.items()}
    own = {bare.get(name.removeprefix(prefix), ""): name for name in _adapted(parsed, config)}
    names = _names([*shapes, *untied], kinds, tied, prefix, own)
    return Fitting(base, dataclasses.replace(names, fused=tuple(fused)), untied)


def _adapted(parsed: Iterable[Key], config: Config) -> Iterator[str]:
    """The names of the tensors that an adapter changes, as it has them."""
    for key in parsed:
        if key.part == "value":
            yield key.name
        elif own := _parameters(key.module, config):
            yield from (f"{key.module}.{parameter}" for parameter in own)
        else:
            yield from (f"{key.module}.{parameter}" for parameter in ("weight", "in_proj_weight", "bias"))


class Stored:
    """A tensor on disk as a leaf, read when its values are asked for."""

    def __init__(self, shape: Shape, read: Callable[[], np.ndarray]):
        self.shape = shape
        self._read = read

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        value = self._read()
        return value if dtype is None else value.astype(dtype)


def leaf_path(name: str) -> str:
    """The path of a tensor's leaf."""
    return name.replace(".", "/")


def _module(name: str, prefix: str) -> str:
    """The module of a tensor, without a prefix."""
    return keys.split_name(name.removeprefix(prefix))[0]


def _names(
    names: Iterable[str],
    kinds: Mapping[str, Kind],
    tied: Mapping[str, tuple[str, ...]],
    prefix: str = "",
    in_model: Mapping[str, str] | None = None,
) -> Names:
    new = in_model or {}
    rows = [
        Weight(leaf_path(x), x, module=kinds.get(x, ""), tied=tied.get(x, ()), in_model=new.get(x, "")) for x in names
    ]
    return Names(tuple(rows), prefix=prefix)


def _parsed(tensors: Tensors) -> list[Key]:
    return [key for name in tensors if not keys.is_repeated(name, tensors) and (key := keys.parse(name))]


def _factors(tensors: Tensors, parsed: Iterable[Key]) -> dict[tuple[str, bool], Levels]:
    """Per module, and whether it is a lookup, the shapes of its factors, the outermost wrapper's first."""
    found: dict[tuple[str, bool], dict[int, dict[str, Shape]]] = {}
    for key in parsed:
        if key.part in ("a", "b"):
            shape = tensors[key.key]
            if len(shape) < 2:
                raise ValueError(f"{tensors.files[0]}: {key.key} has the shape {shape}, expected two axes or more.")
            found.setdefault((key.module, key.embedding), {}).setdefault(key.depth, {})[key.part] = shape
    for (module, embedding), levels in found.items():
        for depth, parts in levels.items():
            if missing := {"a", "b"} - parts.keys():
                key = keys.factor_keys(module, embedding=embedding, depth=depth)[missing.pop()]
                raise ValueError(f"{tensors.files[0]}: {key} is missing beside the other factor of its module.")
    return {at: [(levels[d]["a"], levels[d]["b"]) for d in sorted(levels)] for at, levels in found.items()}


def _copies(parsed: Iterable[Key], config: Config) -> list[Key]:
    """The keys of whole matrices that PEFT stores without being told to."""
    found = [key for key in parsed if key.part == "value" and keys.split_name(key.name)[1] == "weight"]
    return [key for key in found if not any(keys.inside(key.module, entry) for entry in config.modules_to_save)]


def _read(directory: Path, key: Key) -> np.ndarray:
    with adapter_tensors(directory) as tensors:
        return tensors.read(key.key)


def _parameters(module: str, config: Config, known: Iterable[str] | None = None) -> list[str]:
    """The parameters of a module that have factors of their own, as far as can be told in the module's order.

    A target without a module is the parameter of every module that has it.
    """
    targets = [keys.split_name(name) for name in config.target_parameters]
    own = [parameter for outer, parameter in targets if outer and keys.matches(module, [outer])]
    if not own and not config.targets(module):
        own = [parameter for outer, parameter in targets if not outer]
    own = experts.in_order(own)
    return own if known is None else [parameter for parameter in own if f"{module}.{parameter}" in known]


def _named(module: str, levels: Levels, config: Config, wrapped: bool) -> dict[str, tuple[Shape, Shape]]:
    """The weights of a module's factors, by name; those of parameters as the config lists them.

    A module with factors that has modules with factors inside is PyTorch's attention.
    """
    own = _parameters(module, config)
    if len(levels) != max(len(own), 1):
        named = f"names {', '.join(own)}" if own else "names none of its parameters"
        raise ValueError(f"{module}: {len(levels)} pairs of factors, and target_parameters {named}.")
    if not own:
        return {f"{module}.{'in_proj_weight' if wrapped else 'weight'}": levels[0]}
    return {f"{module}.{p}": shapes for p, shapes in zip(own, reversed(levels))}


def _weight(config: Config, name: str, a: Shape, b: Shape, embedding: bool) -> tuple[Kind, Shape]:
    """The kind and the shape of the weight that factors are for."""
    rank = config.rank(name if keys.is_parameter(name) else keys.split_name(name)[0])
    if embedding:
        return "embedding", (a[-1], b[0])
    if len(a) > 2:
        groups = max(1, rank // max(b[1], 1))
        return "conv", (b[0], a[1] // groups, *a[2:])
    if keys.is_parameter(name) and a[0] != rank:
        return "experts", (a[0] // rank, b[0], a[1])
    return ("conv1d", (a[1], b[0])) if config.fan_in_fan_out else ("linear", (b[0], a[1]))


class _Squares:
    """Which matrices are `in × out`, as GPT-2's: shapes tell of most, these of the square ones.

    The config has one `fan_in_fan_out` for all modules: that of the last one, where there are both kinds.
    """

    def __init__(self, config: Config, model_type: str):
        self._flag = config.fan_in_fan_out
        self._conv1d_model = model_type in _CONV1D_MODELS
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
        found: dict[str, Kind] = {}
        for name in self._open:
            alike = self._told.get(_last(name), set())
            if len(alike) == 1:
                (found[name],) = alike
            elif self._conv1d_model and re.search(r"\.\d+\.", name):
                found[name] = "conv1d"
            elif elsewhere - {stated}:
                raise ValueError(
                    f"{name!r} is square, and whether it is stored in × out or out × in cannot be told: the adapter's "
                    "config says one of them for all modules, and there are both (the model_type of the base's "
                    "config.json would tell)."
                )
            else:
                found[name] = stated
        return found


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
        known = model_type in _TRANSPOSED_EXPERTS_MODELS
        fitting = {kinds: transposed for kinds, transposed in fitting.items() if transposed == known}
    if len(fitting) == 1:
        return dict(*fitting)
    listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    if not fitting:
        given = ", ".join(f"A {a} and B {b}" for a, b in levels)
        raise ValueError(f"{listed}: no order of these parameters fits the adapter's factors {given}.")
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


def _prefix(known: set[str], adapted: set[str]) -> str:
    """What the checkpoint's modules or the adapter's have in front of the others' ('bert.')."""
    votes = collections.Counter({"": len(known & adapted)})
    for one, other in ((known, adapted), (adapted, known)):
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
    for name, found in wanted.items():
        # Of factors (r, in) and (out, r), in either order; or of the whole weight.
        fitting = {x for x in tables if x in found or any(a and b and (b[0], a[-1]) == x for a in found for b in found)}
        candidates = [table for shape in fitting for table in tables[shape]]
        chosen = [x for x in candidates if kinds.get(x) == "embedding"] or candidates
        if len(chosen) == 1 and not re.search(r"\.\d+\.", name):
            tied[chosen[0]] = name
    return tied


def _check_floats(checkpoint: Tensors, names: Iterable[str]) -> None:
    for name in names:
        if checkpoint.dtype(name) not in FLOATS:
            raise ValueError(
                f"{checkpoint.file_of(name)}: {name!r} is quantised (stored as {checkpoint.dtype(name)}); an adapter "
                "fits the original floats, not these."
            )
