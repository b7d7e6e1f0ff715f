"""PEFT's MiSS."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.miss import MiSSAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import (
    Method,
    Read,
    Settings,
    common_value,
    from_tensor,
    matrix_sizes,
    single_in_axis,
    to_tensor,
)


class MiSSMethod(Method):
    """`miss_block` [share, out]."""

    peft_type: ClassVar[str] = "MISS"
    title: ClassVar[str] = "MiSS"
    parts: ClassVar[tuple[str, ...]] = ("miss_block",)
    adapters: ClassVar[tuple[type[Adapter], ...]] = (MiSSAdapter,)
    module_kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        if (variant := settings.content.get("init_weights")) in ("bat", "mini"):
            raise ValueError(f"unsupported: MiSS with init_weights={variant!r}")
        (in_size, out_size), share = matrix_sizes(layout), int(settings.number("r", 64))
        if in_size % share:
            raise ValueError(
                f"unsupported: MiSS with r={share}, which does not divide the inputs ({in_size}) of {module}"
            )
        return {"d": from_tensor(layout, read("miss_block", (share, out_size)), OUT)}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> MiSSAdapter:
        axis, share = single_in_axis(layout, self), int(settings.number("r", 64))
        return MiSSAdapter(
            d=jnp.asarray(arrays["d"]),
            scale=jnp.ones((), jnp.float32),
            dropout=jnp.asarray(float(settings.content.get("miss_dropout") or 0.0), jnp.float32),
            shards=matrix_sizes(layout)[0] // share,
            rest=(share,),
            split=(axis,),
            axes=layout.axes,
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {"d": np.asarray(node.d * node.scale.astype(node.d.dtype))}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        return {"miss_block": to_tensor(layout, fields["d"], OUT)}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        return [f"{name}: PEFT's MiSS has one in axis" for name, node in nodes.items() if node.axes.count(IN) > 1]

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        return {
            "r": int(common_value("share", {name: node.rest[0] for name, node in nodes.items()}, self.title)),
            "miss_dropout": common_value("dropout", {n: float(node.dropout) for n, node in nodes.items()}, self.title),
            "init_weights": True,
        }
