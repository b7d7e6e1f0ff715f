"""PEFT's OFT."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.oft import OFTAdapter
from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import Method, Read, Settings, common_value, matrix_sizes, single_in_axis


class OFTMethod(Method):
    """`oft_R.weight` [blocks, n(n − 1)/2] for blocks of size n, one row if all blocks share it."""

    peft_type: ClassVar[str] = "OFT"
    title: ClassVar[str] = "OFT"
    parts: ClassVar[tuple[str, ...]] = ("oft_R.weight",)
    adapters: ClassVar[tuple[type[Adapter], ...]] = (OFTAdapter,)
    module_kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        if settings.content.get("coft"):
            raise ValueError("unsupported: OFT with coft, which bounds the rotations while it trains")
        q, in_size = read("oft_R.weight", None), matrix_sizes(layout)[0]
        if q.ndim != 2 or in_size % _block_size(q):
            raise ValueError(f"shape: oft_R.weight of {module} is {q.shape}, which divides no {in_size} inputs")
        blocks = in_size // _block_size(q)
        if q.shape[0] != (1 if settings.content.get("block_share") else blocks):
            raise ValueError(f"shape: oft_R.weight of {module} is {q.shape}, for {blocks} blocks")
        return {"q": np.broadcast_to(q, (blocks, q.shape[1]))}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> OFTAdapter:
        series = settings.content.get("use_cayley_neumann", True)
        return OFTAdapter(
            q=jnp.asarray(arrays["q"]),
            terms=int(settings.number("num_cayley_neumann_terms", 5)) if series else 0,
            rest=(_block_size(arrays["q"]),),
            out=tuple(layout.sizes(layout.labels(OUT))),
            split=(single_in_axis(layout, self),),
            axes=layout.axes,
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {"q": np.asarray(node.q)}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        del layout
        return {"oft_R.weight": fields["q"]}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        return [f"{name}: PEFT's OFT has one in axis" for name, node in nodes.items() if node.axes.count(IN) > 1]

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        terms = int(common_value("terms", {name: node.terms for name, node in nodes.items()}, self.title))
        size = int(common_value("block_size", {name: node.rest[0] for name, node in nodes.items()}, self.title))
        series = {"use_cayley_neumann": bool(terms), "num_cayley_neumann_terms": terms or 5}
        return {"r": 0, "oft_block_size": size, "block_share": False, "coft": False, **series}


def _block_size(q: np.ndarray) -> int:
    """The size n of blocks with n(n − 1)/2 entries."""
    return (1 + math.isqrt(1 + 8 * q.shape[-1])) // 2
