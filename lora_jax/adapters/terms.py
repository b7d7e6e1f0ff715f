"""The term that an additive adapter adds to its weight, read as factors: for combining, exporting and measuring."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.factored import Factor, Factored, Label, compute_dtype
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter

_exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
_optimized = functools.partial(np.einsum, optimize=True)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A term as the product of two groups of factors, summed over bonds.

    Attributes:
      reads: The factors with labels of in axes.
      writes: Those with labels of out axes.
      lead: Labels that count matrices: batch axes, and blocks of an out axis.
      in_labels: The other labels of in axes.
      out_labels: The other labels of out axes.
      bonds: The labels that are summed; the rank is the product of their sizes.
      sizes: The sizes of all labels.
    """

    reads: tuple[Factor, ...]
    writes: tuple[Factor, ...]
    lead: tuple[Label, ...]
    in_labels: tuple[Label, ...]
    out_labels: tuple[Label, ...]
    bonds: tuple[Label, ...]
    sizes: dict[Label, int]

    @property
    def rank(self) -> int:
        return self._count(self.bonds)

    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """`[*lead, rank, *in]` and `[*lead, rank, *out]`, at least float32."""
        return tuple(
            self._shaped(_product(_exact, factors, self._labels(ends), self.sizes), ends)
            for factors, ends in ((self.reads, self.in_labels), (self.writes, self.out_labels))
        )  # pyrefly: ignore[bad-return]

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """`[*lead, in, rank]` and `[*lead, out, rank]` as NumPy arrays of float64."""
        lead = [self.sizes[label] for label in self.lead]
        return tuple(
            _product(_optimized, map(_float64, factors), self._labels(ends), self.sizes)
            .reshape(*lead, self.rank, self._count(ends))
            .swapaxes(-1, -2)
            for factors, ends in ((self.reads, self.in_labels), (self.writes, self.out_labels))
        )  # pyrefly: ignore[bad-return]

    def _labels(self, ends: Sequence[Label]) -> tuple[Label, ...]:
        return (*self.lead, *self.bonds, *ends)

    def _shaped(self, array: Any, ends: Sequence[Label]) -> Any:
        return array.reshape(*(self.sizes[x] for x in self.lead), self.rank, *(self.sizes[x] for x in ends))

    def _count(self, labels: Iterable[Label]) -> int:
        return math.prod(self.sizes[label] for label in labels)


def term(node: Adapter) -> Factored | None:
    """The factored form of the term that an adapter adds to its weight; None if it has no factors.

    Raises:
      ValueError: The adapter is not additive.
    """
    if not node.additive:
        raise ValueError(f"A {node.kind} adapter is not additive, so it has no term.")
    form = node.factored(jax.ShapeDtypeStruct(node.shape(), jnp.float32))  # pyrefly: ignore[bad-argument-type]
    return form if form is not None and form.factors else None


def pair(node: Adapter) -> Pair | None:
    """The term of an additive adapter as a product of two factors; None if it is not such a product.

    Factors with neither in nor out labels go to the side that makes the rank smallest: a chain a·R·b has the rank of
    R, not its square.
    """
    form = term(node)
    if form is None:
        return None
    sizes = dict(size for axis in form.dims(node.shape()) for size in axis)
    sizes |= {label: size for factor in form.factors for label, size in factor.sizes.items()}
    role_of = {label: role for labels, role in zip(form.labels, node.axes) for label in labels}

    def has_role(factor: Factor, role: str) -> bool:
        return any(role_of.get(label) == role for label in factor.labels)

    reads = [factor for factor in form.factors if has_role(factor, IN)]
    writes = [factor for factor in form.factors if has_role(factor, OUT) and not has_role(factor, IN)]
    middle = [factor for factor in form.factors if not has_role(factor, OUT) and not has_role(factor, IN)]
    # An out label on both sides counts matrices, as batch labels do: the blocks of a fused axis.
    shared = _labels(reads) & _labels(writes)
    lead = tuple(x for x, role in role_of.items() if role == BATCH or (role == OUT and x in shared))
    if any(role_of.get(label) == OUT and label not in lead for label in _labels(reads)):
        return None

    def split(sides: Sequence[bool]) -> Pair:
        left = (*reads, *(factor for factor, side in zip(middle, sides) if side))
        right = (*writes, *(factor for factor, side in zip(middle, sides) if not side))
        return Pair(
            reads=left,
            writes=right,
            lead=lead,
            in_labels=tuple(x for x, role in role_of.items() if role == IN),
            out_labels=tuple(x for x, role in role_of.items() if role == OUT and x not in lead),
            bonds=tuple(sorted(label for label in _labels(left) & _labels(right) if label not in role_of)),
            sizes=sizes,
        )

    return min(map(split, itertools.product((False, True), repeat=len(middle))), key=lambda pair: pair.rank)


