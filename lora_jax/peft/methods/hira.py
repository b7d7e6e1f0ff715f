"""PEFT's HiRA."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.hira import HiRAAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import Method, Read, Settings, from_tensor, matrix_sizes, patterns_of, to_tensor


class HiRAMethod(Method):
    """`hira_A` [rank, in] and `hira_B` [out, rank]."""

    peft_type: ClassVar[str] = "HIRA"
    title: ClassVar[str] = "HiRA"
    parts: ClassVar[tuple[str, ...]] = ("hira_A", "hira_B")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (HiRAAdapter,)
    rank_fields: ClassVar[tuple[str, ...]] = ("a", "b")

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        in_size, out_size = matrix_sizes(layout)
        rank = int(settings.by_module("r", "rank_pattern", module, 32))
        a, b = read("hira_A", (rank, in_size)), read("hira_B", (out_size, rank))
        return {"a": from_tensor(layout, a, IN), "b": from_tensor(layout, b.T, OUT)}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> HiRAAdapter:
        return HiRAAdapter(a=jnp.asarray(arrays["a"]), b=jnp.asarray(arrays["b"]), axes=layout.axes)

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {"a": np.asarray(node.a), "b": np.asarray(node.b)}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        return {"hira_A": to_tensor(layout, fields["a"], IN), "hira_B": to_tensor(layout, fields["b"], OUT).T}

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        patterns = patterns_of({name: node.rank for name, node in nodes.items()}, dict.fromkeys(nodes, 1.0))
        return {name: patterns[name] for name in ("r", "rank_pattern")}
