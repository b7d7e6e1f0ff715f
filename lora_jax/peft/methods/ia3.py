"""PEFT's (IA)³."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.ia3 import IA3Adapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import Method, Read, Settings, matrix_sizes, to_tensor, vector_from_tensor


class IA3Method(Method):
    """`ia3_l`: [out, 1] multiplies a module's output, its bias included; [1, in] the input of a feed-forward module."""

    peft_type: ClassVar[str] = "IA3"
    title: ClassVar[str] = "(IA)³"
    parts: ClassVar[tuple[str, ...]] = ("ia3_l",)
    adapters: ClassVar[tuple[type[Adapter], ...]] = (IA3Adapter,)

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        in_size, out_size = matrix_sizes(layout)
        gain = read("ia3_l", None)
        if gain.shape not in ((out_size, 1), (1, in_size)):
            raise ValueError(f"shape: ia3_l of {module} is {gain.shape}, expected {(out_size, 1)} or {(1, in_size)}")
        feed_forward = gain.shape == (1, in_size) and gain.shape != (out_size, 1)
        role = IN if feed_forward else OUT
        return {f"gain {role}": vector_from_tensor(layout, gain.reshape(-1), role)}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> IA3Adapter:
        if len(arrays) > 1:
            path = layout.binding.path
            raise ValueError(f"unsupported: {path!r} has gains on inputs in some layers and on outputs in others")
        ((name, gain),) = arrays.items()
        on = name.split()[1]
        rest = layout.sizes(layout.labels(OUT if on == IN else IN))
        return IA3Adapter(gain=jnp.asarray(gain), on=on, rest=tuple(rest), axes=layout.axes)

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {f"gain {node.on}": np.asarray(node.gain)}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        ((name, gain),) = fields.items()
        on = name.split()[1]
        vector = to_tensor(layout, gain, on, rank=False)
        return {"ia3_l": vector[None] if on == IN else vector[:, None]}

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        return {"feedforward_modules": sorted(name for name, node in nodes.items() if node.on == IN)}


def bias_gain(gain: np.ndarray, axes: tuple[str, ...]) -> IA3Adapter:
    """Returns the adapter of a bias, which PEFT multiplies together with the module's output."""
    return IA3Adapter(gain=jnp.asarray(gain), on=OUT, rest=(), axes=axes)


def is_bias_gain(node: IA3Adapter) -> bool:
    """Whether an adapter is for a bias."""
    return set(node.axes) <= {BATCH, OUT}
