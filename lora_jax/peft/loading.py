"""PEFT adapter directories to deltas."""

import collections
import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax import checks, paths
from lora_jax.adapters.full import FullAdapter, RowsAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter
from lora_jax.io.read_errors import list_problems, shorten
from lora_jax.leaves import is_abstract
from lora_jax.peft import experts, keys, ties
from lora_jax.peft.config import CONFIG
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.keys import Key
from lora_jax.peft.low_rank import joint, low_rank
from lora_jax.peft.names import Binding, Names, check_names
from lora_jax.peft.opening import find_adapter, opened
from lora_jax.peft.stored import Module, Stored
from lora_jax.peft.tensors import read_json


def load(directory: str | os.PathLike, base: Any, names: Names, ignore: Sequence[str] = ()) -> dict[str, Adapter]:
    """Reads an adapter that PEFT wrote as a delta for `base`.

    Methods: LoRA and its variants, AdaLoRA, VeRA (with its projections), LoHa, LoKr, (IA)³, trainable tokens, and the
    tuning of norms.

    Args:
      directory: With `adapter_config.json` and `adapter_model.safetensors`; or one with a single directory like that
        inside (`default/`, `checkpoint-500/`), which is named in a warning.
      base: The parameters that the adapter is for; leaves may be `jax.ShapeDtypeStruct` where no stored
        tensor has to be compared with the base's.
      names: Where the leaves of the base stand in PyTorch.
      ignore: Tensors that are none of the adapter's and are passed over, by what they begin with, or what a part
        between dots begins with: `ignore=("v_head",)`.

    Returns:
      `{path: adapter}`: `LoRA` and `DoRA` from factors, `Offset` from biases on B, `Full` from saved modules and
      biases, `Rows` from trainable tokens. Of a layer without a bias the bias on B is the `bias` of its LoRA, which
      applies unmerged only. Layers of a stacked leaf that the adapter leaves out get factors of zeros; uneven ranks
      are padded with zeros, which training leaves at zero.

    Raises:
      ValueError: A file is missing or damaged, or any tensors are missing, unused or of another shape, or
        cannot be held on this base: all of them are named at once.

    Example:
      See :func:`save`.
    """
    checks.path("lora.peft.load(directory, base, names)", directory)
    check_names("lora.peft.load(directory, base, names)", names)
    given = Path(directory)
    directory = find_adapter(given)
    if directory != given:
        warnings.warn(f"{given}: the adapter in {directory.relative_to(given)} is read.", stacklevel=2)
    if (directory / CONFIG).is_file():
        content = read_json(directory / CONFIG)
        if (other := OTHER_METHODS.get(str(content.get("peft_type")))) is not None:
            return other(directory, content, base, names, ignore)
    with opened(directory, ignore, _modules(base, names)) as (config, tensors):
        loader = Loader(Stored(config, tensors), base, names)
        return finished(directory, loader, loader.delta())


def _modules(base: Any, names: Names) -> Iterator[str]:
    """The modules of a base in PyTorch."""
    for path, leaf in paths.flatten(base).as_dict().items():
        if (binding := names.get(path, leaf.shape) if hasattr(leaf, "shape") else None) is not None:
            yield from (keys.split_name(name)[0] for name in binding.in_model.values())


OTHER_METHODS: dict[str, Callable[[Path, Mapping[str, Any], Any, Names, Sequence[str]], dict[str, Adapter]]] = {}
"""By `peft_type`, what reads the adapters of methods other than LoRA; filled by :mod:`lora_jax.peft.methods`."""


