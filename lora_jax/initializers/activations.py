"""Factors from the inputs of the weight: EVA and CorDA."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax import checks
from lora_jax.initializers.decomposition import check_finite
from lora_jax.initializers.initializer import INPUTS, Factors, Initializer, Statistics, Target


@dataclasses.dataclass(frozen=True)
class EVA(Initializer):
    r"""a is the directions in which the inputs vary most, b = 0; layers whose inputs vary in few get smaller ranks.

    The rows of a are the leading principal components of the inputs. All matrices that one recipe adapts share a
    budget of rank × their number; it goes to the components with the largest shares of their layer's variance, at most
    ρ·rank to a matrix. The scale stays the recipe's. Layers stacked in one leaf have factors of one size:
    rows beyond a layer's own rank are zero in a and in b, and stay zero in training. A weight is left out if no
    matrix of it gets a component.

    The covariance is a difference of float32 sums about zero. With means 50 times the deviation of a direction, that
    direction is accurate to a cosine of 0.999999, 150 times to 0.9999, 500 times to 0.995; beyond, center the inputs.

    Args:
      rho: The largest rank as a multiple of the recipe's; 1 gives every matrix the same.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn = {"w": jnp.ones((3, 3))}, lambda base, x: x @ base["w"]
      >>> x = jnp.asarray([[1.0, 5.0, 0.0], [1.0, -5.0, 0.0]])
      >>> _, delta = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init=EVA())}, fn, [(x,)])
      >>> jnp.abs(delta["w"].a).round(4).tolist()
      [[0.0, 1.0, 0.0]]

    References:
      Paischer et al., `EVA <https://arxiv.org/abs/2410.07170>`_, 2024, §3
    """

    rho: float = 2.0

    reads = INPUTS

    def __post_init__(self):
        checks.finite("EVA", "rho", self.rho)
        if self.rho < 1.0:
            raise ValueError(f"EVA(rho={self.rho}): at least 1.")

    def make_factors(self, target: Target) -> Factors:
        assert target.inputs is not None and target.ranks is not None
        _, vectors = jnp.linalg.eigh(target.inputs.covariance())
        leading = jnp.flip(vectors, axis=2)[:, :, : target.rank].mT
        used = jnp.arange(target.rank)[None, :] < jnp.asarray(target.ranks)[:, None]
        a = jnp.where(used[:, :, None], leading, 0.0)
        return Factors(a, jnp.zeros((target.batch, target.rank, target.fan_out), jnp.float32))

    def allocate_ranks(
        self, rank: int, statistics: Mapping[str, Statistics], limits: Mapping[str, int], blocks: int
    ) -> dict[str, tuple[int, ...]]:
        shares, owners, counts = [], [], {}
        for path, stats in statistics.items():
            assert stats.inputs is not None
            if isinstance(stats.inputs.squares, jax.core.Tracer):
                raise ValueError(f"{path!r}: EVA decides ranks from values: call prepare outside of jit.")
            largest = min(round(rank * self.rho), limits[path])
            share = np.repeat(np.asarray(_shares(stats.inputs.covariance()))[:, :largest], blocks, axis=0)
            shares.append(share.ravel())
            owners += [(path, matrix) for matrix in range(share.shape[0]) for _ in range(share.shape[1])]
            counts[path] = [0] * share.shape[0]
        budget = rank * sum(map(len, counts.values()))
        pooled = np.concatenate(shares)
        best = [index for index in np.argsort(-pooled, kind="stable")[:budget] if pooled[index] > 0]
        if not best:
            raise ValueError(f"{', '.join(map(repr, counts))}: EVA leaves out all: no inputs vary in any direction.")
        for path, matrix in (owners[index] for index in best):
            counts[path][matrix] += 1
        return {path: tuple(ranks) for path, ranks in counts.items()}


def _shares(covariance: jax.Array) -> jax.Array:
    """The shares of the variance that principal components have, the largest first: `[batch, in]`."""
    values = jnp.flip(jnp.linalg.eigvalsh(covariance), axis=1)
    total = jnp.trace(covariance, axis1=1, axis2=2)[:, None]
    # Shares this small are the rounding errors of a variance of zero.
    rounding = values.shape[1] * jnp.finfo(values.dtype).eps
    shares = jnp.where(total > 0, values / jnp.where(total > 0, total, 1.0), 0.0)
    return jnp.where(shares > rounding, shares, 0.0)


DAMPING = 0.01
"""The fraction of the mean of the second moment's diagonal that is added to the diagonal, so that every direction has a
weight, as in the authors' code, which inverts the sum."""


@dataclasses.dataclass(frozen=True)
class CorDA(Initializer):
    r"""Singular directions of the weight, each as important as the inputs make it.

    With C the damped second moment of the inputs and :math:`CW = U\Sigma V^\top`, the weight is
    :math:`C^{-1}U\Sigma V^\top`. The chosen terms of this sum move into the factors.

    Args:
      keep_knowledge: False trains the largest terms, which the batches use most: pass batches of the new task
        (instruction-previewed mode). True trains the smallest and leaves the largest in the base: pass batches of
        the knowledge to preserve (knowledge-preserved mode).

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jnp.eye(2)}, lambda base, x: x @ base["w"], jnp.asarray([[1.0, 0.0]])
      >>> base, _ = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init=CorDA())}, fn, [(x,)])
      >>> jnp.diag(base["w"]).round(4).tolist()
      [0.0, 1.0]

    References:
      Yang et al., `CorDA <https://arxiv.org/abs/2406.05223>`_, 2024, §3
    """

    keep_knowledge: bool = False

    moves_weight = True
    reads = INPUTS

    def __post_init__(self):
        checks.flag("CorDA", "keep_knowledge", self.keep_knowledge)

    def make_factors(self, target: Target) -> Factors:
        assert target.inputs is not None
        squares = target.inputs.squares
        size = squares.shape[1]
        mean = jnp.trace(squares, axis1=1, axis2=2)[:, None, None] / size
        # A matrix without inputs (an expert that no token chose) is not weighted.
        damped = squares / jnp.where(mean > 0, mean, 1.0) + jnp.where(mean > 0, DAMPING, 1.0) * jnp.eye(size)[None]
        weighted = jnp.matmul(damped, target.weight.astype(damped.dtype), precision=lax.Precision.HIGHEST)
        check_finite(weighted)
        _, s, vt = jnp.linalg.svd(weighted, full_matrices=False)
        chosen = slice(-target.rank, None) if self.keep_knowledge else slice(target.rank)
        v, s = vt[:, chosen], s[:, chosen, None]
        # C⁻¹UΣ is WV: nothing is inverted.
        image = jnp.matmul(v, target.weight.mT, precision=lax.Precision.HIGHEST)
        a, b = image / jnp.sqrt(jnp.maximum(s, jnp.finfo(s.dtype).tiny) * target.scale), v * jnp.sqrt(s / target.scale)
        return Factors(a, b, target.residual(a, b))
