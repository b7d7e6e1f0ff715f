"""How a method of PEFT keeps an adapter: its tensors for each module, and the adapter that they are here."""

import abc
import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.checks import unusable
from lora_jax.peft.config import CONFIG, Patterns, exactly
from lora_jax.peft.factors import Fit
from lora_jax.peft.names import Place

Read = Callable[[str, Sequence[int] | None], np.ndarray]
"""`read(part, shape)` gives one of a module's tensors after a check of its shape; None takes any shape."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The fields of a method's `adapter_config.json`.

    Attributes:
      content: All of them.
    """

    content: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        """A field that is a finite number other than zero.

        Raises:
          ValueError: It is none.
        """
        value = self.content.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or unusable(value, nonzero=True):
            raise ValueError(f"{CONFIG}: {name} is {value!r}; expected a finite number other than zero")
        return value

    def by_module(self, name: str, patterns: str, module: str, default: float) -> float:
        """A number that a dict of patterns may give for a module."""
        values = self.content.get(patterns) or {}
        if not isinstance(values, Mapping):
            raise ValueError(f"{CONFIG}: {patterns} is {values!r}; expected an object")
        return Settings({name: Patterns(values).find(module, self.number(name, default))}).number(name, default)

    def names(self, name: str) -> Sequence[str] | str:
        """A field that is a list of names or a regular expression."""
        value = self.content.get(name) or ()
        if not isinstance(value, str) and not all(isinstance(one, str) for one in value):
            raise ValueError(f"{CONFIG}: {name} is {value!r}; expected names")
        return value

    @property
    def dropout(self) -> float:
        """The rate of dropout, whatever the method calls it."""
        names = ("lora_dropout", "vera_dropout")
        return next((float(self.content[name]) for name in names if self.content.get(name)), 0.0)


class Method(abc.ABC):
    """A method of PEFT.

    A field is what the adapter holds for one tensor, with the leaf's axes: arrays whose first axis is the rank where
    `ranked` names them. Fields of all layers are stacked before `build` is called.

    Attributes:
      peft_type: PEFT's name.
      title: What messages call it.
      parts: The ends of its keys, behind the module.
      adapters: The classes of adapters that it holds.
      ranked: Fields whose first axis is the rank, along which uneven ones are padded with zeros.
      kinds: The kinds of modules that it adapts.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    adapters: ClassVar[tuple[type[Adapter], ...]]
    ranked: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv1d")

    @abc.abstractmethod
    def fields(self, fit: Fit, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        """What one module adds to its leaf.

        Raises:
          ValueError: A tensor is missing or does not fit.
        """

    @abc.abstractmethod
    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A field of a layer that the adapter leaves out."""

    @abc.abstractmethod
    def build(self, arrays: Mapping[str, np.ndarray], fit: Fit, settings: Settings) -> Adapter:
        """The adapter of a leaf, from its stacked fields."""

    @abc.abstractmethod
    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        """The inverse of :meth:`build`: the fields, each with the leaf's batch axes or, where it has none, without."""

    @abc.abstractmethod
    def tensors(self, fields: Mapping[str, np.ndarray], fit: Fit) -> dict[str, np.ndarray]:
        """The inverse of :meth:`fields`: one module's tensors by part."""

    @abc.abstractmethod
    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        """The method's own fields of `adapter_config.json`.

        Args:
          nodes: The adapters, by module.
          scales: What each module's term is multiplied by.

        Raises:
          ValueError: PEFT has one value for all modules where they differ.
        """

    def leftover(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, tuple[str, float]]:
        """By module, a part that is to be multiplied by a number, which the config cannot express."""
        del nodes, scales
        return {}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        """Why adapters by module cannot be written in this method's form."""
        del nodes
        return []


def fit_of(method: Method, place: Place) -> Fit:
    """How a leaf's fields and its modules' tensors correspond.

    Raises:
      ValueError: The method has no such modules.
    """
    fit = Fit(place)
    kind = place.weight.module or ("linear" if len(place.right) == 2 else "conv")
    what = "a part of a fused weight" if fit.block else "experts" if fit.experts else f"a module of the kind {kind!r}"
    if kind not in method.kinds or fit.block or fit.experts:
        raise ValueError(f"cannot be held: {method.title} on {what}, {place.path!r}")
    return fit


def from_tensor(fit: Fit, factor: np.ndarray, role: str) -> np.ndarray:
    """A factor `[rank, …]` of a tensor with the axes of the leaf."""
    sizes = fit.size(fit.tensor_labels(role))
    return fit.to_leaf(factor.reshape(factor.shape[0], *sizes), role)


def vector_from_tensor(fit: Fit, vector: np.ndarray, role: str) -> np.ndarray:
    """A vector over a tensor's in or out axes with those of the leaf."""
    return fit.to_leaf(vector.reshape(fit.size(fit.tensor_labels(role))), role, rank=False)


def to_tensor(fit: Fit, factor: np.ndarray, role: str, *, rank: bool = True) -> np.ndarray:
    """The inverse of both, with all in or out axes as one."""
    out = fit.to_tensor(np.asarray(factor), role, rank=rank)
    return out.reshape(*out.shape[:rank], -1)


def one(name: str, values: Mapping[str, float], title: str) -> float:
    """The value that all modules share.

    Raises:
      ValueError: They differ.
    """
    distinct = sorted(set(values.values()))
    if len(distinct) > 1:
        raise ValueError(f"{name} of {', '.join(map(str, distinct))}: PEFT's {title} has one for all modules")
    return distinct[0]


def matrix_sizes(fit: Fit) -> tuple[int, int]:
    """A module's in and out sizes."""
    return math.prod(fit.size(fit.tensor_labels(IN))), math.prod(fit.size(fit.tensor_labels(OUT)))


def most_common(values: Iterable[float]) -> float:
    """The value that most have."""
    return collections.Counter(values).most_common(1)[0][0]


def patterns_of(ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """`r`, `alpha` and their patterns, that give each module its own."""
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "r": rank,
        "alpha": alpha,
        "rank_pattern": {exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {exactly(name): a for name, a in alphas.items() if a != alpha},
    }
