"""Merging deltas into weights, removing them, and exchanging them."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import paths
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.factored import compute_dtype
from lora_jax.adapters.fingerprints import check_base
from lora_jax.adapters.protocol import NO_BIAS, NONLINEAR, Adapter, Delta, with_frozen_stopped
from lora_jax.leaves import canonical, dequantized, is_finite, is_quantized
from lora_jax.transform.call import Arguments, check_delta

EXACT = 1e-5
"""The tolerance between two merges in float32, relative to the norm: the order of summation differs."""

QUANTIZED = 0.25
"""The same for a merged weight that was quantized; the error of four bits is less than half of it."""


def merge(base: Any, delta: Delta) -> Any:
    r"""Merges a delta into the weights: :math:`W + s\,A^\top B`, for inference without added latency.

    Args:
      base: Parameters; arrays of any dtype. They are neither changed nor donated.
      delta: From :func:`lora_jax.init`.

    Returns:
      A new tree of floats with the shapes, dtypes and shardings of `base`; an embedding and a head that `Full` replaces
      by larger ones (:func:`lora_jax.peft.load` of an adapter with an enlarged vocabulary) have the new shapes. Each
      sum is computed in float32 and rounded once. Quantized leaves are dequantized
      (:func:`lora_jax.merging.merge_quantized` quantizes them again); other leaves that the delta does not name are the
      same arrays.

    Raises:
      ValueError: A delta names a path that `base` lacks (the message names the nearest ones) or fits
        another shape; a merged weight is not finite although the base's is; the delta is from :func:`lora_jax.prepare`,
        and the base is not the one that it returned; an adapter has a bias on B (PEFT's `lora_bias`) of a layer that
        has none, or is a nonlinear function of the layer's output (`Bottleneck`), so that no weight holds it.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> bool((merge(base, delta)["w"] == base["w"]).all())
      True

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §4.1
    """
    return _changed(base, delta, lambda path, weight: with_frozen_stopped(delta[path]).merge(weight), merges=True)


def unmerge(params: Any, delta: Delta, base: Any = None) -> Any:
    """Removes a merged delta.

    Args:
      params: From :func:`merge`.
      delta: The merged delta.
      base: The parameters before the merge. With it the result is exact: the weights that the delta
        names are copied from it. Without it the delta's term is subtracted, exact to one rounding.

    Returns:
      The parameters without the delta.

    Raises:
      ValueError: Without `base`, for adapters that are not additive (`Full`, `Rows`, DoRA): the weight that they
        replaced cannot be computed. With it, if `params` are not `base` with the delta merged, to rounding.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"w": jnp.ones((4, 3))}
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"), init="gaussian")})
      >>> bool((unmerge(merge(base, delta), delta, base)["w"] == base["w"]).all())
      True
    """
    if base is not None:
        return _restored(params, delta, base)
    _need_additive(delta, "unmerge")
    base = _changed(params, delta, lambda path, weight: _added(weight, delta[path], -1.0))
    check_base(delta, base)
    return base


def switch_task(params: Any, old: Delta, new: Delta, base: Any = None) -> Any:
    """Exchanges one merged delta for another.

    Args:
      params: Parameters with `old` merged.
      old: The delta to remove.
      new: The delta to merge; it may adapt other weights.
      base: The parameters before any merge, for an exact exchange; otherwise W − ΔW_old + ΔW_new is
        computed in float32 and rounded once.

    Raises:
      ValueError: As :func:`unmerge`, for `old` and for the weights that both name.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, spec = {"w": jnp.ones((4, 3))}, {"w": lora.LoRA(2, axes=("in", "out"))}
      >>> one, two = (lora.init(jax.random.key(seed), base, spec) for seed in (1, 2))
      >>> bool(jnp.allclose(switch_task(merge(base, one), one, two)["w"], merge(base, two)["w"]))
      True

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §4.1
    """
    if base is not None:
        return merge(_restored(params, old, base), new)
    _need_additive(old, "switch_task")
    _need_additive({path: node for path, node in new.items() if path in old}, "switch_task")
    check_delta(new, Arguments.create(params))

    def exchange(path: str, weight: jax.Array) -> jax.Array:
        wide = weight.astype(compute_dtype(weight.dtype))
        if path in old:
            wide = _added(wide, old[path], -1.0)
        return (with_frozen_stopped(new[path]).merge(wide) if path in new else wide).astype(weight.dtype)

    return _changed(params, old, exchange, also=new)


def _added(weight: jax.Array, node: Adapter, sign: float) -> jax.Array:
    """The weight plus or minus an additive adapter's term, rounded once."""
    dtype = compute_dtype(weight.dtype)
    term = with_frozen_stopped(node).merge(jnp.zeros(weight.shape, dtype))
    return (weight.astype(dtype) + sign * term).astype(weight.dtype)


