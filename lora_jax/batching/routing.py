"""route(): applies a different adapter to each example of a batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.factored import Factor, Factored, is_factor
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import Adapter
from lora_jax.batching.mapped import check_sizes, map_with_axes
from lora_jax.batching.stacking import count_members
from lora_jax.leaves import is_array
from lora_jax.splitting import combine, split_by
from lora_jax.transform import signatures
from lora_jax.transform.members import MEMBER

_ONE_EXAMPLE = (
    "lora_jax.route calls the function on one example, without the batch axis. For a model of batches, route the "
    "adapted function of one example: lora.adapt(lambda base, x: model(base, x[None])[0])."
)


def route(adapted: Callable, *, in_axes: Any = 0, out_axes: Any = 0, grouped: bool = False) -> Callable:
    r"""Turns an adapted function into one of a batch in which each example selects its adapter.

    Computes :math:`y_i = f(W, \Delta_{\mathrm{id}_i}, x_i)` as `jax.vmap` over examples does: products with the base
    run over the whole batch, low-rank products per example. Shapes depend on the stack and the batch, not on the ids,
    so one compiled function serves every combination of ids, and every member that :func:`lora_jax.swap` inserts.

    Quantities that an adapter computes from the weight (DoRA's norms) are computed per member, not per example. Some
    weights are merged per example, as arrays `[batch, in, out]`: leaves with a `Full` adapter (meant for biases, norms
    and small heads) and weights used by an operation without a factored form (`x @ jnp.sin(w)`).
    :func:`lora_jax.explain` lists them.

    The function is called on one example, without the batch axis. A model of batches is routed as
    `route(adapt(lambda base, x: model(base, x[None])[0]))`. Functions that couple the examples of a batch (batch
    statistics, contrastive losses) are not supported.

    Args:
      adapted: From :func:`lora_jax.adapt`. `route(jax.jit(adapted))` checks ids on the host before it runs compiled
        code; `jax.jit(route(adapted))` cannot.
      in_axes: The batch axes of `*args`, as for `jax.vmap`: an int, None, or a tuple with one entry per argument.
        Leaves that are not arrays (flags, numbers) have no batch axis and are passed to each example.
      out_axes: The batch axes of the output, likewise.
      grouped: Sorts the examples by adapter once and computes the low-rank products of each adapter together
        (`jax.lax.ragged_dot`), without copying the stacked factors. Otherwise each example gets a copy of its factors.
        A weight that the function itself passes to `ragged_dot` gets copies in both forms, since its tokens are
        already sorted by expert. Meant for long sequences on accelerators; on CPUs a ragged product computes every
        group in full. Do not use it with a batch sharded over devices: sorting gathers the batch on every device, and
        is an error on explicit mesh axes.

    Returns:
      `routed(base, stacked, adapter_ids, <the model's parameters after its first>, *, dropout_key=None)`. Static and
      donated arguments are the same as for the model, by name or by position plus two. `stacked` is from
      :func:`lora_jax.stack`; `adapter_ids` is `[batch]`, integers. An id that is out of range is an error if it is
      concrete; if it is traced, the example uses the base without an adapter. Each example has its own dropout key.
      All of `kwargs` is passed to every example, so a PRNG key in it is shared by all: pass the keys of a module's own
      dropout in `*args`, as `jax.random.split(key, batch)` with the batch axis 0.

    Raises:
      TypeError: `adapted` is not callable; `in_axes` is neither an int, None, nor a tuple.
      ValueError: (from `routed`) An id is out of range; the ids are not a vector of integers, one per example.
      Exception: (from `routed`) What the function raises on one example, with a note that says so.

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

    if not isinstance(in_axes, int | tuple | list | None):
        raise TypeError(
            f"route: expected in_axes to be an int, None, or a tuple with one entry per argument; got "
            f"{type(in_axes).__name__}."
        )
    axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes

    if not callable(adapted):
        raise TypeError(f"route: expected a function from lora.adapt; got {type(adapted).__name__}.")
    leading = ("base", "stacked", "adapter_ids")
    signature = signatures.replace_leading(adapted, leading, skip=2, options=("dropout_key",))
    name = getattr(adapted, "__name__", "routed")

    def routed(*args, dropout_key=None, **kwargs):
        (base, stacked, adapter_ids), args, kwargs = signatures.split_leading(name, signature, 3, args, kwargs)
        args, static = split_by(jax.tree.map(is_array, args), args)
        members = count_members(stacked)
        check_base(stacked, base, warn=True)
        ids = _check_ids(adapter_ids, members)
        check_sizes(ids.shape[0], axes, args, f"adapter_ids has {ids.shape[0]} entries; the batch has {{}} examples.")
        keys = None if dropout_key is None else jax.random.split(dropout_key, ids.shape[0])
        # Ids out of range become `members`: a gather past the last member returns an adapter that changes nothing.
        ids = jnp.where((ids >= 0) & (ids < members), ids, members)
        if grouped:
            map_with_axes(_check_unsharded, axes, args)
            _check_unsharded(ids, 0)
        order = jnp.argsort(ids) if grouped else None
        if order is not None:
            ids, keys = jax.tree.map(lambda leaf: leaf[order], (ids, keys))
            args = map_with_axes(functools.partial(_take, order), axes, args)

        def run_example(member, key, args):
            delta = {path: SelectedAdapter(node, member, grouped) for path, node in stacked.items()}
            dropout = {} if key is None else {"dropout_key": key}
            try:
                return adapted(base, delta, *combine(args, static), **dropout, **kwargs)
            except Exception as error:
                error.add_note(_ONE_EXAMPLE)
                raise

        out = jax.vmap(run_example, in_axes=(0, 0, axes), out_axes=out_axes)(ids, keys, args)
        if order is None:
            return out
        return map_with_axes(functools.partial(_take, jnp.argsort(order)), out_axes, out)

    return signatures.copy_metadata(routed, adapted, signature)


def _check_unsharded(leaf: Any, axis: int) -> None:
    """Raises `ValueError` if a batch axis is sharded over explicit mesh axes, along which it cannot be sorted."""
    spec = jax.typeof(leaf).sharding.spec
    if any(spec[axis:][:1]):
        raise ValueError(
            f"route(grouped=True) does not support a batch that is sharded over devices; axis {axis} is, by {spec}."
        )


def _take(order: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
    return jnp.take(leaf, order, axis=axis)


def _check_ids(ids: Any, members: int) -> jax.Array:
    """Returns the ids as an int32 vector. Raises `ValueError` if a concrete id is out of range."""
    # Like a tracer, an array that spans several hosts has no values here.
    unreadable = isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True)
    ids = ids if unreadable else np.asarray(ids)
    ids = ids if ids.size else ids.astype(np.int32)  # np.asarray([]) is float64
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"adapter_ids: expected a vector of integers, one per example; got {ids.dtype}{list(ids.shape)}."
        )
    if not unreadable:
        bad = np.flatnonzero((ids < 0) | (ids >= members))
        if bad.size:
            raise ValueError(
                f"adapter_ids[{bad[0]}] is {ids[bad[0]]}; the stack has {members} members, 0 to {members - 1}."
            )
    return jnp.asarray(ids, jnp.int32)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("stacked", "member"), meta_fields=("grouped",))
