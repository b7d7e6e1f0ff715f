"""PEFT's LoHa."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.loha import LoHaAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import (
    Method,
    Read,
    Settings,
    from_tensor,
    matrix_sizes,
    patterns_of,
    to_tensor,
)


class LoHaMethod(Method):
    """`hada_w1_a` [out, rank], `hada_w1_b` [rank, in], and a second pair; a convolution's window is part of in."""

    peft_type: ClassVar[str] = "LOHA"
    title: ClassVar[str] = "LoHa"
    parts: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (LoHaAdapter,)
    rank_fields: ClassVar[tuple[str, ...]] = ("a1", "b1", "a2", "b2")
    module_kinds: ClassVar[tuple[str, ...]] = ("linear", "conv")

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        in_size, out_size = matrix_sizes(layout)
        rank = int(settings.by_module("r", "rank_pattern", module, 8))
        alpha = settings.by_module("alpha", "alpha_pattern", module, 8)
        arrays = {"scale": np.asarray(alpha / rank, np.float32)}
        for number in (1, 2):
            arrays[f"b{number}"] = from_tensor(layout, read(f"hada_w{number}_a", (out_size, rank)).T, OUT)
            arrays[f"a{number}"] = from_tensor(layout, read(f"hada_w{number}_b", (rank, in_size)), IN)
        return arrays

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> LoHaAdapter:
        scale = arrays["scale"].reshape(-1)
        used = scale[scale != 0]  # zero for layers without adapter
        factor = scale / used[0]
        lead = arrays["b1"].reshape(len(scale), -1)
        b1 = arrays["b1"] if (used == used[0]).all() else (lead * factor[:, None]).reshape(arrays["b1"].shape)
        return LoHaAdapter(
            a1=jnp.asarray(arrays["a1"]),
            b1=jnp.asarray(b1),
            a2=jnp.asarray(arrays["a2"]),
            b2=jnp.asarray(arrays["b2"]),
            scale=jnp.asarray(used[0], jnp.float32),
            axes=layout.axes,
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {name: np.asarray(getattr(node, name)) for name in (*self.rank_fields, "scale")}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        arrays = {}
        for number in (1, 2):
            arrays[f"hada_w{number}_a"] = to_tensor(layout, fields[f"b{number}"], OUT).T
            arrays[f"hada_w{number}_b"] = to_tensor(layout, fields[f"a{number}"], IN)
        return arrays

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        ranks = {name: node.rank for name, node in nodes.items()}
        alphas = {name: scale * ranks[name] for name, scale in scales.items()}
        return patterns_of(ranks, alphas)