def is_low_rank(node: Adapter) -> bool:
    """Whether :func:`as_low_rank` can convert an adapter: it adds a product of two factors."""
    return isinstance(node, LoRAAdapter) or (node.additive and pair(node) is not None)


def as_low_rank(node: Adapter) -> LoRAAdapter:
    """The term that an adapter adds, as factors `a` and `b`; of a DoRA, the one before its magnitudes.

    AdaLoRA's values and VeRA's vectors are multiplied into the factors; LoHa's rank becomes its square.

    Raises:
      ValueError: The adapter is not additive, or its term is not a product of two factors.
    """
    if isinstance(node, AdaLoRAAdapter):
        node = node.folded()
    if isinstance(node, LoRAAdapter):
        return LoRAAdapter(**{field.name: getattr(node, field.name) for field in dataclasses.fields(LoRAAdapter)})
    factors = pair(node) if node.additive else None
    if factors is None or any(role == OUT for role in map(_role_in(node), factors.lead)):
        raise ValueError(f"the change that a {node.kind} adapter makes to its weight is no product of two factors.")
    form = term(node)
    assert form is not None
    a, b = factors.arrays()
    lead, shape = a.shape[: len(factors.lead) + 1], node.shape()
    in_sizes, out_sizes = ([size for size, role in zip(shape, node.axes) if role == r] for r in (IN, OUT))
    return LoRAAdapter(
        a=a.reshape(*lead, *in_sizes),
        b=b.reshape(*lead, *out_sizes),
        scale=jnp.ones((), jnp.float32),
        dropout=jnp.zeros((), jnp.float32) if form.dropout is None else form.dropout,
        axes=node.axes,
        blocks=(True,),
    )


def without_bias(node: Adapter) -> Adapter:
    """An adapter without the bias that it adds to outputs."""
    return dataclasses.replace(node, bias=None) if isinstance(node, LoRAAdapter) else node


def _role_in(node: Adapter):
    return lambda label: node.axes[int(label.split(".")[0])] if label[0].isdigit() else OUT


def _labels(factors: Iterable[Factor]) -> set[Label]:
    return {label for factor in factors for label in factor.labels}


def _float64(factor: Factor) -> Factor:
    array = np.asarray(factor.array)
    wide = np.complex128 if np.iscomplexobj(array) else np.float64
    return Factor(array.astype(wide), factor.labels)  # pyrefly: ignore[bad-argument-type]


def _product(
    einsum: Callable[..., Any], factors: Iterable[Factor], labels: Sequence[Label], sizes: Mapping[Label, int]
) -> Any:
    """The product of factors with the axes that `labels` names, computed in at least float32."""
    factors = list(factors)
    # Ones along labels that no factor has: one pair of factors may serve all layers.
    if lacking := [label for label in labels if label not in _labels(factors)]:
        factors.append(Factor(np.ones([sizes[x] for x in lacking], np.float32), tuple(lacking)))  # pyrefly: ignore
    number = {label: i for i, label in enumerate(dict.fromkeys((*labels, *sorted(_labels(factors)))))}
    operands: list[Any] = []
    for factor in factors:
        operands += [factor.array.astype(compute_dtype(factor.array.dtype)), [number[x] for x in factor.labels]]
    return einsum(*operands, [number[label] for label in labels])
