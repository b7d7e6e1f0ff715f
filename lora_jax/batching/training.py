"""Many adapters trained at once over one base: TrainStates and train_many()."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax import checks
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import Adapter
from lora_jax.batching.mapped import check_sizes, each
from lora_jax.batching.stacking import stack
from lora_jax.optim import partition
from lora_jax.optim.extra import check_serves, check_transform, init_for, update_with
from lora_jax.state import fields_with_shapes, replace_fields
from lora_jax.training import Metrics, Static, check_batch, check_state, explaining_donation
from lora_jax.transform import dropout_keys
from lora_jax.transform.call import Arguments, check_delta
from lora_jax.update import select, update_of

Delta = Mapping[str, Adapter]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainStates:
    """What a step of many trainings reads and, but for base and hyperparameters, changes.

    Attributes:
      base: Frozen parameters, which all members share.
      delta: The members' adapters, from :func:`lora_jax.stack`.
      opt_state: One a member; leaves are `[members, …]`.
      step: Steps done, int32 `[members]`.
      key: PRNG keys, `[members]`.
      hyper: Hyperparameters by name, `[members]` each.
      active: Which members train, booleans `[members]`; the others stay as they are, bit for bit.
      present: Per path that some member lacks, which members have it, booleans `[members]`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> base = {"w": jnp.ones((4, 4))}
      >>> deltas = [lora.init(jax.random.key(r), base, {"w": lora.LoRA(r, axes=("in", "out"))}) for r in (1, 2)]
      >>> states = TrainStates.create(base, deltas, optax.adam(1e-3), jax.random.split(jax.random.key(1)))
      >>> stopped = states.replace(active=jnp.array([True, False]))
    """

    base: Any
    delta: dict[str, Adapter]
    opt_state: Any
    step: jax.Array
    key: jax.Array
    hyper: dict[str, jax.Array]
    active: jax.Array
    present: dict[str, jax.Array]

    @classmethod
    def create(
        cls,
        base: Any,
        deltas: Sequence[Delta],
        tx: optax.GradientTransformation | Callable[..., optax.GradientTransformation],
        keys: Sequence[jax.Array] | jax.Array,
        hyper: Mapping[str, Any] | None = None,
    ) -> "TrainStates":
        """The states before the first step.

        Args:
          base: Parameters.
          deltas: The members, as for :func:`lora_jax.stack`; `lora_jax.unstack` gives them back.
          tx: As for :func:`train_many`.
          keys: A PRNG key a member.
          hyper: The arguments of `tx`, a value a member each.

        Raises:
          TypeError: An entry of `keys` is no PRNG key.
          ValueError: The deltas do not stack; there are not as many keys or values as deltas; there are values, and
            `tx` is a transform.
        """
        deltas, arguments = list(deltas), Arguments.create(base)
        for delta in deltas:
            check_delta(delta, arguments)
            check_base(delta, base)
        hyper = {name: jnp.asarray(values) for name, values in (hyper or {}).items()}
        for name, values in {"keys": keys, **hyper}.items():
            count = len(values) if isinstance(values, Sequence) or np.ndim(values) else "no vector of"
            if count != len(deltas):
                raise ValueError(f"TrainStates: {len(deltas)} deltas and {count} {name}; one for each.")
        for key in keys:
            checks.key("TrainStates.create(base, deltas, tx, keys)", key)
        delta = stack(deltas, base=base)
        present = {path: jnp.array([path in mine for mine in deltas]) for path in delta}
        present = {path: has for path, has in present.items() if not has.all()}
        where, members = "TrainStates.create", len(deltas)
        if not callable(tx):
            check_transform(tx, where)

        def init(delta, *fixed):
            train, frozen = partition(delta)
            of_member = _made(tx, *fixed)
            opt_state = init_for(of_member, train, where)
            check_serves(of_member, train, frozen, where)
            return opt_state

        return cls(
            base=base,
            delta=delta,
            # Copies: some transforms keep the parameters themselves, and no buffer can be donated twice.
            opt_state=jax.tree.map(jnp.copy, jax.jit(jax.vmap(init))(delta, hyper, present)),
            step=jnp.zeros(members, jnp.int32),
            key=jnp.stack(list(keys)),
            hyper=hyper,
            active=jnp.ones(members, bool),
            present=present,
        )

    def replace(self, **changes: Any) -> "TrainStates":
        """The states with some fields replaced, as :meth:`TrainState.replace`."""
        return replace_fields(self, changes)

    def __repr__(self) -> str:
        return fields_with_shapes(self)


def train_many(
    loss_fn: Callable,
    tx: optax.GradientTransformation | Callable[..., optax.GradientTransformation],
    *,
    accumulate: int = 1,
    has_aux: bool = False,
    donate: bool = True,
    skip_nonfinite: bool = False,
    batch_axes: Any = 0,
    at_once: int | None = None,
) -> Callable[[TrainStates, Any], tuple[TrainStates, Metrics]]:
    r"""Makes a compiled step that trains many adapters at once, as :func:`lora_jax.train_step` trains one.

    :math:`\Delta_k \leftarrow \Delta_k + u_k(\nabla_{\Delta_k} L(W, \Delta_k, B_k))` for all members k by one
    `jax.vmap`: the products with the base are those of all members' batches together. Members may differ in seeds,
    ranks, paths, batches and hyperparameters. The result is that of as many separate runs, for transforms that act
    entry by entry or through norms of the whole. One whose rule depends on a factor's shape or averages over its axes
    (`optax.adafactor`, `optax.contrib.muon`) sees the padding of a smaller rank.

    Args:
      loss_fn: As for :func:`lora_jax.train_step`; it sees one member.
      tx: An Optax transform for all members, or a function that makes one of hyperparameters
        (`lambda lr: optax.adam(lr)`), called with each member's own. These are traced: a function that branches on
        their values (as some schedules of Optax do) fails.
      accumulate: Microbatches a step.
      has_aux: As for :func:`lora_jax.train_step`; the leaves of `metrics["aux"]` are `[members, …]`.
      donate: As for :func:`lora_jax.train_step`.
      skip_nonfinite: As for :func:`lora_jax.train_step`, each member by itself.
      batch_axes: Which axis of the batch's leaves counts the members, as `in_axes` of `jax.vmap`; None gives every
        member the same batch.
      at_once: How many members run side by side; the others follow within the step. None is all of them. Fewer take
        less memory, and on a CPU, whose caches are small, less time.

    Returns:
      `step(states, batch) -> (states, metrics)`, metrics as those of :func:`lora_jax.train_step`, `[members]` each.
      Those of a member that is not active are of the update that it did not take. The buffers of deltas, optimizer
      states, steps and keys are donated.

    Raises:
      ValueError: `accumulate` or `at_once` is no positive integer. (From the step:) the batch is of another number of
        members, or cannot be divided by `accumulate`; the states have hyperparameters, and `tx` is a transform.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> fn = lambda base, x: x @ base["w"]
      >>> base, x = {"w": jnp.ones((4, 1))}, jnp.ones((2, 4))
      >>> deltas = [lora.init(jax.random.key(i), base, {"w": lora.LoRA(1)}, fn, x) for i in range(3)]
      >>> adapted = lora.adapt(fn)
      >>> loss = lambda base, delta, x, key: jnp.mean(adapted(base, delta, x, dropout_key=key) ** 2)
      >>> tx, keys = (lambda lr: optax.sgd(lr)), jax.random.split(jax.random.key(1), 3)
      >>> states = lora.TrainStates.create(base, deltas, tx, keys, {"lr": [0.1, 0.01, 0.001]})
      >>> states, metrics = train_many(loss, tx, batch_axes=None)(states, x)
      >>> metrics["loss"].tolist()
      [16.0, 16.0, 16.0]
      >>> [delta["w"].rank for delta in lora.unstack(states.delta, deltas)]
      [1, 1, 1]
    """

    if at_once is not None and (not isinstance(at_once, int) or isinstance(at_once, bool) or at_once < 1):
        raise ValueError(f"train_many(at_once={at_once!r}): the number of members is a positive integer, or None.")

    @functools.wraps(loss_fn)  # whose name and line errors give
    def loss(shared, delta, batch, key):
        base, present = shared
        # A path that the member lacks has no gradient, and so no part in a norm.
        return loss_fn(base, _held(delta, present), batch, key)

    calls: list[bool] = []
    update = update_of(
        dropout_keys.with_recording(loss, calls), accumulate, has_aux=has_aux, skip_nonfinite=skip_nonfinite
    )

    def body(static, arrays, carry, fixed, batch):
        base = static.restore(arrays)

        def member(carry, fixed, batch):
            hyper, active, present = fixed
            check_batch(batch, accumulate)
            (delta, *rest), metrics, aux = update(_made(tx, hyper, present), (base, present), carry, batch)
            old, *old_rest = carry
            delta = {path: select(active & present.get(path, True), delta[path], old[path]) for path in delta}
            return (delta, *select(active, rest, old_rest)), metrics | ({"aux": aux} if has_aux else {})

        members = len(fixed[1])
        if at_once is None or at_once >= members:
            return jax.vmap(member, in_axes=(0, 0, batch_axes))(carry, fixed, batch)

        def numbered(number):
            member_carry, member_fixed = jax.tree.map(lambda leaf: leaf[number], (carry, fixed))
            part = each(lambda leaf, axis: jnp.moveaxis(leaf, axis, 0)[number], batch_axes, batch)
            return member(member_carry, member_fixed, part)

        return jax.lax.map(numbered, jnp.arange(members), batch_size=at_once)

    compiled = jax.jit(body, donate_argnums=(2,) if donate else (), static_argnums=(0,))

    def step(states: TrainStates, batch: Any) -> tuple[TrainStates, Metrics]:
        check_state(states, TrainStates)
        members = len(states.active)
        check_sizes(members, batch_axes, batch, f"The states have {members} members; the batch has {{}}.")
        carry = (states.delta, states.opt_state, states.step, states.key)
        fixed = (states.hyper, states.active, states.present)
        static, arrays = Static.split(states.base)
        with explaining_donation(states):
            (delta, opt_state, number, key), metrics = compiled(static, arrays, carry, fixed, batch)
        dropout_keys.warn_without_key(calls, delta)
        return states.replace(delta=delta, opt_state=opt_state, step=number, key=key), metrics

    return step


def _made(tx, hyper: Mapping[str, jax.Array], present: Mapping[str, jax.Array]) -> optax.GradientTransformation:
    """The transform of one member, which sees zeros at paths that the member lacks.

    What stands there in the stack may be the base itself (of a Full that changes nothing), which weight decay would
    turn into updates, and these would count in a norm.
    """
    is_transform = not callable(tx)
    if is_transform and hyper:
        raise ValueError(f"Values of {', '.join(hyper)} are given, but tx is a transform, not a function of them.")
    inner = tx if is_transform else tx(**hyper)

    def seen(train):
        return {
            path: select(present[path], node, jax.tree.map(jnp.zeros_like, node)) if path in present else node
            for path, node in train.items()
        }

    def update(updates, state, params=None, **extra):
        return update_with(inner, updates, state, seen(params), extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(seen(params)), update)


def _held(delta: Delta, present: Mapping[str, jax.Array]) -> dict[str, Adapter]:
    """The delta, without gradients at paths that the member lacks."""

    def hold(path, node):
        if path not in present:
            return node
        return jax.tree.map(lambda leaf: jnp.where(present[path], leaf, jax.lax.stop_gradient(leaf)), node)

    return {path: hold(path, node) for path, node in delta.items()}
