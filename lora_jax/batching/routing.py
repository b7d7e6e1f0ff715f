"""Each example of a batch with its own adapter: route()."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.factored import Factor, Factored
from lora_jax.adapters.protocol import Adapter
from lora_jax.batching.stacking import count
from lora_jax.transform.members import MEMBER


def route(adapted: Callable, *, in_axes: Any = 0, out_axes: Any = 0, grouped: bool = False) -> Callable:
    r"""Makes an adapted function take a batch in which each example names its adapter.

    :math:`y_i = f(W, \Delta_{\mathrm{id}_i}, x_i)`, as `jax.vmap` over examples computes it: the products with the
    base are those of the whole batch, the low-rank ones each example's own. The shapes depend on the stack and the
    batch, not on the ids: one compiled function serves every mix, and what :func:`lora_jax.swap` puts into the stack.

    What an adapter takes from the weight itself (DoRA's norms) is computed for each member, not for each example.
    Leaves trained outright (Full) are copied for each example: meant for biases, norms and small heads.

    The function sees one example, without the batch axis. Functions that couple the examples of a batch (batch
    statistics, contrastive losses) are not supported: what an example would see of the others is not there.

    Args:
      adapted: From :func:`lora_jax.adapt`. `route(jax.jit(adapted))` checks ids on the host before it runs compiled
        code; `jax.jit(route(adapted))` cannot.
      in_axes: The batch axes of `*args`, as for `jax.vmap`: an int, None, or a tuple with an entry an argument.
      out_axes: The batch axes of the output, likewise.
      grouped: Sorts the examples by adapter, once, and runs the low-rank products of each adapter together
        (`jax.lax.ragged_dot`), with the stacked factors where they are; otherwise each example gets a copy of its
        factors. Meant for long sequences on accelerators; a CPU's ragged product computes every group in full.

    Returns:
      `routed(base, stacked, adapter_ids, /, *args, dropout_key=None, **kwargs)`. `stacked` is from
      :func:`lora_jax.stack`; `adapter_ids` is `[batch]`, integers. An id that is no member is an error where it can
      be read, and the base without an adapter where it is traced. Each example draws from a dropout key of its own.
      Every example sees the whole of `kwargs`.

    Raises:
      ValueError: (from `routed`) An id is out of range; the ids are no vector of integers, one an example.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: x @ base["w"]
      >>> base, x = {"w": jnp.ones((4, 3))}, jnp.ones((5, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2)}, fn, x)
      >>> stacked = lora.stack([{}, delta])
      >>> route(lora.adapt(fn))(base, stacked, [0, 1, 1, 0, 1], x).shape
      (5, 3)

    References:
      Wen and Chaudhuri, `Batched LoRA <https://arxiv.org/abs/2312.05677>`_, 2023, for the plain form; Chen et al.,
      `Punica <https://arxiv.org/abs/2310.18547>`_, 2023, §4, for the grouped one.
    """

    @functools.wraps(adapted)
    def routed(base, stacked, adapter_ids, /, *args, dropout_key=None, **kwargs):
        members = count(stacked)
        ids = _checked(adapter_ids, members)
        axes = in_axes if isinstance(in_axes, int | None) else tuple(in_axes)
        _each(functools.partial(_check_size, ids.shape[0]), axes, args)
        keys = None if dropout_key is None else jax.random.split(dropout_key, ids.shape[0])
        # Past the last member there is none: what is gathered there changes nothing.
        ids = jnp.where((ids >= 0) & (ids < members), ids, members)
        order = jnp.argsort(ids) if grouped else None
        if order is not None:
            ids, keys = jax.tree.map(lambda leaf: leaf[order], (ids, keys))
            args = _taken(args, axes, order)

        def one(member, key, args):
            delta = {path: Chosen(node, member, grouped) for path, node in stacked.items()}
            return adapted(base, delta, *args, dropout_key=key, **kwargs)

        out = jax.vmap(one, in_axes=(0, 0, axes), out_axes=out_axes)(ids, keys, args)
        return out if order is None else _taken(out, out_axes, jnp.argsort(order))

    return routed


def _checked(ids: Any, members: int) -> jax.Array:
    """The ids as an int32 vector; raises where one that can be read is out of range."""
    traced = isinstance(ids, jax.core.Tracer)
    found = ids if traced else np.asarray(ids)
    if found.ndim != 1 or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"adapter_ids is a vector of integers, one an example; got {found.dtype}{list(found.shape)}.")
    if not traced:
        bad = np.flatnonzero((found < 0) | (found >= members))
        if bad.size:
            raise ValueError(
                f"adapter_ids[{bad[0]}] is {found[bad[0]]}; the stack has {members} members, 0 to {members - 1}."
            )
    return jnp.asarray(found, jnp.int32)


def _check_size(examples: int, leaf: Any, axis: int) -> None:
    """Raises where a leaf of the batch has another number of examples than there are ids."""
    for size in np.shape(leaf)[axis:][:1]:
        if size != examples:
            raise ValueError(f"adapter_ids has {examples} entries; the batch has {size} examples.")


def _taken(tree: Any, axes: Any, order: jax.Array) -> Any:
    """The examples of a batch in another order."""
    return _each(lambda leaf, axis: jnp.take(leaf, order, axis=axis), axes, tree)


def _each(function: Callable[[Any, int], Any], axes: Any, tree: Any) -> Any:
    """The function of every leaf that has a batch axis and of that axis; `axes` as for `jax.vmap`."""

    def each(axis, part):
        return part if axis is None else jax.tree.map(lambda leaf: function(leaf, axis), part)

    axes = tuple(axes) if isinstance(tree, tuple) and isinstance(axes, list) else axes
    return jax.tree.map(each, axes, tree, is_leaf=lambda node: node is None)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stacked", "member"), meta_fields=("grouped",))
@dataclasses.dataclass(frozen=True)
class Chosen(Adapter):
    """One member of stacked adapters.

    Attributes:
      stacked: An adapter whose leaves have a leading member axis.
      member: Which; an int32 scalar. The number of members stands for none of them.
      grouped: Whether the factors keep the member axis, for products that run members together.
    """

    stacked: Adapter
    member: jax.Array
    grouped: bool

    @property
    def merged_because(self) -> str:  # pyrefly: ignore[bad-override]
        return self.stacked.merged_because

    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(lambda node: jax.tree.map(lambda leaf: leaf[0], node), self.stacked).shape()

    def factored(self, weight: jax.Array) -> Factored | None:
        # A form a member, not an example: what it costs (DoRA's norms) depends on the stack alone.
        forms: list[Factored] = []

        def arrays(node: Adapter):
            form = node.factored(weight)
            if form is None:
                return (), (), None
            forms.append(form)
            return form.factors, form.gains, form.dropout

        factors, gains, dropout = jax.vmap(arrays)(self.stacked)
        if not forms:
            return None
        if self.grouped:
            members = count({"": self.stacked})
            one = jax.nn.one_hot(self.member, members, dtype=factors[0].array.dtype) if factors else None
            factors = [Factor(factor.array, (MEMBER, *factor.labels)) for factor in factors]
            factors += [] if one is None else [Factor(one, (MEMBER,))]
        else:
            factors = [self._picked(factor, 0) for factor in factors]
        return dataclasses.replace(
            forms[0],
            factors=tuple(factors),
            gains=tuple(self._picked(gain, 1) for gain in gains),
            dropout=None if dropout is None else dropout.at[self.member].get(mode="fill", fill_value=0),
        )

    def _picked(self, factor: Factor, fill: float) -> Factor:
        return Factor(factor.array.at[self.member].get(mode="fill", fill_value=fill), factor.labels)

    def merge(self, weight: jax.Array) -> jax.Array:
        node = jax.tree.map(lambda leaf: leaf.at[self.member].get(mode="clip"), self.stacked)
        return jnp.where(self.member < count({"": self.stacked}), node.merge(weight), weight)
