"""Algebra of low-rank deltas: scaling, and combination by several methods."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import checks
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.factored import compute_dtype
from lora_jax.adapters.fingerprints import needs_moved_base
from lora_jax.adapters.layouts import BATCH
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.adapters.terms import as_low_rank
from lora_jax.leaves import align_leading
from lora_jax.merging.factors import Spectrum, count_lead, from_spectrum, matrices, multiply, to_rank

METHODS = (
    "cat",
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "svd",
    "ties_svd",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune_svd",
)


def scale(delta: Delta, factor: float) -> dict[str, Adapter]:
    """Scales the change that a delta makes to each weight; −1 negates it.

    Raises:
      ValueError: An adapter does not add a term of its own (`Full`, `Rows`, DoRA); the factor is not finite.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> float(scale(delta, -0.5)["w"].scale)
      -0.5
    """
    check_adapters(delta)
    checks.finite("scale", "factor", factor)
    for path, node in delta.items():
        _need_term(path, node)
    return {path: dataclasses.replace(node, scale=node.scale * factor) for path, node in delta.items()}  # pyrefly: ignore


def combine(
    deltas: Sequence[Delta],
    weights: Sequence[float],
    *,
    method: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    majority: str = "total",
    key: jax.Array | None = None,
) -> dict[str, Adapter]:
    r"""Combines several deltas into one, :math:`\sum_i w_i \Delta W_i` or an approximation.

    Args:
      deltas: LoRA (and Offset) adapters, and others that add a product of two factors (LoRA-FA, AdaLoRA, VeRA,
        LoHa), which become LoRA; a path may be missing in some of them.
      weights: One for each; may be negative.
      method: 'cat' is exact; the ranks add up. 'svd' is the nearest of rank `rank`. 'linear' adds a to a
        and b to b (equal ranks; not the sum of the products). 'ties' and 'magnitude_prune' first select the largest
        entries of a and of b, 'dare_linear' and 'dare_ties' random ones, scaled up; the ties add only entries of
        the prevailing sign. The same names with `_svd` do so with ΔW, which is formed for it, and return the nearest
        of rank `rank`.
      rank: Of the result, for 'svd' and the `_svd` methods; None is the largest of the ranks.
      density: The fraction of entries that the pruning methods select, above 0 and at most 1.
      majority: How the ties elect a sign: 'total' of the entries or 'frequency' of signs.
      key: For the random methods.

    Returns:
      A delta of LoRA adapters of scale 1.

    Raises:
      ValueError: An adapter is not additive; ranks, axes or blocks differ although the method needs equal ones; an
        argument is missing or out of range.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> one, two = (lora.init(jax.random.key(i), base, {"w": lora.LoRA(2, axes=("in", "out"))}) for i in (0, 1))
      >>> combine([one, two], [0.7, 0.3])["w"].rank
      4

    References:
      Yadav et al., `TIES <https://arxiv.org/abs/2306.01708>`_, 2023, §4; Yu et al.,
      `DARE <https://arxiv.org/abs/2311.03099>`_, 2023, §3
    """
    if method not in METHODS:
        raise ValueError(f"combine(method={method!r}): expected one of {', '.join(map(repr, METHODS))}.")
    if isinstance(deltas, Mapping):
        raise TypeError("combine takes a list of deltas; got one dict. For one delta write combine([delta], [weight]).")
    if len(deltas) != len(weights) or not deltas:
        raise ValueError(f"combine: {len(deltas)} deltas and {len(weights)} weights; one for each, at least one.")
    for delta in deltas:
        check_adapters(delta)
    for weight in weights:
        checks.finite("combine", "weight", weight)
    if rank is not None:
        checks.positive("combine", "rank", rank)
    if density is not None:
        checks.finite("combine", "density", density)
    plain = method.removesuffix("_svd")
    if plain in ("ties", "dare_linear", "dare_ties", "magnitude_prune"):
        if density is None or not 0 < density <= 1:
            raise ValueError(f"combine(method={method!r}) needs a density above 0 and at most 1, not {density}.")
        if plain.startswith("dare") and key is None:
            raise ValueError(f"combine(method={method!r}) draws at random: give key=.")
    if majority not in ("total", "frequency"):
        raise ValueError(f"combine(majority={majority!r}): expected 'total' or 'frequency'.")
    combined: dict[str, Adapter] = {}
    for number, path in enumerate(dict.fromkeys(path for delta in deltas for path in delta)):
        terms = [(_term(path, delta[path]), weight) for delta, weight in zip(deltas, weights) if path in delta]
        if all(isinstance(node, OffsetAdapter) for node, _ in terms):
            combined[path] = _sum_of_offsets([(node, w) for node, w in terms if isinstance(node, OffsetAdapter)])
            continue
        nodes = [(node, w) for node, w in terms if isinstance(node, LoRAAdapter)]
        if len(nodes) < len(terms) or len({(n.shape(), n.axes, n.blocks) for n, _ in nodes}) > 1:
            raise ValueError(f"{path!r}: the adapters to combine have different kinds, shapes, axes or blocks.")
        _check_same_base(path, [node for node, _ in nodes])
        path_key = None if key is None else jax.random.fold_in(key, number)
        merge = _Merge(plain, density or 1.0, majority, path_key)
        try:
            combined[path] = _combined(nodes, method, rank, merge)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
    return combined


@dataclasses.dataclass(frozen=True)
class _Merge:
    """Prunes, elects and adds the entries of several arrays that are stacked along the first axis."""

    method: str
    density: float
    majority: str
    key: jax.Array | None

    def __call__(self, arrays: jax.Array, weights: jax.Array, lead: int, part: int) -> jax.Array:
        """Prunes the elements of the first `lead` axes after the stacking one separately; `part` selects the draw."""
        if self.method in ("ties", "magnitude_prune"):
            prune: Callable = lambda x: _largest(x, self.density)  # noqa: E731
            for _ in range(lead + 1):
                prune = jax.vmap(prune)
            arrays = prune(arrays)
        elif self.method.startswith("dare") and self.key is not None:
            mask = jax.random.bernoulli(jax.random.fold_in(self.key, part), self.density, arrays.shape)
            arrays = jnp.where(mask, arrays / self.density, 0.0)
        weighted = arrays * align_leading(weights, arrays.ndim)
        if self.method not in ("ties", "dare_ties"):
            return weighted.sum(axis=0)
        signs = jnp.sign(arrays)
        elected = (arrays if self.majority == "total" else signs).sum(axis=0, keepdims=True)
        agrees = signs == jnp.where(elected >= 0, 1.0, -1.0)
        return jnp.where(agrees, weighted, 0.0).sum(axis=0) / jnp.maximum(agrees.sum(axis=0), 1).astype(arrays.dtype)


def _largest(array: jax.Array, density: float) -> jax.Array:
    """The array with zeros for all but its largest entries."""
    flat = array.reshape(-1)
    _, largest = lax.top_k(jnp.abs(flat), int(density * flat.size))
    return jnp.zeros_like(flat).at[largest].set(flat[largest]).reshape(array.shape)


def _combined(nodes: list[tuple[LoRAAdapter, float]], method: str, rank: int | None, merge: _Merge) -> LoRAAdapter:
    first, lead = nodes[0][0], count_lead(nodes[0][0])
    dtype = _common([node.a.dtype for node, _ in nodes])
    if method in ("cat", "svd"):
        a = jnp.concatenate([multiply(n.a, n.scale, w) for n, w in nodes], axis=lead)
        b = jnp.concatenate([n.b.astype(jnp.float32) for n, _ in nodes], axis=lead)
        whole = dataclasses.replace(first, a=a, b=b, scale=jnp.ones((), jnp.float32))
        if method == "svd":
            whole = to_rank(whole, rank or max(node.rank for node, _ in nodes))
    elif method.endswith("_svd"):
        weights = jnp.array([w for _, w in nodes], jnp.float32)
        products = jnp.stack([_product(node) for node, _ in nodes])
        whole = _nearest(first, merge(products, weights, lead, 0), rank or max(node.rank for node, _ in nodes))
    else:
        if len({node.rank for node, _ in nodes}) > 1:
            raise ValueError(f"combine(method={method!r}) adds factors of equal rank; 'cat' and 'svd' take any.")
        parts = []
        for part, name in enumerate(("a", "b")):
            # √|w·s| on both factors, the sign on a alone
            arrays, roots = [], []
            for node, weight in nodes:
                if node.scale.ndim:
                    raise ValueError(
                        f"combine(method={method!r}) takes one scale an adapter; 'cat' and 'svd' take any."
                    )
                total = weight * node.scale
                root = jnp.sqrt(jnp.abs(total))
                roots.append(jnp.where(total < 0, -root, root) if name == "a" else root)
                arrays.append(getattr(node, name).astype(jnp.float32))
            # Blocks of one kernel are pruned together: they are one module.
            parts.append(merge(jnp.stack(arrays), jnp.stack(roots), first.axes.count(BATCH), part))
        whole = dataclasses.replace(first, a=parts[0], b=parts[1], scale=jnp.ones((), jnp.float32))
    bias = _sum_of_biases(nodes, method)
    return dataclasses.replace(whole, a=whole.a.astype(dtype), b=whole.b.astype(dtype), bias=bias)


def _sum_of_biases(nodes: list[tuple[LoRAAdapter, float]], method: str) -> jax.Array | None:
    biases = [(node.bias, node.scale, weight) for node, weight in nodes if node.bias is not None]
    if not biases:
        return None
    if method not in ("cat", "svd"):
        raise ValueError(f"combine(method={method!r}) takes no adapter with a bias; 'cat' and 'svd' add biases up.")
    return jnp.asarray(sum(multiply(*term) for term in biases), _common([bias.dtype for bias, *_ in biases]))


def _check_same_base(path: str, nodes: Sequence[LoRAAdapter]) -> None:
    """Raises `ValueError` if adapters have fingerprints of different bases; tracers are not compared."""
    needs: list[Any] = [node.fingerprint if needs_moved_base(node) else None for node in nodes]
    if not any(isinstance(need, jax.core.Tracer) for need in needs) and any(
        (one is None) != (needs[0] is None) or (one is not None and not np.array_equal(one, needs[0])) for one in needs
    ):
        raise ValueError(
            f"{path!r}: the adapters to combine need different bases, for lora_jax.prepare changed the base of some. "
            "lora_jax.to_plain_lora(delta, start) makes one for the original weights of each."
        )


def _common(dtypes: Sequence[jnp.dtype]) -> jnp.dtype:
    """The common dtype, or the widest and at least float32 if they differ."""
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    return widest if len(set(dtypes)) == 1 else compute_dtype(widest)


def _product(node: LoRAAdapter) -> jax.Array:
    """ΔW, `[*lead, in, out]`."""
    a, b = matrices(node)
    return multiply(jnp.matmul(a.mT, b, precision=lax.Precision.HIGHEST), node.scale)


def _nearest(like: LoRAAdapter, product: jax.Array, rank: int) -> LoRAAdapter:
    """The nearest low-rank adapter to ΔW, `[*lead, in, out]`."""
    u, values, vt = jnp.linalg.svd(product, full_matrices=False)
    like = dataclasses.replace(like, scale=jnp.ones((), jnp.float32))
    return from_spectrum(like, Spectrum(u.mT, values, vt), rank)


def _sum_of_offsets(nodes: list[tuple[OffsetAdapter, float]]) -> OffsetAdapter:
    first = nodes[0][0]
    dtype = _common([node.value.dtype for node, _ in nodes])
    value = sum(multiply(node.value, node.scale, weight) for node, weight in nodes)
    return dataclasses.replace(first, value=jnp.asarray(value, dtype), scale=jnp.ones((), jnp.float32))


def _term(path: str, node: Adapter) -> LoRAAdapter | OffsetAdapter:
    """The term of an adapter, in a form that can be combined."""
    _need_term(path, node)
    try:
        return node if isinstance(node, OffsetAdapter) else as_low_rank(node)
    except ValueError as error:
        raise ValueError(f"{path!r}: {error}") from None


def _need_term(path: str, node: Adapter) -> None:
    if node.nonlinear:
        raise ValueError(
            f"{path!r}: the {node.kind} adapter is a nonlinear function of the layer's output, of which there is no "
            "multiple and no sum. Leave it out, or use one of them."
        )
    if not node.additive:
        raise ValueError(f"{path!r}: the {node.kind} adapter is not additive, so it cannot be scaled.")
