"""Factors made of a part of the weight, which leaves the base: PiSSA, MiLoRA and OLoRA."""

import dataclasses

import jax.numpy as jnp

from lora_jax import checks
from lora_jax.initializers.decomposition import singular_triplets
from lora_jax.initializers.initializer import Factors, Initializer, Target


@dataclasses.dataclass(frozen=True)
class PiSSA(Initializer):
    r"""The largest singular values of the weight: :math:`s\,a^\top b = U_r\Sigma_r V_r^\top`, with both factors √Σ.

    Args:
      niter: Subspace iterations of a randomized decomposition, for large matrices (16 in the authors' scripts); None
        for the exact one.

    In a quantized base the remaining weight is quantized again, which changes the initial outputs. The error is that of
    a smaller weight, without the largest singular values.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jnp.diag(jnp.asarray([3.0, 2.0]))}, lambda base, x: x @ base["w"], jnp.ones((1, 2))
      >>> base, delta = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init=PiSSA())}, fn, [(x,)])
      >>> base["w"].round(4).tolist()
      [[0.0, 0.0], [0.0, 2.0]]

    References:
      Meng et al., `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024, §3
    """

    niter: int | None = None

    moves_weight = True

    def __post_init__(self):
        if self.niter is not None:
            checks.positive("PiSSA", "niter", self.niter)

    def make_factors(self, target: Target) -> Factors:
        u, s, v = singular_triplets(target.weight, target.rank, niter=self.niter, key=target.key)
        root = jnp.sqrt(s / target.scale)[:, :, None]
        return Factors(root * u, root * v, target.residual(root * u, root * v))


@dataclasses.dataclass(frozen=True)
class MiLoRA(Initializer):
    r"""The smallest singular values of the weight, the reverse of :class:`PiSSA`: the base keeps the principal part.

    A direction whose singular value is zero starts from zero factors, which stay zero.

    In a quantized base the remaining weight, almost the whole one, is quantized again: the initial outputs change by
    about the error of quantizing the weight. To avoid a second rounding, start from the base in floats and
    quantize the base that `prepare` returns.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jnp.diag(jnp.asarray([3.0, 2.0]))}, lambda base, x: x @ base["w"], jnp.ones((1, 2))
      >>> base, delta = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init=MiLoRA())}, fn, [(x,)])
      >>> base["w"].round(4).tolist()
      [[3.0, 0.0], [0.0, 0.0]]

    References:
      Wang et al., `MiLoRA <https://arxiv.org/abs/2406.09044>`_, 2024, §3
    """

    moves_weight = True

    def make_factors(self, target: Target) -> Factors:
        u, s, v = singular_triplets(target.weight, min(target.fan_in, target.fan_out))
        a, b = (jnp.sqrt(s / target.scale)[:, -target.rank :, None] * vectors[:, -target.rank :] for vectors in (u, v))
        return Factors(a, b, target.residual(a, b))


@dataclasses.dataclass(frozen=True)
class OLoRA(Initializer):
    """The first columns of Q and rows of R, where QR is the weight as `[out, in]`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jnp.ones((2, 2))}, lambda base, x: x @ base["w"], jnp.ones((1, 2))
      >>> _, delta = lora.prepare(jax.random.key(0), base, {"w": lora.LoRA(1, init=OLoRA())}, fn, [(x,)])
      >>> jnp.sum(delta["w"].b ** 2).round(4).item()
      1.0

    References:
      Büyükakyüz, `OLoRA <https://arxiv.org/abs/2406.01775>`_, 2024, §3
    """

    moves_weight = True

    def make_factors(self, target: Target) -> Factors:
        q, r = jnp.linalg.qr(target.weight.mT)
        a, b = r[:, : target.rank], q[:, :, : target.rank].mT
        return Factors(a, b, target.residual(a, b))
