"""PEFT's AdaLoRA."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import (
    Method,
    Read,
    Settings,
    common_value,
    from_tensor,
    matrix_sizes,
    most_common,
    to_tensor,
)

_EPSILON = 1e-5  # PEFT divides alpha by rank + 1e-5


class AdaLoRAMethod(Method):
    """`lora_A` [rank, in], `lora_B` [out, rank], `lora_E` [rank, 1]."""

    peft_type: ClassVar[str] = "ADALORA"
    title: ClassVar[str] = "AdaLoRA"
    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (AdaLoRAAdapter,)
    rank_fields: ClassVar[tuple[str, ...]] = ("a", "b", "values")

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        in_size, out_size = matrix_sizes(layout)
        a = read("lora_A", None)
        rank = a.shape[0]
        b, values = read("lora_B", (out_size, rank)), read("lora_E", (rank, 1))
        if a.shape != (rank, in_size):
            raise ValueError(f"shape: lora_A of {module} is {a.shape}, expected {(rank, in_size)}")
        alpha = settings.number("lora_alpha", 8)
        # PEFT divides by the rank that training began with, for pruned modules too.
        scale = (alpha if alpha > 0 else rank) / (settings.number("init_r", 12) + _EPSILON)
        return {
            "a": from_tensor(layout, a, IN),
            "b": from_tensor(layout, b.T, OUT),
            "values": values[:, 0],
            "scale": np.asarray(scale, np.float32),
        }

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape) if name == "scale" else np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> AdaLoRAAdapter:
        scale = arrays["scale"]
        same = bool((scale == scale.flat[0]).all())
        return AdaLoRAAdapter(
            a=jnp.asarray(arrays["a"]),
            values=jnp.asarray(arrays["values"]),
            b=jnp.asarray(arrays["b"]),
            scale=jnp.asarray(scale.flat[0] if same else scale, jnp.float32),
            dropout=jnp.asarray(settings.dropout, jnp.float32),
            axes=layout.axes,
            blocks=(True,),
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(node, name)) for name in ("a", "b", "values", "scale")}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        return {
            "lora_A": to_tensor(layout, fields["a"], IN),
            "lora_B": to_tensor(layout, fields["b"], OUT).T,
            "lora_E": fields["values"][:, None],
        }

    def rescale(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, tuple[str, float]]:
        common = most_common(scales.values())
        return {module: ("lora_E", scale / common) for module, scale in scales.items() if scale != common}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        split = [name for name, node in nodes.items() if len(node.blocks) > 1]
        return [f"{name}: PEFT's AdaLoRA adapts whole weights, not parts" for name in split]

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        ranks = {name: node.rank for name, node in nodes.items()}
        dropouts = {name: float(node.dropout) for name, node in nodes.items()}
        largest = max(ranks.values())
        pattern = {}
        if len(set(ranks.values())) > 1:
            pattern = {f"{name}.lora_E": [i < rank for i in range(largest)] for name, rank in ranks.items()}
        return {
            "init_r": largest,
            "target_r": largest,
            "lora_alpha": most_common(scales.values()) * (largest + _EPSILON),
            "lora_dropout": common_value("dropout", dropouts, self.title),
            "rank_pattern": pattern or None,
            # PEFT requires a schedule; the ranks are final.
            "total_step": 1,
            "tinit": 0,
            "tfinal": 0,
        }
