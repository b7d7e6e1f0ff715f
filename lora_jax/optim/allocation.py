"""AdaLoRA's schedule: a budget of ranks that shrinks, spent on the triplets that matter most."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from lora_jax import paths
from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.protocol import is_adapter, is_inexact
from lora_jax.optim.extra import check_transform, update_with


class AllocationState(NamedTuple):
    """State of :func:`allocate_ranks`.

    Attributes:
      step: Updates done, an int32 scalar.
      kept: Per path, which triplets the last allocation kept; booleans of the shape of the adapter's values.
      sensitivity: Per path, the moving average of \\|parameter · gradient\\|, elementwise.
      uncertainty: Per path, the moving average of how far that is from its average.
      inner: The state of the wrapped transform.
    """

    step: jax.Array
    kept: dict[str, jax.Array]
    sensitivity: dict[str, AdaLoRAAdapter]
    uncertainty: dict[str, AdaLoRAAdapter]
    inner: Any


def rank_budget(
    step: jax.typing.ArrayLike, initial: int, target: int, *, steps: int, warmup: int = 0, final: int = 0
) -> jax.Array:
    r"""How many triplets are kept at a step: :math:`b_T + (b_0 - b_T)\,(1 - \frac{t - t_i}{T - t_i - t_f})^3`.

    It is :math:`b_0` up to step :math:`t_i`, and :math:`b_T` from step :math:`T - t_f` on.

    Args:
      step: t, integers of any shape; the first step is 0.
      initial: b₀, the number of triplets that training begins with.
      target: b_T, the number that it ends with.
      steps: T, of the whole training.
      warmup: tᵢ, first steps without pruning.
      final: t_f, last steps in which the choice is fixed.

    Returns:
      int32, of the shape of `step`; rounded down.

    Raises:
      ValueError: No step is left between the first and the last ones, or the target is above the initial budget.

    Example:
      >>> rank_budget([0, 10, 30, 50, 60], 24, 8, steps=60, warmup=10, final=10).tolist()
      [24, 24, 10, 8, 8]

    References:
      Zhang et al., `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023, §3.3
    """
    _check_schedule("rank_budget", steps, warmup, final)
    if not 0 <= target <= initial:
        raise ValueError(
            f"rank_budget(initial={initial}, target={target}): the target is from 0 to the initial budget."
        )
    shrinking = steps - final - warmup
    left = jnp.clip(steps - final - jnp.asarray(step, jnp.int32), 0, shrinking).astype(jnp.float32) / shrinking
    return target + jnp.floor((initial - target) * left**3).astype(jnp.int32)


def orthogonality(delta: Any) -> jax.Array:
    r"""How far AdaLoRA's factors are from orthonormal: the mean of :math:`\lVert A A^\top - I \rVert_F`.

    The mean is over all a and b of the delta, each layer and block a matrix of its own, and the norm is not
    squared: so do the authors' code and PEFT. (The paper adds up squares.) It is for the loss:
    `loss + gamma * orthogonality(delta)`, with gamma 0.1 in the authors' scripts and 0.5 in PEFT.

    Args:
      delta: A delta, or the half of it that trains.

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
            # The root has no gradient at zero.
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
    r"""Wraps an optimizer so that it prunes AdaLoRA's triplets down to a budget, all adapters together.

    The sensitivity of a parameter is :math:`I = |w \cdot g|` with its value after the step and the gradient before
    it, smoothed as :math:`\bar I \leftarrow \beta_1 \bar I + (1-\beta_1) I`, and
    :math:`\bar U \leftarrow \beta_2 \bar U + (1-\beta_2) |I - \bar I|`. A triplet scores
    :math:`\bar I\,\bar U` of its value plus the means of :math:`\bar I\,\bar U` over its rows of a and of b. Every
    `interval` steps the values of all but the :func:`rank_budget` best are set to zero; they go on training and may
    come back at the next time. From step T − t_f on the choice is fixed. Of equal scores the first are pruned.
    No shape changes, so nothing is compiled twice.

    Args:
      tx: The optimizer. It sees every gradient; other adapters' updates pass as it makes them. Nothing may follow
        that changes the updates, or pruned values would not be zero.
      target_rank: What the mean rank of a matrix (each layer and block is one) is brought down to.
      steps: T, of the whole training.
      warmup: tᵢ, first steps without pruning.
      final: t_f, last steps in which the choice is fixed.
      interval: ΔT, steps from one allocation to the next.
      beta1: Of the sensitivity.
      beta2: Of the uncertainty.

    Returns:
      An Optax transform with the state :class:`AllocationState`; `update` needs `params`.

    Raises:
      ValueError: The schedule leaves no step to prune in, or an argument is out of range; (from `init`) no adapter
        is an AdaLoRA's, or the target is above the rank that training begins with.

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
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"allocate_ranks({name}={count!r}): expected a positive integer.")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"allocate_ranks({name}={beta}): a decay is at least 0 and below 1.")
    check_transform(tx, "allocate_ranks")
    last = min(steps - final, steps - 1)  # the step of the last allocation

    def init(params):
        nodes = _triplets(params, "allocate_ranks")
        initial, target = _sizes(nodes, target_rank)
        if target > initial:
            ranks = ", ".join(f"{path!r} {node.rank}" for path, node in nodes.items())
            raise ValueError(f"allocate_ranks(target_rank={target_rank}) is above the rank to begin with: {ranks}.")
        zeros = {path: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), node) for path, node in nodes.items()}
        kept = {path: jnp.ones(node.values.shape, bool) for path, node in nodes.items()}
        # Copies: no buffer of the state can be donated twice.
        return AllocationState(jnp.zeros((), jnp.int32), kept, zeros, jax.tree.map(jnp.copy, zeros), tx.init(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("allocate_ranks(tx).update needs params: importance is parameter times gradient.")
        gradients, before = _triplets(updates, "allocate_ranks"), _triplets(params, "allocate_ranks")
        moved, inner_state = update_with(tx, updates, state.inner, params, extra)
        after: Any = optax.apply_updates(before, _triplets(moved, "allocate_ranks"))

        choosing = state.step < last

        def smooth(average, new, beta):
            return jnp.where(choosing, beta * average + (1.0 - beta) * new, average)

        now = jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), after, gradients)
        sensitivity = jax.tree.map(lambda average, new: smooth(average, new, beta1), state.sensitivity, now)
        uncertainty = jax.tree.map(
            lambda average, new, mean: smooth(average, jnp.abs(new - mean), beta2), state.uncertainty, now, sensitivity
        )
        scores = {path: _score(jax.tree.map(jnp.multiply, sensitivity[path], uncertainty[path])) for path in before}
        initial, target = _sizes(before, target_rank)
        budget = rank_budget(state.step, initial, target, steps=steps, warmup=warmup, final=final)
        budget = jnp.where(state.step >= last, target, budget)  # with no final phase, training ends a step too early
        due = choosing & (state.step > warmup) & (state.step % interval == 0) | (state.step == last)
        best = _best(scores, budget)
        kept = {path: jnp.where(due, best[path], state.kept[path]) for path in before}
        prune = due | (state.step > last)

        def pruned(keys, node):
            path = _path(keys)
            if path not in before:
                return node
            values = before[path].values
            gone = prune & ~kept[path]
            return dataclasses.replace(node, values=jnp.where(gone, -values, node.values.astype(values.dtype)))

        moved = jax.tree_util.tree_map_with_path(pruned, moved, is_leaf=is_adapter)
        return moved, AllocationState(state.step + 1, kept, sensitivity, uncertainty, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _triplets(tree: Any, function: str) -> dict[str, AdaLoRAAdapter]:
    """The AdaLoRA adapters of a tree by path; those that another transform masks are left out."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_adapter)
    found = {
        _path(keys): node
        for keys, node in nodes
        if isinstance(node, AdaLoRAAdapter) and all(map(is_inexact, (node.a, node.values, node.b)))
    }
    if not found:
        kinds = sorted({node.kind for _, node in nodes if is_adapter(node)})
        raise ValueError(f"{function}: there is no AdaLoRA adapter; there are {', '.join(kinds) or 'none at all'}.")
    return found


def _path(keys: Any) -> str:
    return "/".join(map(paths.segment, keys))


def _sizes(nodes: dict[str, AdaLoRAAdapter], target_rank: int) -> tuple[int, int]:
    """The budgets to begin and to end with."""
    initial = sum(node.values.size for node in nodes.values())
    return initial, target_rank * sum(node.values.size // node.rank for node in nodes.values())


def _score(importance: AdaLoRAAdapter) -> jax.Array:
    """The score of each triplet from the importance of its elements."""
    shape = importance.values.shape
    rows = [jnp.mean(x.reshape(*shape, -1), axis=-1) for x in (importance.a, importance.b)]
    return importance.values + rows[0] + rows[1]


def _best(scores: dict[str, jax.Array], budget: jax.Array) -> dict[str, jax.Array]:
    """Which entries are among the `budget` largest of all."""
    everything = jnp.concatenate([score.reshape(-1) for score in scores.values()])
    places = jnp.argsort(jnp.argsort(everything))
    best = places >= everything.size - budget
    sizes = [score.size for score in scores.values()]
    cuts = [sum(sizes[:number]) for number in range(1, len(sizes))]
    return {path: part.reshape(scores[path].shape) for path, part in zip(scores, jnp.split(best, cuts))}


def _check_schedule(function: str, steps: int, warmup: int, final: int) -> None:
    if warmup < 0 or final < 0 or steps - warmup - final < 1:
        raise ValueError(
            f"{function}(steps={steps}, warmup={warmup}, final={final}): {steps} − {warmup} − {final} leaves no step "
            "to shrink the budget in."
        )
