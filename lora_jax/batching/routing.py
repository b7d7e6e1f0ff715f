"""Each example of a batch with its own adapter: route()."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.factored import Factor, Factored
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import Adapter
from lora_jax.batching.mapped import arrays_apart, check_sizes, each
from lora_jax.batching.stacking import count
from lora_jax.transform import signatures
from lora_jax.transform.members import MEMBER


def route(adapted: Callable, *, in_axes: Any = 0, out_axes: Any = 0, grouped: bool = False) -> Callable:
    r"""Makes an adapted function take a batch in which each example names its adapter.

    :math:`y_i = f(W, \Delta_{\mathrm{id}_i}, x_i)`, as `jax.vmap` over examples computes it: the products with the
    base are those of the whole batch, the low-rank ones each example's own. The shapes depend on the stack and the
    batch, not on the ids: one compiled function serves every mix, and what :func:`lora_jax.swap` puts into the stack.

    What an adapter takes from the weight itself (DoRA's norms) is computed for each member, not for each example.
    Weights that are merged are merged for each example, as arrays `[batch, in, out]`: leaves trained outright (Full,
    meant for biases, norms and small heads) and weights that meet an operation without a factored form
    (`x @ jnp.sin(w)`); :func:`lora_jax.explain` tells which they are.

    The function sees one example, without the batch axis. Functions that couple the examples of a batch (batch
    statistics, contrastive losses) are not supported: what an example would see of the others is not there.

    Args:
      adapted: From :func:`lora_jax.adapt`. `route(jax.jit(adapted))` checks ids on the host before it runs compiled
        code; `jax.jit(route(adapted))` cannot.
      in_axes: The batch axes of `*args`, as for `jax.vmap`: an int, None, or a tuple with an entry an argument. Leaves
        that are no arrays (flags, numbers) have none: each example sees them.
      out_axes: The batch axes of the output, likewise.
      grouped: Sorts the examples by adapter, once, and runs the low-rank products of each adapter together
        (`jax.lax.ragged_dot`), with the stacked factors where they are; otherwise each example gets a copy of its
        factors, as in both forms it does where its tokens are sorted by expert already (a weight that the function
        itself gives to `ragged_dot`). Meant for long sequences on accelerators; a CPU's ragged product computes every
        group in full. Not for a batch sharded over devices: sorting gathers it on each, or is refused (explicit axes).

    Returns:
      `routed(base, stacked, adapter_ids, <the model's parameters after its first>, *, dropout_key=None)`. Static and
      donated arguments are those of the model, by name and by position two later. `stacked` is from
      :func:`lora_jax.stack`; `adapter_ids` is `[batch]`, integers. An id that is no member is an error where it can
      be read, and the base without an adapter where it is traced. Each example draws from a dropout key of its own.
      Every example sees the whole of `kwargs`, a PRNG key there is the same for all: the keys of a module's own
      dropout go into `*args`, as `jax.random.split(key, batch)` with the batch axis 0.

    Raises:
      TypeError: `adapted` is not callable; `in_axes` is neither an int, None, nor a tuple.
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

    if not isinstance(in_axes, int | tuple | list | None):
        raise TypeError(
            f"route: in_axes is an int, None, or a tuple with an entry an argument; got {type(in_axes).__name__}."
        )
    axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes

    if not callable(adapted):
        raise TypeError(f"route takes a function from lora.adapt; got {type(adapted).__name__}.")
    leading = ("base", "stacked", "adapter_ids")
    signature = signatures.replace_leading(adapted, leading, skip=2, options=("dropout_key",))
    name = getattr(adapted, "__name__", "routed")

    def routed(*args, dropout_key=None, **kwargs):
        (base, stacked, adapter_ids), args, kwargs = signatures.split_leading(name, signature, 3, args, kwargs)
        args, whole = arrays_apart(args)
        members = count(stacked)
        check_base(stacked, base, warn=True)
        ids = _checked(adapter_ids, members)
        check_sizes(ids.shape[0], axes, args, f"adapter_ids has {ids.shape[0]} entries; the batch has {{}} examples.")
        keys = None if dropout_key is None else jax.random.split(dropout_key, ids.shape[0])
        # Past the last member there is none: what is gathered there changes nothing.
        ids = jnp.where((ids >= 0) & (ids < members), ids, members)
        if grouped:
            each(_check_whole, axes, args)
            _check_whole(ids, 0)
        order = jnp.argsort(ids) if grouped else None
        if order is not None:
            ids, keys = jax.tree.map(lambda leaf: leaf[order], (ids, keys))
            args = each(functools.partial(_taken, order), axes, args)

        def one(member, key, args):
            delta = {path: Chosen(node, member, grouped) for path, node in stacked.items()}
            dropout = {} if key is None else {"dropout_key": key}
            return adapted(base, delta, *whole(args), **dropout, **kwargs)

        out = jax.vmap(one, in_axes=(0, 0, axes), out_axes=out_axes)(ids, keys, args)
        return out if order is None else each(functools.partial(_taken, jnp.argsort(order)), out_axes, out)

    return signatures.copy_metadata(routed, adapted, signature)


def _check_whole(leaf: Any, axis: int) -> None:
    """Raises where a batch axis is sharded over explicit axes of a mesh, along which nothing can be sorted."""
    spec = jax.typeof(leaf).sharding.spec
    if any(spec[axis:][:1]):
        raise ValueError(
            f"route(grouped=True) takes no batch that is sharded over devices; its axis {axis} is: {spec}."
        )


def _taken(order: jax.Array, leaf: jax.Array, axis: int) -> jax.Array:
    return jnp.take(leaf, order, axis=axis)


def _checked(ids: Any, members: int) -> jax.Array:
    """The ids as an int32 vector; raises where one that can be read is out of range."""
    # Like a tracer, an array that spans hosts cannot be read on one of them.
    hidden = isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True)
    found = ids if hidden else np.asarray(ids)
    found = found if found.size else found.astype(np.int32)  # [] has no dtype of its own
    if found.ndim != 1 or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(f"adapter_ids is a vector of integers, one an example; got {found.dtype}{list(found.shape)}.")
    if not hidden:
        bad = np.flatnonzero((found < 0) | (found >= members))
        if bad.size:
            raise ValueError(
                f"adapter_ids[{bad[0]}] is {found[bad[0]]}; the stack has {members} members, 0 to {members - 1}."
            )
    return jnp.asarray(found, jnp.int32)


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

    def trainable(self) -> "Chosen":
        return dataclasses.replace(self, stacked=self.stacked.trainable(), member=False)

    def shape(self) -> tuple[int, ...]:
        return jax.eval_shape(lambda node: jax.tree.map(lambda leaf: leaf[0], node), self.stacked).shape()

    def factored(self, weight: jax.Array) -> Factored | None:
        # A form a member, not an example: what it costs (DoRA's norms) depends on the stack alone.
        forms: list[Factored] = []

        def arrays(node: Adapter):
            form = node.factored(weight)
            if form is None:
                return (), (), None, None
            forms.append(form)
            return form.factors, form.gains, form.dropout, form.offset

        factors, gains, dropout, offset = jax.vmap(arrays)(self.stacked)
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
            dropout=None if dropout is None else self._part(dropout, 0),
            offset=None if offset is None else self._picked(offset, 0),
        )

    def _picked(self, factor: Factor, fill: float) -> Factor:
        return Factor(self._part(factor.array, fill), factor.labels)

    def _part(self, leaves: jax.Array, fill: float | None = None) -> jax.Array:
        """The member's part of stacked leaves; past the last member it is `fill`, or that of the last."""
        mode = "clip" if fill is None else "fill"
        # On a mesh with explicit axes a lookup is told how its result is sharded; vmap adds the axis of the ids.
        mesh, sharding = jax.typeof(self.member).sharding.mesh, None
        if not mesh.empty and not mesh.are_all_axes_auto:
            spec = jax.sharding.PartitionSpec(*jax.typeof(leaves).sharding.spec[1:])
            sharding = jax.sharding.NamedSharding(mesh, spec)
        return leaves.at[self.member].get(mode=mode, fill_value=fill, out_sharding=sharding)

    def merge(self, weight: jax.Array) -> jax.Array:
        node = jax.tree.map(self._part, self.stacked)
        return jnp.where(self.member < count({"": self.stacked}), node.merge(weight), weight)
