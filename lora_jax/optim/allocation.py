"""AdaLoRA's rank allocation: a shrinking budget of triplets, kept by importance."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lora_jax import checks, paths
from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.protocol import is_adapter, is_inexact
from lora_jax.optim.extra import check_transform, update_with
from lora_jax.renamed import former_members


@former_members(kept="active")
class AllocationState(NamedTuple):
    """State of :func:`allocate_ranks`.

    Attributes:
      step: Number of updates done, an int32 scalar.
      active: By path, which triplets the last allocation did not prune; booleans of the shape of the adapter's values.
      sensitivity: By path, the moving average of \\|parameter · gradient\\|, elementwise.
      uncertainty: By path, the moving average of the sensitivity's deviation from its average.
      inner: The state of the wrapped transform.
    """

    step: jax.Array
    active: dict[str, jax.Array]
    sensitivity: dict[str, AdaLoRAAdapter]
    uncertainty: dict[str, AdaLoRAAdapter]
    inner: Any


# Saved states name `active` by its former name in their paths.
_KEYS = tuple(jax.tree_util.GetAttrKey("kept" if name == "active" else name) for name in AllocationState._fields)
jax.tree_util.register_pytree_with_keys(
    AllocationState,
    lambda state: (tuple(zip(_KEYS, state)), None),
    lambda _, fields: AllocationState(*fields),
    lambda state: (tuple(state), None),
)


def rank_budget(
    step: jax.typing.ArrayLike, initial: int, target: int, *, steps: int, warmup: int = 0, final: int = 0
) -> jax.Array:
    r"""Returns the number of active triplets: :math:`b_T + (b_0 - b_T)\,(1 - \frac{t - t_i}{T - t_i - t_f})^3`.

    The budget is :math:`b_0` up to step :math:`t_i`, and :math:`b_T` from step :math:`T - t_f` on.

    Args:
      step: t, integers of any shape; the first step is 0.
      initial: b₀, the number of triplets at the start of training.
      target: b_T, the number at the end.
      steps: T, the total number of steps.
      warmup: tᵢ, the number of initial steps without pruning.
      final: t_f, the number of final steps with a fixed selection.

    Returns:
      int32, of the shape of `step`; rounded down.

    Raises:
      ValueError: No step is left between warmup and final steps, or the target exceeds the initial budget.

    Example:
      >>> rank_budget([0, 10, 30, 50, 60], 24, 8, steps=60, warmup=10, final=10).tolist()
      [24, 24, 10, 8, 8]

    References:
      Zhang et al., `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023, §3.3
    """
    _check_schedule("rank_budget", steps, warmup, final)
    if not 0 <= target <= initial:
        raise ValueError(
            f"rank_budget(initial={initial}, target={target}): the target must be between 0 and the initial budget."
        )
    shrinking = steps - final - warmup
    remaining = jnp.clip(steps - final - jnp.asarray(step, jnp.int32), 0, shrinking).astype(jnp.float32) / shrinking
    return target + jnp.floor((initial - target) * remaining**3).astype(jnp.int32)


def orthogonality(delta: Any) -> jax.Array:
    r"""Returns AdaLoRA's orthogonality penalty, the mean of :math:`\lVert A A^\top - I \rVert_F`.

    The mean is over all factors a and b of the delta, with each layer and block as a separate matrix. As in the
    authors' code and PEFT, the norm is not squared (the paper sums squares). Add it to the loss:
    `loss + gamma * orthogonality(delta)`, with gamma 0.1 in the authors' scripts and 0.5 in PEFT.

    Args:
      delta: A delta, or its trainable half.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: The delta has no AdaLoRA adapter.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.AdaLoRA(2, axes=("in", "out"))})
      >>> round(float(orthogonality(delta)), 2)  # a and b are small: the norm of the 2 × 2 identity
      1.41

    References:
      Zhang et al., `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023, §3.1, Eq. 4
    """
    total, count = jnp.zeros((), jnp.float32), 0
    for node in _triplets(delta, "orthogonality").values():
        for factor in (node.a, node.b):
            rows = factor.astype(jnp.float32).reshape(*node.values.shape, -1)
            gram = jnp.matmul(rows, rows.mT, precision=lax.Precision.HIGHEST)
            squares = jnp.sum(
                jnp.square(gram - jnp.eye(node.rank, dtype=gram.dtype)[(None,) * (gram.ndim - 2)]), (-2, -1)
            )
            # The gradient of the square root is infinite at zero.
            norms = jnp.where(squares > 0.0, jnp.sqrt(jnp.where(squares > 0.0, squares, 1.0)), 0.0)
            total, count = total + jnp.sum(norms), count + norms.size
    return total / count


def allocate_ranks(
    tx: optax.GradientTransformation,
    target_rank: int,
    *,
    steps: int,
    warmup: int = 0,
    final: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that it prunes AdaLoRA's triplets down to a budget shared by all adapters.

    The sensitivity of a parameter is :math:`I = |w \cdot g|`, with its value after the step and the gradient before
    it, smoothed as :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I`, and
    :math:`\bar U \leftarrow \beta_2 \bar U + (1-\beta_2) |I - \bar I|`. The score of a triplet is
    :math:`\bar I\,\bar U` of its value plus the means of :math:`\bar I\,\bar U` over its rows of a and of b. Every
    `interval` steps, the values of all triplets except the :func:`rank_budget` best are set to zero. Pruned triplets
    continue to train and may become active at the next allocation. From step T − t_f on the selection is fixed. Of
    triplets with equal scores the first are pruned. Shapes do not change, so nothing is recompiled.

    Args:
      tx: The optimizer. It receives all gradients; updates of other adapters are returned unchanged. Do not chain a
        transform after this one, or pruned values would not remain zero.
      target_rank: The mean rank per matrix (of each layer and block) at the end of training.
      steps: T, the total number of steps.
      warmup: tᵢ, the number of initial steps without pruning.
      final: t_f, the number of final steps with a fixed selection.
      interval: ΔT, the number of steps between allocations.
      beta1: Decay rate of the sensitivity.
      beta2: Decay rate of the uncertainty.

    Returns:
      An Optax transform with the state :class:`AllocationState`; `update` needs `params`.

    Raises:
      ValueError: The schedule leaves no step for pruning, or an argument is out of range; (from `init`) there is no
        AdaLoRA adapter, or the target exceeds the initial rank.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, optax
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.AdaLoRA(3, axes=("in", "out"))})
      >>> train, frozen = lora.partition(delta)
      >>> tx = allocate_ranks(optax.sgd(0.1), target_rank=1, steps=3, final=1)
      >>> state = tx.init(train)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.tree.map(jnp.ones_like, train), state, train)
      ...     train = optax.apply_updates(train, updates)
      >>> int(jnp.count_nonzero(train["w"].values))
      1

    References:
      Zhang et al., `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023, §3.2–3.3, Algorithm 1
    """
    _check_schedule("allocate_ranks", steps, warmup, final)
    for name, count in (("target_rank", target_rank), ("interval", interval)):
        checks.positive("allocate_ranks", name, count)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"allocate_ranks({name}={beta}): expected a decay rate in [0, 1).")
    check_transform(tx, "allocate_ranks")
    last = min(steps - final, steps - 1)  # the step of the last allocation

    def init(params):
        nodes = _triplets(params, "allocate_ranks")
        initial, target = _sizes(nodes, target_rank)
        if target > initial:
            ranks = ", ".join(f"{path!r} {node.rank}" for path, node in nodes.items())
            raise ValueError(f"allocate_ranks(target_rank={target_rank}) exceeds the initial rank: {ranks}.")
        zeros = {path: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), node) for path, node in nodes.items()}
        active = {path: jnp.ones(node.values.shape, bool) for path, node in nodes.items()}
        # Copy, since no buffer of the state can be donated twice.
        return AllocationState(jnp.zeros((), jnp.int32), active, zeros, jax.tree.map(jnp.copy, zeros), tx.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("allocate_ranks(tx).update needs params: the importance is parameter times gradient.")
        gradients, before = _triplets(updates, "allocate_ranks"), _triplets(params, "allocate_ranks")
        updates, inner_state = update_with(tx, updates, state.inner, params, extra)
        after: Any = optax.apply_updates(before, _triplets(updates, "allocate_ranks"))

        selecting = state.step < last

        def smooth(average, new, beta):
            return jnp.where(selecting, beta * average + (1.0 - beta) * new, average)

        now = jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), after, gradients)
        sensitivity = jax.tree.map(lambda average, new: smooth(average, new, beta1), state.sensitivity, now)
        uncertainty = jax.tree.map(
            lambda average, new, mean: smooth(average, jnp.abs(new - mean), beta2), state.uncertainty, now, sensitivity
        )
        scores = {path: _score(jax.tree.map(jnp.multiply, sensitivity[path], uncertainty[path])) for path in before}
        initial, target = _sizes(before, target_rank)
        budget = rank_budget(state.step, initial, target, steps=steps, warmup=warmup, final=final)
        budget = jnp.where(state.step >= last, target, budget)  # without final steps, the schedule ends one step early
        due = selecting & (state.step > warmup) & (state.step % interval == 0) | (state.step == last)
        best = _best(scores, budget)
        active = {path: jnp.where(due, best[path], state.active[path]) for path in before}
        prune = due | (state.step > last)

        def set_to_zero(keys, node):
            path = paths.join(keys)
            if path not in before:
                return node
            values = before[path].values
            pruned = prune & ~active[path]
            return dataclasses.replace(node, values=jnp.where(pruned, -values, node.values.astype(values.dtype)))

        updates = jax.tree_util.tree_map_with_path(set_to_zero, updates, is_leaf=is_adapter)
        return updates, AllocationState(state.step + 1, active, sensitivity, uncertainty, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _triplets(tree: Any, function: str) -> dict[str, AdaLoRAAdapter]:
    """Returns the AdaLoRA adapters of a tree by path, without those that another transform masks."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_adapter)
    adapters = {
        paths.join(keys): node
        for keys, node in nodes
        if isinstance(node, AdaLoRAAdapter) and all(map(is_inexact, (node.a, node.values, node.b)))
    }
    if not adapters:
        kinds = sorted({node.kind for _, node in nodes if is_adapter(node)})
        actual = ", ".join(kinds) or "no adapters"
        raise ValueError(f"{function}: expected an AdaLoRA adapter among the parameters, got {actual}.")
    return adapters


def _sizes(nodes: dict[str, AdaLoRAAdapter], target_rank: int) -> tuple[int, int]:
    """Returns the initial and the final budget."""
    initial = sum(node.values.size for node in nodes.values())
    return initial, target_rank * sum(node.values.size // node.rank for node in nodes.values())


def _score(importance: AdaLoRAAdapter) -> jax.Array:
    """Returns the score of each triplet from the importance of its elements."""
    shape = importance.values.shape
    rows = [jnp.mean(x.reshape(*shape, -1), axis=-1) for x in (importance.a, importance.b)]
    return importance.values + rows[0] + rows[1]


def _best(scores: dict[str, jax.Array], budget: jax.Array) -> dict[str, jax.Array]:
    """Returns which scores are among the `budget` largest of all paths."""
    flat = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    ranks = jnp.argsort(jnp.argsort(flat))
    best = ranks >= flat.size - budget
    sizes = [score.size for score in scores.values()]
    offsets = [sum(sizes[:index]) for index in range(1, len(sizes))]
    return {path: part.reshape(scores[path].shape) for path, part in zip(scores, jnp.split(best, offsets))}


def _check_schedule(function: str, steps: int, warmup: int, final: int) -> None:
    if warmup < 0 or final < 0 or steps - warmup - final < 1:
        raise ValueError(
            f"{function}(steps={steps}, warmup={warmup}, final={final}): {steps} − {warmup} − {final} leaves no step "
            "for shrinking the budget."
        )