def finished(directory: Path, loader: "Loader", delta: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The delta in the base's order.

    Raises:
      ValueError: The loader met problems, or there is no adapter.
    """
    if loader.problems:
        raise ValueError(shorten(f"{directory}: the adapter does not fit {list_problems(loader.problems)}"))
    if not delta:
        raise ValueError(f"{directory}: holds no adapter.")
    order = {path: number for number, path in enumerate(loader.leaves)}
    return dict(sorted(delta.items(), key=lambda item: order[item[0]]))


_HINTS = 4  # how many unknown keys are told with the nearest names


class Loader:
    """Puts an adapter's tensors in terms of a base, and collects all that does not fit in `problems`."""

    def __init__(self, stored: Stored, base: Any, names: Names):
        self.stored = stored
        self.config = stored.config
        self.tensors = stored.tensors
        self.problems: list[str] = []
        self.hints = _HINTS
        self.leaves = paths.flatten(base).as_dict()
        self.prefix = names.prefix
        self.where: dict[str, tuple[Binding, tuple[int, ...]]] = {}
        self.tied: dict[str, str] = {}
        self.row: dict[str, int] = {}
        # names in PyTorch's running model, which adapters have, to those in checkpoint files; and back, in full
        self.in_files: dict[str, str] = {}
        self.in_model: dict[str, str] = {}
        numbers = {id(row): number for number, row in enumerate(names.weights)}
        for path, leaf in self.leaves.items():
            binding = names.get(path, leaf.shape) if hasattr(leaf, "shape") else None
            if binding is not None:
                self.where |= {self.bare(name): (binding, index) for name, index in binding.tensors.items()}
                self.in_files |= {self.bare(new): self.bare(name) for name, new in binding.in_model.items()}
                self.in_model |= {self.bare(name): new for name, new in binding.in_model.items()}
                self.row |= dict.fromkeys(map(self.bare, binding.tensors), numbers[id(binding.weight)])
                self.tied |= {self.bare(other): self.bare(name) for other, name in binding.tied.items()}
        full = [name for binding, _ in self.where.values() for name in binding.tensors]
        self.shares = {
            self.bare(parameter): [(self.bare(name), share) for name, share in found]
            for parameter, found in experts.shares(names, dict.fromkeys(full)).items()
        }

    def bare(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def in_file(self, name: str) -> str:
        """The name of a tensor of the adapter as checkpoint files have it, without the prefix."""
        return self.in_files.get(self.bare(name), self.bare(name))

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.problems.append(str(error))

    def delta(self) -> dict[str, Adapter]:
        """The delta; meaningless where there are problems."""
        modules, values, rows = self.sorted_keys()
        self.check_shared([*(k for m in modules.values() for k in m.parts.values()), *values])
        apart = self.check_tied([*(k for m in modules.values() for k in m.parts.values()), *values, *rows])
        delta: dict[str, Adapter] = {}
        by_leaf: dict[str, dict[tuple[int, ...], Module]] = collections.defaultdict(dict)
        for module in modules.values():
            if module.name not in self.tied:
                binding, index = self.where[module.name]
                by_leaf[binding.path][index] = module
        for path, adapted in by_leaf.items():
            with self.collecting():
                first = next(iter(adapted.values()))
                delta[path] = low_rank(self.stored, self.where[first.name][0], adapted, self.leaves[path], self.biases)
        self.add(delta, self.offsets(modules))
        self.add(delta, self.replacements([key for key in values if self.in_file(key.name) not in apart], modules))
        for key in rows:
            if (name := self.in_file(f"{key.module}.weight")) in apart or name in self.tied:
                continue
            with self.collecting():
                if not self.is_copy(key, rows):
                    self.add(delta, self.rows(key))
        self.check_expected(modules, values, rows)
        return delta

    def add(self, delta: dict[str, Adapter], more: Mapping[str, Adapter]) -> None:
        for path, node in more.items():
            if path in delta:
                self.problems.append(f"twice: {path!r} would have {delta[path].kind} and {node.kind}")
            delta[path] = node

    def sorted_keys(self) -> tuple[dict[str, Module], list[Key], list[Key]]:
        """The tensors: factors by the base's tensor that they adapt, replacements, rows."""
        parsed = []
        for name in sorted(self.tensors):
            if keys.is_repeated(name, self.tensors):
                continue
            if key := keys.parse(name):
                parsed.append(key)
            else:
                self.problems.append(f"unused: {name!r} is no key of PEFT's LoRA{self.ignoring(name)}")
        deepest: dict[str, int] = {}
        for key in parsed:
            deepest[key.module] = max(key.depth, deepest.get(key.module, 0))
        modules: dict[str, Module] = {}
        for key in parsed:
            if key.part in ("value", "rows"):
                continue
            targets = self.targets(key, deepest[key.module])
            for target in targets:
                modules.setdefault(target.name, target).parts[key.part] = key
            if not targets:
                self.problems.append(self.unknown(key))
        return modules, [k for k in parsed if k.part == "value"], [k for k in parsed if k.part == "rows"]

    def unknown(self, key: Key) -> str:
        """What to say of a key of no weight of the base; the first ones with the nearest names."""
        text = f"unused: {self.stored.described(key)}: the base has no such weight"
        self.hints -= 1
        if self.hints < 0:  # in a base of another kind all keys are unknown, and each search sees all names
            return text
        if key.part == "value":
            return f"{text}; {paths.nearest(self.bare(key.name), list(self.where))}{self.ignoring(key.name)}"
        known = dict.fromkeys(keys.split_name(name)[0] for name in (*self.where, *self.tied))
        return f"{text}; {paths.nearest(self.bare(key.module), list(known))}"

    def ignoring(self, name: str) -> str:
        """What to say of a tensor that may have nothing to do with the adapter: no part of the base begins so."""
        first = name.removeprefix(keys.PREFIX).partition(".")[0]
        if any(f".{first}" in f".{tensor}" for tensor in (*self.where, *self.in_model.values(), *self.tied)):
            return ""
        return f"; ignore=({first!r},) passes it over"

    def targets(self, key: Key, deepest: int) -> list[Module]:
        """The base's tensors that a factor adapts: one, or those of all experts."""
        module = self.bare(key.module)
        parameters: set[tuple[int, str, str]] = set()
        for outer, p in map(keys.split_name, self.config.target_parameters):
            if outer and not (keys.matches(key.module, [outer]) or keys.matches(module, [self.bare(outer)])):
                continue
            name = self.in_file(f"{module}.{p}")
            tensors = [file for file, _ in self.shares.get(name, ())] or [name]
            if tensors[0] in self.where:
                order = list(self.shares).index(name) if name in self.shares else self.row[name]
                parameters.add((order, name, p))
        if parameters:
            # One wrapper a parameter, in the module's order; the innermost has the first.
            number = deepest - key.depth
            if number >= len(parameters):
                return []
            _, name, parameter = sorted(parameters)[number]
            label = f"{key.module}.{parameter}"
            if name in self.shares:
                return [Module(file, label, share=share) for file, share in self.shares[name]]
            return [Module(name, label)]
        for name in (self.in_file(f"{module}.weight"), f"{module}.in_proj_weight"):
            if key.depth == 0 and (name in self.where or name in self.tied):
                return [Module(name, key.module)]
        return []

    def check_tied(self, found: Sequence[Key]) -> set[str]:
        """The weights that are one leaf here, and that the adapter makes two of; each pair is a problem."""
        by_module = collections.defaultdict(list)
        for key in found:
            by_module[self.in_file(f"{key.module}.weight")].append(key)
        apart: set[str] = set()
        for other, primary in self.tied.items():
            if why := ties.parted(by_module[primary], by_module[other], self.config, self.tensors):
                apart |= {primary, other}
                self.problems.append(
                    f"tied: {why}, so that PEFT's model has two weights; {self.in_model[primary]} and {other} are one "
                    f"leaf of this base: load the model untied, with a leaf and a row of names for {other}, or merge "
                    "the adapter into the checkpoint (lora-jax merge)"
                )
        return apart

    def check_shared(self, adapted: Sequence[Key]) -> None:
        """What is wrapped where PyTorch's model calls other modules of the same weight is a problem."""
        for module in dict.fromkeys(key.module for key in adapted):
            name = self.in_file(f"{module}.weight")
            if name not in self.where or is_abstract(self.leaves[self.where[name][0].path]):
                continue  # the base tells of no other modules
            parts = [key.part for key in adapted if key.module == module]
            copied = parts == ["value"] and not keys.saved_as(module, self.config.modules_to_save)
            if not copied and ties.is_shared(name, self.where):
                self.problems.append(
                    f"no effect in PEFT: {module} is wrapped, and the model calls encoder.embed_tokens and "
                    f"decoder.embed_tokens, which have its weight; ignore=({self.bare(module)!r},) passes it over"
                )

    def own_bias(self, module: Module) -> str | None:
        """The name of the layer's own bias; None where the base has none."""
        name = keys.split_name(module.name)[0] + ".bias"
        return name if name in self.where else None

    def biases(self, module: Module) -> Key | None:
        """The key of a module's bias on B, if it is a part of the low-rank adapter: the layer has no bias."""
        key = module.parts.get("b_bias") if self.config.lora_bias else None
        return key if self.own_bias(module) is None else None

    def offsets(self, modules: Mapping[str, Module]) -> dict[str, Adapter]:
        """The biases on B of layers that have a bias, as offsets of it."""
        found: dict[str, dict[str, tuple[np.ndarray, float]]] = collections.defaultdict(dict)
        for module in modules.values():
            key = module.parts.get("b_bias")
            if key is None:
                if self.config.lora_bias:
                    self.problems.append("missing: " + keys.factor_keys(module.label, embedding=False)["b_bias"])
                continue
            name = self.own_bias(module)
            if not self.config.lora_bias:
                self.problems.append(f"unused: {key.key}, since {CONFIG} has lora_bias false")
            elif name is not None:
                with self.collecting():
                    binding = self.where[name][0]
                    found[binding.path][name] = (
                        self.stored.read(key, binding.tensor_shape),
                        self.config.scale(module.label),
                    )
            elif module.name in self.tied and self.tensors.read(key.key).any():
                self.problems.append(f"cannot be held: {key.key}, since {module.name} is the embedding's weight (tied)")
        delta: dict[str, Adapter] = {}
        for path, values in found.items():
            binding = self.where[next(iter(values))][0]
            scales = {scale for _, scale in values.values()}
            (scale,) = scales if len(scales) == 1 and all(scales) else (1.0,)
            whole = binding.join(
                lambda name, part: (
                    values[self.bare(name)][0] * np.float32(values[self.bare(name)][1] / scale)  # noqa: B023
                    if self.bare(name) in values  # noqa: B023
                    else np.zeros(binding.tensor_shape, np.float32)  # noqa: B023
                )[part],
                next(iter(values.values()))[0].dtype,
            )
            delta[path] = OffsetAdapter(value=jnp.asarray(whole), scale=jnp.asarray(scale, jnp.float32), axes=())
        return delta

    def replacements(self, values: Sequence[Key], modules: Mapping[str, Module]) -> dict[str, Adapter]:
        """Saved modules and biases, trained outright."""
        given: dict[str, Key] = {}
        for key in values:
            name = self.in_file(key.name)
            primary = self.tied.get(name, name)
            if primary not in self.where:
                self.problems.append(self.unknown(key))
                continue
            with self.collecting():
                value = self.stored.read(key, self.value_shape(key, primary, primary in modules))
                saved = keys.saved_as(key.module, self.config.modules_to_save)
                # PEFT stores an embedding beside its factors, or when it may have been resized.
                same = value.shape == self.where[primary][0].tensor_shape
                if same and (primary in modules or (keys.split_name(name)[1] == "weight" and not saved)):
                    if self.is_in_base(primary, value):
                        continue
                    if primary in modules:
                        raise ValueError(f"cannot be held: {key.key} differs from the base's, and has factors too")
                given.setdefault(primary, key)
        delta: dict[str, Adapter] = {}
        for path, binding in {self.where[name][0].path: self.where[name][0] for name in given}.items():
            with self.collecting():
                delta[path] = self.replacement(binding, given)
        return delta

    def value_shape(self, key: Key, primary: str, has_factors: bool) -> tuple[int, ...]:
        """The shape that a replaced tensor must have: the base's, or that of a table with more tokens."""
        binding, stored = self.where[primary][0], self.tensors[key.key]
        wanted = binding.tensor_shape
        vocabulary = binding.weight.module == "embedding" or ties.has_tokens(key.name)
        if (
            vocabulary
            and not has_factors
            and len(binding.tensors) == 1
            and stored[1:] == wanted[1:]
            and stored[:1] > wanted[:1]
        ):
            return stored
        return wanted

    def replacement(self, binding: Binding, given: Mapping[str, Key]) -> Adapter:
        if len(binding.tensors) == 1:
            (name,) = map(self.bare, binding.tensors)
            binding = binding.resized(self.tensors[given[name].key])
        own = [self.bare(name) for name in binding.tensors]
        dtype = joint([self.tensors.read(given[name].key).dtype for name in own if name in given])
        rest: dict[str, np.ndarray] = {}
        if any(name not in given for name in own):
            rest = {self.bare(name): value for name, value in binding.split(self.value(binding.path)).items()}

        def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
            bare = self.bare(name)
            return self.tensors.read(given[bare].key, part) if bare in given else rest[bare][part]

        return FullAdapter(value=jnp.asarray(binding.join(read, dtype)), axes=())

    def value(self, path: str) -> np.ndarray:
        """A leaf of the base."""
        if is_abstract(self.leaves[path]):
            raise ValueError(f"{path!r}: its value is needed, and the base has its shape only")
        return np.asarray(self.leaves[path])

    def is_in_base(self, name: str, value: np.ndarray) -> bool:
        binding, index = self.where[name]
        stored = {at: tensor for tensor, at in binding.tensors.items()}[index]
        return bool((binding.split(self.value(binding.path))[stored].astype(value.dtype) == value).all())

    def is_copy(self, key: Key, rows: Sequence[Key]) -> bool:
        """Whether rows repeat others: those of the base's table, for another module that PyTorch ties to it.

        PEFT writes them for each module where one list of rows is for all.
        """
        if self.in_file(f"{key.module}.weight") in self.where or "" not in self.config.trainable_token_indices:
            return False
        tables = [other for other in rows if self.in_file(f"{other.module}.weight") in self.where]
        for other in tables:
            ties.check_equal_rows(other, key, self.tensors)
        return bool(tables)

    def rows(self, key: Key) -> dict[str, Adapter]:
        """Trainable tokens."""
        name = self.in_file(f"{key.module}.weight")
        if name not in self.where:
            raise ValueError(f"unused: {self.stored.described(key)}: the base has no {name}")
        ids = self.config.tokens(key.module)
        if ids is None:
            raise ValueError(f"unused: {key.key}, since {CONFIG} has no trainable_token_indices for it")
        binding, _ = self.where[name]
        layout = FactorLayout(binding)
        by_row, others = layout.row_roles()
        if len(binding.tensors) > 1 or layout.axes.count(by_row) != 1 or BATCH in layout.axes:
            raise ValueError(f"cannot be held: {key.key} on {binding.path!r}, which is no single table")
        count = layout.sizes(layout.labels(by_row))[0]
        if len(set(ids)) < len(ids) or not all(0 <= i < count for i in ids):
            raise ValueError(
                f"{CONFIG}: trainable_token_indices {list(ids)} of {key.module}: expected different rows of a table of "
                f"{count}"
            )
        rows = layout.to_leaf(self.stored.read(key, (len(ids), *layout.sizes(layout.tensor_labels(others)))), others)
        axes = tuple(IN if role == by_row else OUT for role in layout.axes)
        return {
            binding.path: RowsAdapter(rows=jnp.asarray(rows), ids=jnp.asarray(ids, jnp.int32), count=count, axes=axes)
        }

    def check_expected(self, modules: Mapping[str, Module], values: Sequence[Key], rows: Sequence[Key]) -> None:
        """What the config announces must be there."""
        matrices = [name for name, (binding, _) in self.where.items() if binding.roles and not keys.is_parameter(name)]
        for name in (*matrices, *self.tied):
            module = keys.split_name(self.in_model.get(name, name))[0]
            whole = any(keys.inside(module, entry) for entry in self.config.modules_to_save)
            if name not in modules and not whole and self.config.targets(module) and not self.tensors.ignores(module):
                if name in self.tied and not self.config.ensure_weight_tying:
                    continue
                embedding = name in self.where and self.where[name][0].weight.module == "embedding"
                known = keys.factor_keys(module, embedding=embedding)
                self.problems.append(f"missing: {known['a']}, {known['b']}")
        for target in self.config.target_parameters:
            if not self.tensors.ignores(target) and not any(
                keys.matches(module.label, [target]) for module in modules.values()
            ):
                self.problems.append(f"missing: the factors of the parameter {target}")
        saved = {self.in_file(key.name) for key in values}
        for name in self.where:
            module, parameter = keys.split_name(self.in_model[name])
            if name in saved or parameter != "bias" or self.tensors.ignores(self.in_model[name]):
                continue
            adapted = self.in_file(f"{module}.weight") in modules
            if self.config.bias == "all" or (self.config.bias == "lora_only" and adapted):
                self.problems.append("missing: " + keys.value_key(module, parameter, wrapped=adapted))
        for entry in self.config.modules_to_save:
            for name, shown in self.in_model.items():
                if name in saved or self.tensors.ignores(shown):
                    continue
                if keys.inside(keys.split_name(shown)[0], entry):
                    self.problems.append("missing: " + keys.value_key(*keys.split_name(shown), wrapped=False))
        for module in self.config.trainable_token_indices:
            if not self.tensors.ignores(module) and not any(
                not module or keys.matches(key.module, [module]) for key in rows
            ):
                self.problems.append(f"missing: the trained tokens of {module or 'the embedding'}")
