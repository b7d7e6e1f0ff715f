"""(IA)³: a trained gain on each output or each input of a frozen weight."""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from lora_jax import checks
from lora_jax.adapters import roles
from lora_jax.adapters.factored import Factored
from lora_jax.adapters.layouts import BATCH, IN, OUT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, check_axes, static, trained
from lora_jax.renamed import module_getattr


@adapter("IA3")
class IA3Adapter(Adapter):
    """W times a gain for each output, or for each input.

    Attributes:
      gain: `[*batch, *out]` if `on` is 'out', `[*batch, *in]` if it is 'in'.
      on: Which axes have gains, 'out' or 'in'.
      rest: Sizes of the axes that have none.
      axes: The role of each axis of the weight.
    """

    gain: jax.Array = trained("batch on", vector=True)
    on: str = static(choices=(OUT, IN))
    rest: tuple[int, ...] = static("~on")
    axes: tuple[str, ...] = static()  # pyrefly: ignore[bad-override]

    def factored(self, weight: jax.Array) -> Factored:
        del weight
        return self.form(gains=(self.factor("gain"),))

    def identity_like(self, weight: jax.Array | None) -> Self:
        del weight
        return dataclasses.replace(self, gain=jnp.ones_like(self.gain))

    def describe(self) -> dict[str, Any]:
        return {"on": self.on}


@dataclasses.dataclass(frozen=True)
class IA3(Recipe):
    r"""Trains a gain of each output (or input) of a frozen weight: :math:`l \odot (x W)` or :math:`(l \odot x) W`.

    The paper adapts the outputs of keys and values and the inputs of the second feed-forward weight. A bias that
    follows is not scaled; to scale it too, as PEFT does, adapt its leaf by `IA3(axes=("out",))`.

    Args:
      on: 'out' or 'in'. The in axes of a convolution are its window and its channels.
      axes: The role of each axis of the weight; None takes them from the trace.
      dtype: The dtype of the gains.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> IA3().create(jax.random.key(0), jnp.zeros((16, 32)), ("in", "out")).gain.shape
      (32,)

    References:
      Liu et al., `Few-Shot Parameter-Efficient Fine-Tuning <https://arxiv.org/abs/2205.05638>`_, 2022, §3.3
    """

    on: str = OUT
    _: dataclasses.KW_ONLY
    axes: tuple[str, ...] | None = None  # pyrefly: ignore[bad-override]
    dtype: jax.typing.DTypeLike = jnp.float32

    def __post_init__(self):
        checks.one_of("IA3", "on", self.on, (OUT, IN))
        checks.floating("IA3", self.dtype)

    def create(self, key: jax.Array, weight: jax.Array, axes: tuple[str, ...]) -> IA3Adapter:
        del key
        check_axes(axes, weight.shape)
        axes = roles.contracted(axes)
        if self.on not in axes:
            raise ValueError(
                f"IA3(on={self.on!r}): the weight of shape {tuple(weight.shape)} has the roles {axes}, no "
                f"{self.on!r} axis."
            )
        batch, scaled, rest = (
            roles.sizes(weight.shape, axes, role) for role in (BATCH, self.on, IN if self.on == OUT else OUT)
        )
        return IA3Adapter(gain=jnp.ones((*batch, *scaled), self.dtype), on=self.on, rest=rest, axes=axes)


__getattr__ = module_getattr(__name__, Rescaled="IA3Adapter")
