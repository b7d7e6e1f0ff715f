"""TrainStates and train_many(): trains many adapters on one base at once."""

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
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.batching.mapped import check_sizes, map_with_axes
from lora_jax.batching.stacking import stack
from lora_jax.compiled import Metrics, Step
from lora_jax.optim import partition
from lora_jax.optim.extra import check_transform, check_usable, init_optimizer, update_with
from lora_jax.splitting import Static
from lora_jax.state import fields_with_shapes, replace_fields
from lora_jax.step_checks import check_batch, check_state
from lora_jax.transform import dropout_keys
from lora_jax.transform.call import Arguments, check_delta
from lora_jax.update import make_update, select


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainStates:
    """The state of several training runs. A step updates everything but `base`, `hyper`, `active` and `present`.

    Attributes:
      base: Frozen parameters, shared by all members.
      delta: The members' adapters, from :func:`lora_jax.stack`.
      opt_state: The members' optimizer states; leaves are `[members, …]`.
      step: Number of steps done, int32 `[members]`.
      key: PRNG keys, `[members]`.
      hyper: Hyperparameters by name, each `[members]`.
      active: Which members train, booleans `[members]`; the states of others do not change, bit for bit.
      present: For each path that some member lacks, which members have it, booleans `[members]`.

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
        """Creates the states before the first step.

        Args:
          base: Parameters.
          deltas: The members, as for :func:`lora_jax.stack`; :func:`lora_jax.unstack` returns them.
          tx: As for :func:`train_many`.
          keys: PRNG keys, one per member.
          hyper: The arguments of `tx` by name, each with one value per member.

        Raises:
          TypeError: An entry of `keys` is not a PRNG key.
          ValueError: The deltas cannot be stacked; the number of keys or values is not that of deltas; there are
            hyperparameters, and `tx` is an Optax transform.
        """
        deltas, arguments = list(deltas), Arguments.create(base)
        for delta in deltas:
            check_delta(delta, arguments)
            check_base(delta, base)
        hyper = {name: jnp.asarray(values) for name, values in (hyper or {}).items()}
        for name, values in {"keys": keys, **hyper}.items():
            if not isinstance(values, Sequence) and not np.ndim(values):
                raise ValueError(f"TrainStates.create: expected {name} to be a vector, with one entry per delta.")
            if len(values) != len(deltas):
                raise ValueError(
                    f"TrainStates.create: got {len(deltas)} deltas and {len(values)} {name}; expected one per delta."
                )
        for key in keys:
            checks.key("TrainStates.create(base, deltas, tx, keys)", key)
        delta = stack(deltas, base=base)
        present = {path: jnp.array([path in member for member in deltas]) for path in delta}
        present = {path: mask for path, mask in present.items() if not mask.all()}
        where, members = "TrainStates.create", len(deltas)
        if not callable(tx):
            check_transform(tx, where)

        def init(delta, *fixed):
            train, frozen = partition(delta)
            member_tx = _make_transform(tx, *fixed)
            opt_state = init_optimizer(member_tx, train, where)
            check_usable(member_tx, train, frozen, where)
            return opt_state

        return cls(
            base=base,
            delta=delta,
            # Some transforms store the parameters themselves. Copy, since no buffer can be donated twice.
            opt_state=jax.tree.map(jnp.copy, jax.jit(jax.vmap(init))(delta, hyper, present)),
            step=jnp.zeros(members, jnp.int32),
            key=jnp.stack(list(keys)),
            hyper=hyper,
            active=jnp.ones(members, bool),
            present=present,
        )

    def replace(self, **changes: Any) -> "TrainStates":
        """Returns the states with some fields replaced, as :meth:`TrainState.replace` does."""
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
) -> Step[TrainStates]:
    r"""Returns a compiled step that trains many adapters at once, as :func:`lora_jax.train_step` trains one.

    Computes :math:`\Delta_k \leftarrow \Delta_k + u_k(\nabla_{\Delta_k} L(W, \Delta_k, B_k))` for all members k by one
    `jax.vmap`, so that a product with the base covers the batches of all members. Members may differ in seeds, ranks,
    paths, batches and hyperparameters. The results equal those of separate runs for transforms that act elementwise or
    through global norms. A transform that depends on a factor's shape or averages over its axes (`optax.adafactor`,
    `optax.contrib.muon`) is affected by the padding of smaller ranks.

    Args:
      loss_fn: As for :func:`lora_jax.train_step`; it is called on one member.
      tx: An Optax transform for all members, or a function from hyperparameters to a transform
        (`lambda lr: optax.adam(lr)`), called with the hyperparameters of each member. These are traced: a function that
        branches on their values (as some Optax schedules do) fails.
      accumulate: Number of microbatches per step.
      has_aux: As for :func:`lora_jax.train_step`; the leaves of `metrics["aux"]` are `[members, …]`.
      donate: As for :func:`lora_jax.train_step`.
      skip_nonfinite: As for :func:`lora_jax.train_step`, for each member separately.
      batch_axes: The member axes of the batch's leaves, as `in_axes` of `jax.vmap`; None passes the same batch to
        every member.
      at_once: Number of members that run in parallel; the others follow within the same step. None runs all in
        parallel. A smaller number takes less memory and, on CPUs with small caches, less time.

    Returns:
      `step(states, batch) -> (states, metrics)`, with the metrics of :func:`lora_jax.train_step`, each `[members]`.
      The metrics of an inactive member describe the update that was not applied. The buffers of deltas, optimizer
      states, steps and keys are donated. `step.lower(states, batch)` is as for :func:`lora_jax.train_step`.

    Raises:
      ValueError: `accumulate` or `at_once` is not a positive integer. (From the step:) the batch has another number of
        members, or cannot be divided by `accumulate`; the states have hyperparameters, and `tx` is an Optax transform.

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

    if at_once is not None:
        checks.positive("train_many", "at_once", at_once)

    @functools.wraps(loss_fn)  # errors name the function and its line
    def loss(shared, delta, batch, key):
        base, present = shared
        # Paths that the member lacks must have no gradient, so that they do not count in norms.
        return loss_fn(base, _stop_absent(delta, present), batch, key)

    calls: list[bool] = []
    update = make_update(
        dropout_keys.with_recording(loss, calls), accumulate, has_aux=has_aux, skip_nonfinite=skip_nonfinite
    )

    def body(static, arrays, carry, fixed, batch):
        base = static.restore(arrays)

        def member(carry, fixed, batch):
            hyper, active, present = fixed
            check_batch(batch, accumulate)
            (delta, *rest), metrics, aux = update(_make_transform(tx, hyper, present), (base, present), carry, batch)
            old, *old_rest = carry
            delta = {path: select(active & present.get(path, True), delta[path], old[path]) for path in delta}
            return (delta, *select(active, rest, old_rest)), metrics | ({"aux": aux} if has_aux else {})

        members = len(fixed[1])
        if at_once is None or at_once >= members:
            return jax.vmap(member, in_axes=(0, 0, batch_axes))(carry, fixed, batch)

        def run_member(index):
            member_carry, member_fixed = jax.tree.map(lambda leaf: leaf[index], (carry, fixed))
            member_batch = map_with_axes(lambda leaf, axis: jnp.moveaxis(leaf, axis, 0)[index], batch_axes, batch)
            return member(member_carry, member_fixed, member_batch)

        return jax.lax.map(run_member, jnp.arange(members), batch_size=at_once)

    compiled = jax.jit(body, donate_argnums=(2,) if donate else (), static_argnums=(0,))

    def arguments(states: TrainStates, batch: Any) -> tuple[Any, ...]:
        check_state(states, TrainStates)
        members = len(states.active)
        check_sizes(members, batch_axes, batch, f"The states have {members} members; the batch has {{}}.")
        carry = (states.delta, states.opt_state, states.step, states.key)
        fixed = (states.hyper, states.active, states.present)
        static, arrays = Static.split(states.base)
        return static, arrays, carry, fixed, batch

    def finish(states: TrainStates, args: tuple[Any, ...], results: Any) -> tuple[TrainStates, Metrics]:
        (delta, opt_state, number, key), metrics = results
        dropout_keys.warn_without_key(calls, delta)
        return states.replace(delta=delta, opt_state=opt_state, step=number, key=key), metrics

    return Step.create(arguments, lambda args: compiled, finish, static=1)


