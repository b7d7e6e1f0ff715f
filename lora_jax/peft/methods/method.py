"""Base class of PEFT's methods: conversion between a module's tensors and an adapter's arrays."""

import abc
import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.checks import unusable
from lora_jax.peft.config import CONFIG, Patterns, exact_pattern
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.names import Binding

Read = Callable[[str, Sequence[int] | None], np.ndarray]
"""`read(part, shape)` returns one of a module's tensors and checks its shape; None accepts any shape."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Access to the fields of a method's `adapter_config.json`.

    Attributes:
      content: The whole JSON object.
    """

    content: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        """Returns a field that must be a finite number other than zero.

        Raises:
          ValueError: The field has another value.
        """
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or unusable(value, nonzero=True):
            raise ValueError(f"{CONFIG}: {name} is {value!r}; expected a finite number other than zero")
        return value

    def by_module(self, name: str, patterns: str, module: str, default: float) -> float:
        """Returns a number that a field of patterns may override for a module."""
        values = self.content.get(patterns) or {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{CONFIG}: {patterns} is {values!r}; expected an object")
        return Settings({name: Patterns(values).get(module, self.number(name, default))}).number(name, default)

    def names(self, name: str) -> Sequence[str] | str:
        """Returns a field that is a list of names or a regular expression."""
        value = self.content.get(name) or ()
        if not isinstance(value, str) and not all(isinstance(entry, str) for entry in value):
            raise ValueError(f"{CONFIG}: {name} is {value!r}; expected names")
        return value

    @property
    def dropout(self) -> float:
        """The dropout rate, under the name that the method has for it."""
        names = ("lora_dropout", "vera_dropout")
        return next((float(self.content[name]) for name in names if self.content.get(name)), 0.0)


class Method(abc.ABC):
    """A method of PEFT; a subclass describes how it stores adapters.

    A field is an array of the adapter for one PyTorch tensor, with the leaf's axes. Loading calls :meth:`fields` for
    each module, stacks the results over the layers of a leaf, and calls :meth:`build` once per leaf. Saving calls
    :meth:`arrays` once per leaf and :meth:`tensors` for each module.

    Attributes:
      peft_type: The value of PEFT's `peft_type`.
      title: The method's name in messages.
      parts: The suffixes of its keys, after the module.
      adapters: The adapter classes that it stores.
      rank_fields: Fields whose first axis is the rank; uneven ranks are padded with zeros along it.
      module_kinds: The kinds of modules that it adapts.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    adapters: ClassVar[tuple[type[Adapter], ...]]
    rank_fields: ClassVar[tuple[str, ...]] = ()
    module_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")

    @abc.abstractmethod
    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        """Returns the fields of one module.

        Raises:
          ValueError: A tensor is missing or has the wrong shape.
        """

    @abc.abstractmethod
    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the value of a field, for a layer without adapter."""

    @abc.abstractmethod
    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> Adapter:
        """Builds a leaf's adapter from its stacked fields."""

    @abc.abstractmethod
    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        """The inverse of :meth:`build`: returns the fields, with the leaf's batch axes if they have any."""

    @abc.abstractmethod
    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        """The inverse of :meth:`fields`: returns one module's tensors by part."""

    @abc.abstractmethod
    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        """Returns the method's own fields of `adapter_config.json`.

        Args:
          nodes: The adapters, by module.
          scales: The scale of each module's term.

        Raises:
          ValueError: Modules differ in a value that PEFT has once for all modules.
        """

    def rescale(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, tuple[str, float]]:
        """Returns, by module, a part and the factor to multiply it by, for scales that the config cannot express."""
        del nodes, scales
        return {}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        """Returns the problems that prevent writing the adapters (by module) in this method's format."""
        del nodes
        return []


def factor_layout(method: Method, binding: Binding) -> FactorLayout:
    """Returns the layout of a leaf's factors, after a check that the method applies to its modules.

    Raises:
      ValueError: The method does not adapt modules of this kind.
    """
    layout = FactorLayout(binding)
    kind = binding.weight.module or ("linear" if len(binding.tensor_axes) == 2 else "conv")
    what = f"a module of the kind {kind!r}"
    if layout.block or layout.expert_labels:
        what = "a part of a fused weight" if layout.block else "experts"
    if kind not in method.module_kinds or layout.block or layout.expert_labels:
        raise ValueError(f"unsupported: {method.title} on {what}, {binding.path!r}")
    return layout


def from_tensor(layout: FactorLayout, factor: np.ndarray, role: str) -> np.ndarray:
    """Regroups a tensor's factor `[rank, …]` into the leaf's axes."""
    sizes = layout.sizes(layout.tensor_labels(role))
    return layout.to_leaf(factor.reshape(factor.shape[0], *sizes), role)


def vector_from_tensor(layout: FactorLayout, vector: np.ndarray, role: str) -> np.ndarray:
    """Regroups a vector over a tensor's in or out axes into the leaf's axes."""
    return layout.to_leaf(vector.reshape(layout.sizes(layout.tensor_labels(role))), role, rank=False)


def to_tensor(layout: FactorLayout, factor: np.ndarray, role: str, *, rank: bool = True) -> np.ndarray:
    """The inverse of both; all in or out axes are flattened into one."""
    out = layout.to_tensor(np.asarray(factor), role, rank=rank)
    return out.reshape(*out.shape[:rank], -1)


def single_in_axis(layout: FactorLayout, method: Method) -> int:
    """Returns the number of a leaf's only in axis, which the method divides.

    Raises:
      ValueError: The leaf has several.
    """
    if layout.axes.count(IN) > 1:
        raise ValueError(f"unsupported: {method.title} divides one in axis; {layout.binding.path!r} has several")
    return layout.axes.index(IN)


def common_value(name: str, values: Mapping[str, float], title: str) -> float:
    """Returns the value that all modules share.

    Raises:
      ValueError: The values differ.
    """
    distinct = sorted(set(values.values()))
    if len(distinct) > 1:
        raise ValueError(f"{name} of {', '.join(map(str, distinct))}: PEFT's {title} has a single one for all modules")
    return distinct[0]


def matrix_sizes(layout: FactorLayout) -> tuple[int, int]:
    """Returns a module's in and out sizes."""
    return math.prod(layout.sizes(layout.tensor_labels(IN))), math.prod(layout.sizes(layout.tensor_labels(OUT)))


def most_common(values: Iterable[float]) -> float:
    """Returns the most frequent value."""
    return collections.Counter(values).most_common(1)[0][0]


def patterns_of(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Returns `r`, `alpha` and their patterns for the rank and alpha of each module."""
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {exact_pattern(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {exact_pattern(name): a for name, a in alphas.items() if a != alpha},
    }
