"""Factors from the gradient of a loss: LoRA-GA."""

import dataclasses

from lora_jax import checks
from lora_jax.initializers.decomposition import singular_triplets
from lora_jax.initializers.initializer import GRADIENT, Factors, Initializer, Target

NITER = 4
"""Subspace iterations, on a sketch of four times the rank; as in the authors' code."""


@dataclasses.dataclass(frozen=True)
class LoRAGA(Initializer):
    r"""Factors whose first step is nearest to the first step of full fine-tuning.

    With the mean gradient :math:`G = \sum_i \sigma_i u_i v_i^\top` (u of the in axes, v of the out axes), a is
    :math:`u_1 \dots u_r` and b is :math:`v_{r+1} \dots v_{2r}`, each times :math:`\sqrt[4]{d_{out}} / \sqrt\gamma`. The
    product leaves the base. (PEFT multiplies b by σ too and leaves a as it is.)

    Args:
      gamma: Divides the product.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> base, fn, x = {"w": jnp.eye(4)}, lambda base, x: x @ base["w"], jnp.ones((2, 4))
      >>> spec, loss = {"w": lora.LoRA(1, init=LoRAGA())}, lambda base, x: jnp.sum(fn(base, x) ** 2)
      >>> base, delta = lora.prepare(jax.random.key(0), base, spec, fn, [(x,)], loss=loss)
      >>> round(float(jnp.linalg.norm(delta["w"].a)), 4)
      0.3536

    References:
      Wang et al., `LoRA-GA <https://arxiv.org/abs/2407.05000>`_, 2024, §3.2, §3.3
    """

    gamma: float = 16.0

    moves_weight = True
    reads = GRADIENT

    def __post_init__(self):
        checks.finite("LoRAGA", "gamma", self.gamma)
        if self.gamma <= 0:
            raise ValueError(f"LoRAGA(gamma={self.gamma}): above zero.")

    def make_factors(self, target: Target) -> Factors:
        assert target.gradient is not None
        rank, limit = target.rank, min(target.fan_in, target.fan_out)
        if 2 * rank > limit:
            raise ValueError(f"LoRAGA takes 2·rank singular vectors of the gradient: {2 * rank}; it has {limit}.")
        u, _, v = singular_triplets(target.gradient, min(4 * rank, limit), niter=NITER, key=target.key)
        size = target.fan_out**0.25 / self.gamma**0.5
        a, b = size * u[:, :rank], size * v[:, rank : 2 * rank]
        return Factors(a, b, target.residual(a, b))
