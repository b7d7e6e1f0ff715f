"""PEFT's VeRA."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.adapters.vera import DVoRAAdapter, VeRAAdapter
from lora_jax.peft.config import CONFIG
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import (
    Method,
    Read,
    Settings,
    common_value,
    from_tensor,
    matrix_sizes,
    to_tensor,
    vector_from_tensor,
)

PAIR = ("base_model.vera_A", "base_model.vera_B")
"""The keys of the random pair; each module uses a corner of it."""


class VeRAMethod(Method):
    """`vera_lambda_b` [out] and `vera_lambda_d` [rank]; the random pair [rank, largest in] and [largest out, rank]."""

    peft_type: ClassVar[str] = "VERA"
    title: ClassVar[str] = "VeRA"
    parts: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (VeRAAdapter,)

    def __init__(self) -> None:
        self._corners: dict[tuple[int, int, tuple[str, ...]], tuple[Any, Any]] = {}  # weights of one size share a pair

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        rank, (_, out_size) = int(settings.number("r", 256)), matrix_sizes(layout)
        g = vector_from_tensor(layout, read("vera_lambda_b", (out_size,)), OUT)
        return {"d": read("vera_lambda_d", (rank,)), "g": g}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> VeRAAdapter:
        pair = settings.content.get("pair")
        if pair is None:
            raise ValueError(
                f"missing: {' and '.join(PAIR)}: PEFT generates them with torch's generator; save the adapter with "
                f"save_projection=True ({CONFIG} has false)"
            )
        in_size, out_size = matrix_sizes(layout)
        full_a, full_b = pair
        if full_a.shape[1] < in_size or full_b.shape[0] < out_size:
            raise ValueError(
                f"shape: the pair {full_a.shape}, {full_b.shape} is smaller than a weight {(out_size, in_size)}"
            )
        corner = (in_size, out_size, layout.axes)
        if corner not in self._corners:
            a, b = from_tensor(layout, full_a[:, :in_size], IN), from_tensor(layout, full_b[:out_size].T, OUT)
            self._corners[corner] = jnp.asarray(a), jnp.asarray(b)
        a, b = self._corners[corner]
        return VeRAAdapter(
            d=jnp.asarray(arrays["d"]),
            g=jnp.asarray(arrays["g"]),
            a=a,
            b=b,
            scale=jnp.ones((), jnp.float32),
            dropout=jnp.asarray(settings.dropout, jnp.float32),
            axes=layout.axes,
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {"d": np.asarray(node.d), "g": np.asarray(node.g * node.scale.astype(node.g.dtype))}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        return {"vera_lambda_b": to_tensor(layout, fields["g"], OUT, rank=False), "vera_lambda_d": fields["d"]}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        return [f"{name}: PEFT has no DVoRA" for name, node in nodes.items() if isinstance(node, DVoRAAdapter)]

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        ranks = {name: node.rank for name, node in nodes.items()}
        dropouts = {name: float(node.dropout) for name, node in nodes.items()}
        return {
            "r": int(common_value("rank", ranks, self.title)),
            "vera_dropout": common_value("dropout", dropouts, self.title),
            "save_projection": True,
            "projection_prng_key": 0,
        }


def shared_pair(nodes: Sequence[tuple[VeRAAdapter, FactorLayout]]) -> dict[str, np.ndarray] | None:
    """Returns the random pair that has each adapter's pair as a corner, by key; None if there is no such pair."""
    corners_a = [to_tensor(layout, np.asarray(node.a), IN) for node, layout in nodes]
    corners_b = [to_tensor(layout, np.asarray(node.b), OUT).T for node, layout in nodes]
    if len({len(a) for a in corners_a}) > 1:
        return None
    full_a = max(corners_a, key=lambda a: a.shape[1])
    full_b = max(corners_b, key=lambda b: b.shape[0])
    if not all(np.array_equal(a, full_a[:, : a.shape[1]]) for a in corners_a):
        return None
    if not all(np.array_equal(b, full_b[: b.shape[0]]) for b in corners_b):
        return None
    return dict(zip(PAIR, map(np.ascontiguousarray, (full_a, full_b))))