def _check_mergeable(delta: Delta) -> None:
    """Raises `ValueError` if an adapter does something to outputs that no leaf of the base can do."""
    for path, node in delta.items():
        if node.nonlinear:
            raise ValueError(f"{path!r}: {NONLINEAR}")
        if getattr(node, "bias", None) is not None:
            raise ValueError(f"{path!r}: {NO_BIAS}")


def _changed(params: Any, delta: Delta, change, also: Delta | None = None, *, merges: bool = False) -> Any:
    """Applies `change(path, weight)` to the weights that the delta names; `merges` if the parameters are its base."""
    check_delta(delta, Arguments.create(params), enlarged=merges)
    _check_mergeable(delta)
    _check_mergeable(also or {})
    if merges:
        check_base(delta, params)
    named = {*delta, *(also or {})}

    def of(path: str, leaf: Any) -> Any:
        weight = dequantized(leaf)
        if path not in named:
            return weight
        weight = canonical(weight)
        result = change(path, weight)
        if is_finite(weight) and not is_finite(result):
            raise ValueError(
                f"The merged weight {path!r} is not finite: the adapter holds NaN, Inf or values too large."
            )
        same = weight.shape == result.shape
        if same and _is_placed(weight) and _is_placed(result) and result.sharding != weight.sharding:
            result = jax.device_put(result, weight.sharding)
        return result

    return paths.flatten(params).map(of)


def _is_placed(array: Any) -> bool:
    """Whether an array is on devices, which a tracer is not."""
    return isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)


def _restored(params: Any, delta: Delta, base: Any) -> Any:
    arguments = Arguments.create(base)
    check_delta(delta, arguments)
    _check_mergeable(delta)
    check_base(delta, base)
    before, leaves = dict(zip(arguments.paths, arguments.arrays)), paths.flatten(params).as_dict()

    def restore(path: str, weight: jax.Array) -> jax.Array:
        original = jnp.asarray(dequantized(before[path]))
        rounding = QUANTIZED if is_quantized(leaves[path]) else max(EXACT, _precision(weight), _precision(original))
        if not _is_near(weight, delta[path].merge(original), original, rounding):
            raise ValueError(
                f"{path!r}: the parameters are not those of base with this delta merged: another base, another delta, "
                "or nothing was merged."
            )
        return original.astype(weight.dtype)

    return _changed(params, delta, restore)


def _is_near(weight: jax.Array, merged: jax.Array, original: jax.Array, rounding: float) -> bool:
    """Whether two weights are equal up to rounding, relative to the norms; tracers count as equal."""
    dtype = compute_dtype(weight.dtype)
    weight, merged, original = (array.astype(dtype) for array in (weight, merged, original))
    near = _norm(weight - merged) <= rounding * jnp.maximum(_norm(merged), _norm(original))
    return isinstance(near, jax.core.Tracer) or bool(near)


def _norm(array: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(jnp.abs(array))))


def _precision(array: jax.Array) -> float:
    return float(jnp.finfo(array.dtype).eps)


def _need_additive(delta: Delta, function: str) -> None:
    check_adapters(delta)
    _check_mergeable(delta)
    fixed = [path for path, node in delta.items() if not node.additive]
    if fixed:
        raise ValueError(
            f"{function} without base: the {delta[fixed[0]].kind} adapter of {fixed[0]!r} replaces its weight, which "
            f"cannot be computed back ({len(fixed)} such paths). Give base=."
        )
