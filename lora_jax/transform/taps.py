"""Moments of the inputs of a weight, read without side effects.

A weight carries zeros, labeled by its batch and in axes. At a contraction the input passes through an identity
function whose derivative with respect to the zeros is defined as the moments of the input. The gradient of
any sum of the function's outputs with respect to the zeros is then what `jax.grad` adds up over all uses of the
weight, through jit, scan, remat and cond, a slice for each layer of a scan.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.adapters.factored import Factor, Label, chain
from lora_jax.adapters.protocol import BATCH, IN
from lora_jax.transform.ragged import ragged_outer
from lora_jax.transform.weight import CannotFactor, Term, Weight, probe, twin

Moments = tuple[jax.Array, jax.Array, jax.Array]
"""Σ x·xᵀ `[*batch, *in, *in]`, Σ x `[*batch, *in]` and the number of inputs `[*batch]`, float32."""


def zeros(shape: Sequence[int], axes: Sequence[str]) -> Moments:
    """The moments of no inputs, for a weight of this shape with these axis roles."""
    batch, inputs = ([n for n, role in zip(shape, axes) if role == chosen] for chosen in (BATCH, IN))
    return tuple(jnp.zeros(sizes, jnp.float32) for sizes in ([*batch, *inputs, *inputs], [*batch, *inputs], batch))  # pyrefly: ignore[bad-return]


def with_taps(path: str, value: jax.Array, axes: Sequence[str], moments: Moments) -> Weight:
    """A weight that reads its inputs; `moments` are zeros to differentiate with respect to."""
    batch, inputs = ([str(axis) for axis, role in enumerate(axes) if role == chosen] for chosen in (BATCH, IN))
    labels = ((*batch, *inputs, *map(twin, inputs)), (*batch, *inputs), tuple(batch))
    weight = probe(path, value)
    (term,) = weight.terms
    return weight.replace(terms=(term.replace(taps=tuple(map(Factor, moments, labels))),))


def check_whole(term: Term, contracted: Sequence[tuple[Label, int]]) -> None:
    """Raises `CannotFactor` unless the whole in axes of a weight are contracted, and nothing else."""
    labels = term.taps[0].labels
    in_labels = {label for label in labels if twin(label) in labels}
    missing = {label for label in labels if label.endswith("'")} - set(map(twin, in_labels))
    if missing or {label for label, size in contracted if size > 1 or label in in_labels} != in_labels:
        raise CannotFactor("other axes than its in axes are contracted")
    if any({source.axis(label) for label in in_labels} & source.sliced for source in term.sources):
        raise CannotFactor("only a part of its in axes is contracted")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _tapped(x, taps, measure):
    del taps, measure
    return x


def _forward(x, taps, measure):
    del taps, measure
    return x, x


def _backward(measure, x, cotangent):
    return cotangent, measure(x)


_tapped.defvjp(_forward, _backward)


def insert_taps(x: jax.Array, taps: Sequence[Factor], measure: Callable[[jax.Array], Moments]) -> jax.Array:
    """The input itself; the derivative with respect to the taps is `measure(x)`."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise CannotFactor(f"the input has dtype {x.dtype}")
    return _tapped(x, tuple(tap.array for tap in taps), measure)


def moments(x: jax.Array, labels: Sequence[tuple[Label, int]], taps: Sequence[Factor]) -> Moments:
    """The moments of an input whose axes are labeled, in the layout of the taps."""
    square, plain, count = ([(label, tap.sizes[label]) for label in tap.labels] for tap in taps)
    names = [label for label, _ in labels]
    inputs = {label for label, _ in square if twin(label) in dict(square)}
    wide = Factor(x.astype(jnp.float32), tuple(names))
    mirrored = Factor(wide.array, tuple(twin(label) if label in inputs else label for label in names))
    number = math.prod(size for label, size in labels if label not in inputs | {label for label, _ in count})
    return (
        chain(wide, [mirrored], square, precision=lax.Precision.HIGHEST),
        chain(wide, [], plain),
        jnp.full([size for _, size in count], number, jnp.float32),
    )


def ragged_moments(x: jax.Array, sizes: jax.Array) -> Moments:
    """The moments of the rows of each group."""
    wide = x.astype(jnp.float32)
    ones = jnp.ones((x.shape[0], 1), jnp.float32)
    exact = lax.Precision.HIGHEST
    return (
        ragged_outer(wide, wide, sizes, exact),
        ragged_outer(wide, ones, sizes, exact)[..., 0],
        sizes.astype(jnp.float32),
    )
