"""truncate(): the nearest delta of smaller ranks."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.offset import OffsetAdapter
from lora_jax.adapters.protocol import Adapter, Delta
from lora_jax.adapters.terms import as_low_rank, is_low_rank
from lora_jax.leaves import align_leading
from lora_jax.merging.factors import Spectrum, from_spectrum, spectrum, to_rank


def truncate(delta: Delta, rank: int | None = None, *, energy: float | None = None) -> dict[str, Adapter]:
    r"""Returns the nearest delta whose adapters have smaller ranks (in the norm of ΔW).

    With `rank`, every adapter gets at most this rank. With `energy`, one threshold :math:`\tau` for the singular values
    :math:`\sigma_i` of all adapters decides, so that ranks differ by weight:
    :math:`\sum_{\sigma_i \ge \tau} \sigma_i^2 \ge \text{energy} \cdot \sum_i \sigma_i^2`, with the largest such
    :math:`\tau`. The error in the Frobenius norm of all ΔW together is then at most :math:`\sqrt{1 - \text{energy}}` of
    that norm.

    The singular value decomposition of ΔW is that of a rank × rank matrix between the orthogonal parts of the
    factors; ΔW is not formed.

    Args:
      delta: LoRA adapters, and others that add a product of two factors (LoRA-FA, AdaLoRA, VeRA, LoHa), which become
        LoRA if their rank is larger; adapters without a rank (`Full`, `Rows`, `IA3`, `Offset`) do not change.
      rank: The largest rank, at least 1.
      energy: The share of the squared Frobenius norm of all ΔW to preserve, above 0 and at most 1.

    Returns:
      The delta. With `energy`, an adapter without a singular value above the threshold is omitted, unless it has a
      bias; layers that are stacked in one adapter have the largest of their ranks, with zeros for the others.

    Raises:
      TypeError: Neither or both of `rank` and `energy` are passed.
      ValueError: The rank is not a positive integer; `energy` is not above 0 and at most 1, or the delta is traced or
        not finite; an adapter of a larger rank adds no product of two factors (DoRA, LoKr).

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base = {"v": jnp.ones((4, 3)), "w": jnp.ones((4, 3))}
      >>> recipe = lora.LoRA(3, axes=("in", "out"))
      >>> train, frozen = lora.partition(lora.init(jax.random.key(0), base, {"": recipe}))
      >>> delta = lora.join(jax.tree.map(lambda leaf: leaf + 1.0, train), frozen)
      >>> truncate(delta, 1)["w"].a.shape
      (1, 4)
      >>> larger = delta | lora.merging.scale({"w": delta["w"]}, 100.0)
      >>> {path: adapter.rank for path, adapter in truncate(larger, energy=0.999).items()}
      {'w': 1}

    References:
      Eckart and Young, 1936
    """
    check_adapters(delta)
    if rank is not None and energy is None:
        checks.positive("truncate", "rank", rank)
        terms = _terms(delta, rank, f"brought to rank {rank}")
        return dict(delta) | {path: to_rank(term, rank) for path, term in terms.items()}
    if energy is not None and rank is None:
        checks.finite("truncate", "energy", energy)
        return _to_energy(delta, energy)
    raise TypeError(
        "truncate: expected either rank or energy, as in truncate(delta, 4) or truncate(delta, energy=0.9)."
    )


def _terms(delta: Delta, rank: int, what: str) -> dict[str, LoRAAdapter]:
    """Returns the adapters of a larger rank as LoRA. Raises `ValueError` for one that adds no product of factors."""
    terms = {}
    for path, node in delta.items():
        if node.additive and is_low_rank(node):
            term = as_low_rank(node)
            if term.rank > rank:
                terms[path] = term
        elif (node.rank or 0) > rank or (node.additive and not isinstance(node, OffsetAdapter)):
            raise ValueError(
                f"{path!r}: what a {node.kind} adapter does to its weight cannot be {what} by its factors. Leave it "
                f"out{'' if node.nonlinear else ', or merge it'}."
            )
    return terms


def _to_energy(delta: Delta, energy: float) -> dict[str, Adapter]:
    if not 0 < energy <= 1:
        raise ValueError(f"truncate(energy={energy!r}): expected a number above 0 and at most 1.")
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(dict(delta))):
        raise ValueError(
            "truncate(energy=…) chooses the ranks by the values of the factors: call it outside of jax.jit."
        )
    terms = _terms(delta, 0, "truncated")
    spectra = {path: spectrum(term) for path, term in terms.items()}
    values = {path: _values(terms[path], parts) for path, parts in spectra.items()}
    for path, array in values.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{path!r}: the adapter has singular values that are NaN or infinite.")
    threshold = _threshold(values, energy)
    truncated = dict(delta)
    for path, parts in spectra.items():
        keep = (values[path] >= threshold) & (values[path] > 0)
        if not keep.any() and terms[path].bias is None:
            del truncated[path]
            continue
        masked = parts._replace(values=jnp.where(jnp.asarray(keep), parts.values, 0.0))
        truncated[path] = from_spectrum(terms[path], masked, max(1, int(keep.sum(axis=-1).max())))
    return truncated


def _values(term: LoRAAdapter, parts: Spectrum) -> np.ndarray:
    """Returns the singular values of ΔW, `float64[*lead, rank]`."""
    scale = align_leading(jnp.abs(term.scale), parts.values.ndim)
    return np.asarray(parts.values, np.float64) * np.asarray(scale, np.float64)


def _threshold(values: Mapping[str, np.ndarray], energy: float) -> float:
    """Returns the largest threshold above which the values have this share of the sum of all squares."""
    every = np.sort(np.concatenate([array.ravel() for array in values.values()] or [np.zeros(1)]))[::-1]
    total = np.cumsum(every**2)
    return float(every[np.searchsorted(total, energy * total[-1] * (1 - 1e-12))])