def _make_transform(
    tx, hyper: Mapping[str, jax.Array], present: Mapping[str, jax.Array]
) -> optax.GradientTransformation:
    """Returns the transform of one member, which receives zeros as the parameters at paths that the member lacks.

    The stack may hold the base's weight there (of a `Full` that does not change it). Weight decay would turn it into
    updates, which would count in norms.
    """
    is_transform = not callable(tx)
    if is_transform and hyper:
        raise ValueError(
            f"Got hyperparameters {', '.join(hyper)}, but tx is an Optax transform: pass a function of them."
        )
    inner = tx if is_transform else tx(**hyper)

    def mask_absent(train):
        return {
            path: select(present[path], node, jax.tree.map(jnp.zeros_like, node)) if path in present else node
            for path, node in train.items()
        }

    def update(updates, state, params=None, **extra):
        return update_with(inner, updates, state, mask_absent(params), extra)

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(mask_absent(params)), update)


def _stop_absent(delta: Delta, present: Mapping[str, jax.Array]) -> dict[str, Adapter]:
    """Stops gradients at the paths that the member lacks."""

    def stop(path, node):
        if path not in present:
            return node
        return jax.tree.map(lambda leaf: jnp.where(present[path], leaf, jax.lax.stop_gradient(leaf)), node)

    return {path: stop(path, node) for path, node in delta.items()}