@dataclasses.dataclass(frozen=True)
class SelectedAdapter(Adapter):
    """One member of a stacked adapter.

    Attributes:
      stacked: An adapter whose leaves have a leading member axis.
      member: The index of the member, an int32 scalar. The number of members means no adapter.
      grouped: Whether the factors keep the member axis, so that products of several members run together.
    """

    stacked: Adapter
    member: jax.Array
    grouped: bool

    @property
    def axes(self) -> tuple[str, ...]:  # pyrefly: ignore[bad-override]
        return self.stacked.axes

    @property
    def merged_because(self) -> str:  # pyrefly: ignore[bad-override]
        return self.stacked.merged_because

    def trainable(self) -> "SelectedAdapter":
        return dataclasses.replace(self, stacked=self.stacked.trainable(), member=False)

    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(lambda node: jax.tree.map(lambda leaf: leaf[0], node), self.stacked).shape()

    def factored(self, weight: jax.Array) -> Factored | None:
        # The factored form is computed per member, not per example, since it can be expensive (DoRA's norms).
        forms: list[Factored] = []

        def arrays(node: Adapter):
            form = node.factored(weight)
            if form is None:
                return (), (), None, None, None
            forms.append(form)
            return form.factors, form.gains, form.dropout, form.offset, form.on_output

        factors, gains, dropout, offset, on_output = jax.vmap(arrays)(self.stacked)
        if not forms:
            return None
        if self.grouped:
            members = count_members({"": self.stacked})
            one = jax.nn.one_hot(self.member, members, dtype=factors[0].array.dtype) if factors else None
            factors = [Factor(factor.array, (MEMBER, *factor.labels)) for factor in factors]
            factors += [] if one is None else [Factor(one, (MEMBER,))]
        else:
            factors = [self._select_factor(factor, 0) for factor in factors]
        return dataclasses.replace(
            forms[0],
            factors=tuple(factors),
            gains=tuple(self._select_factor(gain, 1) for gain in gains),
            dropout=None if dropout is None else self._select(dropout, 0),
            offset=None if offset is None else self._select_factor(offset, 0),
            on_output=jax.tree.map(lambda factor: self._select_factor(factor, 0), on_output, is_leaf=is_factor),
        )

    def _select_factor(self, factor: Factor, fill: float) -> Factor:
        return Factor(self._select(factor.array, fill), factor.labels)

    def _select(self, leaves: jax.Array, fill: float | None = None) -> jax.Array:
        """Indexes stacked leaves with the member. Past the last member, returns `fill`, or the last member's leaf."""
        mode = "clip" if fill is None else "fill"
        # On explicit mesh axes a gather needs the sharding of its result; vmap adds the axis of the ids.
        mesh, sharding = jax.typeof(self.member).sharding.mesh, None
        if not mesh.empty and not mesh.are_all_axes_auto:
            spec = jax.sharding.PartitionSpec(*jax.typeof(leaves).sharding.spec[1:])
            sharding = jax.sharding.NamedSharding(mesh, spec)
        return leaves.at[self.member].get(mode=mode, fill_value=fill, out_sharding=sharding)

    def merge(self, weight: jax.Array) -> jax.Array:
        node = jax.tree.map(self._select, self.stacked)
        return jnp.where(self.member < count_members({"": self.stacked}), node.merge(weight), weight)
