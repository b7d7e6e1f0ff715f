"""summary(): what a delta adapts and costs; explain(): how a function uses each adapted weight."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax

from lora_jax import paths
from lora_jax.adapters.protocol import Delta, is_inexact
from lora_jax.axes import unique
from lora_jax.functions import check_function
from lora_jax.leaves import is_array, is_quantized
from lora_jax.optim import partition
from lora_jax.transform.call import Arguments, Call, check_delta, insert_adapters
from lora_jax.transform.interpreter import Interpreter, Use

OPTIMIZER_SLOTS = {"SGD": 0, "momentum": 1, "Adam": 2}
"""Size of the optimizer state, in copies of the trainable parameters."""


class Explanation(dict[str, tuple[Use, ...]]):
    """The uses of each adapted weight by a function. Prints one line per use."""

    @property
    def factored(self) -> bool:
        """Whether the adapters are applied without merging any weight."""
        return all(use.factored for uses in self.values() for use in uses)

    def __str__(self) -> str:
        return "\n".join(f"{path}: {use}" for path, uses in self.items() for use in uses) or "no adapted weights"

    __repr__ = __str__


def explain(fn: Callable, base: Any, delta: Delta, /, *args: Any, **kwargs: Any) -> Explanation:
    """Reports, for each use of a weight, whether the adapter is applied factored or the weight is merged, and why.

    Quantized weights are listed with or without an adapter. If such a use is merged, the dequantized weight is formed.

    Args:
      fn: The function that is passed to :func:`lora_jax.adapt` (not its result).
      base: Parameters.
      delta: Adapters.
      *args: Arguments of fn, which is traced but not run.
      **kwargs: Keyword arguments of fn.

    Returns:
      `{path: (use, …)}`; a use has `factored`, `operation`, `reason` and `source`.

    Raises:
      TypeError: fn is not a function of parameters, but for example the result of :func:`lora_jax.adapt`.
      ValueError: The delta does not fit the base, or adapts a weight that the function never uses.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: x @ base["w"]
      >>> base, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2)}, fn, x)
      >>> [(use.operation, use.factored) for use in explain(fn, base, delta, x)["w"]]
      [('dot_general', True)]
    """
    check_function("explain", fn)
    arguments = Arguments.create(base, args, kwargs)
    check_delta(delta, arguments)
    call, uses = Call.trace(fn, arguments), []
    interpreter = Interpreter(uses=uses)

    def run(arrays, delta):
        traced = dataclasses.replace(arguments, arrays=tuple(arrays))
        out = call.evaluate(interpreter, insert_adapters(delta, traced, None, interpreter))
        return [leaf for leaf in jax.tree.leaves(out) if is_array(leaf)]

    jax.eval_shape(run, list(arguments.arrays), delta)
    unused = [path for path in delta if not call.uses_path(path)]
    if unused:
        raise ValueError(f"The delta adapts {unused[0]!r}, which the function never uses.")
    quantized = [path for path, leaf in zip(arguments.paths, arguments.arrays) if is_quantized(leaf)]
    listed = [path for path in arguments.paths if path in delta or path in quantized]
    return Explanation({path: tuple(use for use in unique(uses) if use.path == path) for path in listed})


@dataclasses.dataclass(frozen=True)
class Group:
    """Adapters of one kind of layer, whose paths differ only in numbers."""

    pattern: str
    kind: str
    count: int
    details: str
    trainable: int
    total: int


@dataclasses.dataclass(frozen=True, repr=False)
class Summary:
    """Parameter and memory counts of a delta on a base. Prints a table.

    Attributes:
      groups: The adapters, grouped by kind of layer.
      trainable: Number of trainable parameters.
      total: Number of parameters of base and adapters together (a `Full` copy counts once).
      base_parameters: Number of parameters of the base.
      base_bytes: Bytes of the base.
      float_bytes: Bytes of the base without quantization, as in full fine-tuning.
      formats: By format of quantized leaves, their number and their bits per parameter.
      delta_bytes: Bytes of the delta, including frozen leaves.
      train_bytes: Bytes of the trainable leaves, and so of their gradients and of each copy in the optimizer state.
      full_bytes: The same for full fine-tuning of the base.
    """

    groups: tuple[Group, ...]
    trainable: int
    total: int
    base_parameters: int
    base_bytes: int
    float_bytes: int
    formats: dict[str, tuple[int, float]]
    delta_bytes: int
    train_bytes: int
    full_bytes: int

    @property
    def percent(self) -> float:
        """Trainable parameters as a percentage of all parameters."""
        return 100.0 * self.trainable / self.total if self.total else 0.0

    def optimizer_bytes(self, name: str = "Adam") -> int:
        """Returns the bytes of optimizer state for 'SGD', 'momentum' or 'Adam'."""
        return OPTIMIZER_SLOTS[name] * self.train_bytes

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("weights", "adapter", "count", "options", "trainable", "parameters")]
        rows += [
            (
                group.pattern,
                group.kind,
                str(group.count),
                group.details,
                f"{group.trainable:,}",
                f"{group.total:,}",
            )
            for group in self.groups
        ]
        lines = _table(rows, right={2, 4, 5})
        lines.append("")
        lines.append(f"trainable parameters  {self.trainable:,} of {self.total:,} ({self.percent:.3f} %)")
        for name, (count, bits) in self.formats.items():
            lines.append(f"quantized weights     {count} in {name}, {bits:.3f} bits per parameter")
        lines.append("")
        costs: list[tuple[str, ...]] = [("bytes", "this delta", "full fine-tuning", "ratio")]
        costs += [("base", f"{self.base_bytes:,}", f"{self.float_bytes:,}", "")]
        costs += [("delta", f"{self.delta_bytes:,}", "", "")]
        for name, factor in (("gradients", 1), *((f"{k} state", v) for k, v in OPTIMIZER_SLOTS.items())):
            train, full = factor * self.train_bytes, factor * self.full_bytes
            costs.append((name, f"{train:,}", f"{full:,}", f"{train / full:.4f}" if full else ""))
        return "\n".join(lines + _table(costs, right={1, 2, 3}))

    __repr__ = __str__


def summary(base: Any, delta: Delta) -> Summary:
    """Summarizes what a delta adapts, and its memory compared with full fine-tuning.

    Args:
      base: Parameters; arrays or `jax.ShapeDtypeStruct`.
      delta: From :func:`lora_jax.init`.

    Returns:
      A :class:`Summary`; `print(summary(base, delta))` shows the table.

    Raises:
      ValueError: The delta does not fit the base.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((16, 16))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> result = summary(base, delta)
      >>> result.trainable, result.total, result.optimizer_bytes("Adam")
      (64, 320, 512)
    """
    check_delta(delta, Arguments.create(base))
    leaves = {path: leaf for path, leaf in paths.flatten(base).as_dict().items() if is_array(leaf)}
    train, _ = partition(delta)
    trained = {path: sum(leaf.size for leaf in jax.tree.leaves(node)) for path, node in train.items()}
    members: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for path, node in delta.items():
        pattern = re.sub(r"(?<![^/_])\d+(?![^/_])", "*", path)
        details = " ".join(f"{name}={_short(value)}" for name, value in node.describe().items())
        members[pattern, node.kind, details].append(path)
    groups = tuple(
        Group(
            pattern,
            kind,
            len(group),
            details,
            sum(trained[path] for path in group),
            sum(math.prod(leaves[path].shape) for path in group),
        )
        for (pattern, kind, details), group in members.items()
    )
    base_parameters = sum(math.prod(leaf.shape) for leaf in leaves.values())
    added = sum(trained[path] for path, node in delta.items() if node.kind not in ("Full", "Rows"))
    return Summary(
        groups=groups,
        trainable=sum(trained.values()),
        total=base_parameters + added,
        base_parameters=base_parameters,
        base_bytes=_bytes(leaves),
        float_bytes=sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _distinct(leaves.values())),
        formats=_formats(leaves.values()),
        delta_bytes=_bytes(delta),
        train_bytes=_bytes(train),
        full_bytes=sum(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _distinct(leaves.values()) if is_inexact(leaf)
        ),
    )


def _bytes(tree: Any) -> int:
    """Returns the bytes of all arrays. An array that occurs several times counts once; each shape counts separately."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in _distinct(jax.tree.leaves(tree)))


def _formats(leaves: Iterable[Any]) -> dict[str, tuple[int, float]]:
    """Returns, by format, the number of quantized leaves and their bits per parameter."""
    by_name: dict[str, list[Any]] = collections.defaultdict(list)
    for leaf in filter(is_quantized, leaves):
        by_name[leaf.format.name if hasattr(leaf, "format") else type(leaf).__name__].append(leaf)
    return {
        name: (len(group), 8 * _bytes(group) / sum(math.prod(leaf.shape) for leaf in group))
        for name, group in by_name.items()
    }


def _distinct(leaves: Iterable[Any]) -> list[Any]:
    """Returns the leaves without repetitions."""
    by_id = {index if isinstance(leaf, jax.ShapeDtypeStruct) else id(leaf): leaf for index, leaf in enumerate(leaves)}
    return list(by_id.values())


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(rows: list[tuple[str, ...]], right: set[int]) -> list[str]:
    """Formats rows as aligned lines; `right` are the columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    ]
