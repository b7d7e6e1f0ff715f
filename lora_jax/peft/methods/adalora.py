"""AdaLoRA in PEFT's form."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.adalora import AdaLoRAAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.peft.factors import Fit
from lora_jax.peft.methods.method import (
    Method,
    Read,
    Settings,
    from_tensor,
    matrix_sizes,
    most_common,
    one,
    to_tensor,
)

_EPSILON = 1e-5  # PEFT divides alpha by rank + 1e-5


class AdaLora(Method):
    """`lora_A` [rank, in], `lora_B` [out, rank], `lora_E` [rank, 1]."""

    peft_type: ClassVar[str] = "ADALORA"
    title: ClassVar[str] = "AdaLoRA"
    parts: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B", "lora_E")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (AdaLoRAAdapter,)
    ranked: ClassVar[tuple[str, ...]] = ("a", "b", "values")

    def fields(self, fit: Fit, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        into, out = matrix_sizes(fit)
        a = read("lora_A", None)
        rank = a.shape[0]
        b, values = read("lora_B", (out, rank)), read("lora_E", (rank, 1))
        if a.shape != (rank, into):
            raise ValueError(f"shape: lora_A of {module} is {a.shape}, expected {(rank, into)}")
        alpha = settings.number("lora_alpha", 8)
        # Of a pruned module too PEFT divides by the rank that training began with.
        scale = (alpha if alpha > 0 else rank) / (settings.number("init_r", 12) + _EPSILON)
        return {
            "a": from_tensor(fit, a, IN),
            "b": from_tensor(fit, b.T, OUT),
            "values": values[:, 0],
            "scale": np.asarray(scale, np.float32),
        }

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.ones(shape) if name == "scale" else np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], fit: Fit, settings: Settings) -> AdaLoRAAdapter:
        scale = arrays["scale"]
        same = bool((scale == scale.flat[0]).all())
        return AdaLoRAAdapter(
            a=jnp.asarray(arrays["a"]),
            values=jnp.asarray(arrays["values"]),
            b=jnp.asarray(arrays["b"]),
            scale=jnp.asarray(scale.flat[0] if same else scale, jnp.float32),
            dropout=jnp.asarray(settings.dropout, jnp.float32),
            axes=fit.axes,
            blocks=(True,),
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(node, name)) for name in ("a", "b", "values", "scale")}

    def tensors(self, fields: Mapping[str, np.ndarray], fit: Fit) -> dict[str, np.ndarray]:
        return {
            "lora_A": to_tensor(fit, fields["a"], IN),
            "lora_B": to_tensor(fit, fields["b"], OUT).T,
            "lora_E": fields["values"][:, None],
        }

    def leftover(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, tuple[str, float]]:
        common = most_common(scales.values())
        return {module: ("lora_E", scale / common) for module, scale in scales.items() if scale != common}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        parts = [name for name, node in nodes.items() if len(node.blocks) > 1]
        return [f"{name}: PEFT's AdaLoRA adapts whole weights, not parts" for name in parts]

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        ranks = {name: node.rank for name, node in nodes.items()}
        largest = max(ranks.values())
        pattern = {}
        if len(set(ranks.values())) > 1:
            pattern = {f"{name}.lora_E": [i < rank for i in range(largest)] for name, rank in ranks.items()}
        return {
            "init_r": largest,
            "target_r": largest,
            "lora_alpha": most_common(scales.values()) * (largest + _EPSILON),
            "lora_dropout": one("dropout", {name: float(node.dropout) for name, node in nodes.items()}, self.title),
            "rank_pattern": pattern or None,
            # A schedule is what PEFT wants to see; the ranks are final.
            "total_step": 1,
            "tinit": 0,
            "tfinal": 0,
        }
