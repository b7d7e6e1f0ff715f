"""VeRA in PEFT's form."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.protocol import IN, OUT, Adapter
from lora_jax.adapters.vera import DVoRAAdapter, VeRAAdapter
from lora_jax.peft.config import CONFIG
from lora_jax.peft.factors import Fit
from lora_jax.peft.methods.method import (
    Method,
    Read,
    Settings,
    from_tensor,
    matrix_sizes,
    one,
    to_tensor,
    vector_from_tensor,
)

PAIR = ("base_model.vera_A", "base_model.vera_B")
"""The keys of the pair that all modules share, each a corner of it."""


class VeRA(Method):
    """`vera_lambda_b` [out] and `vera_lambda_d` [rank]; the pair, [rank, largest in] and [largest out, rank]."""

    peft_type: ClassVar[str] = "VERA"
    title: ClassVar[str] = "VeRA"
    parts: ClassVar[tuple[str, ...]] = ("vera_lambda_b", "vera_lambda_d")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (VeRAAdapter,)

    def __init__(self) -> None:
        self._corners: dict[tuple[int, int, tuple[str, ...]], tuple[Any, Any]] = {}  # one pair for all of a size

    def fields(self, fit: Fit, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        rank, (_, out) = int(settings.number("r", 256)), matrix_sizes(fit)
        g = vector_from_tensor(fit, read("vera_lambda_b", (out,)), OUT)
        return {"d": read("vera_lambda_d", (rank,)), "g": g}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], fit: Fit, settings: Settings) -> VeRAAdapter:
        pair = settings.content.get("pair")
        if pair is None:
            raise ValueError(
                f"missing: {' and '.join(PAIR)}: PEFT draws them anew with torch's generator; save the adapter with "
                f"save_projection=True ({CONFIG} has false)"
            )
        into, out = matrix_sizes(fit)
        whole_a, whole_b = pair
        if whole_a.shape[1] < into or whole_b.shape[0] < out:
            raise ValueError(f"shape: the pair {whole_a.shape}, {whole_b.shape} is smaller than a weight {(out, into)}")
        corner = (into, out, fit.axes)
        if corner not in self._corners:
            a, b = from_tensor(fit, whole_a[:, :into], IN), from_tensor(fit, whole_b[:out].T, OUT)
            self._corners[corner] = jnp.asarray(a), jnp.asarray(b)
        a, b = self._corners[corner]
        return VeRAAdapter(
            d=jnp.asarray(arrays["d"]),
            g=jnp.asarray(arrays["g"]),
            a=a,
            b=b,
            scale=jnp.ones((), jnp.float32),
            dropout=jnp.asarray(settings.dropout, jnp.float32),
            axes=fit.axes,
        )

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        return {"d": np.asarray(node.d), "g": np.asarray(node.g * node.scale.astype(node.g.dtype))}

    def tensors(self, fields: Mapping[str, np.ndarray], fit: Fit) -> dict[str, np.ndarray]:
        return {"vera_lambda_b": to_tensor(fit, fields["g"], OUT, rank=False), "vera_lambda_d": fields["d"]}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        return [f"{name}: PEFT has no DVoRA" for name, node in nodes.items() if isinstance(node, DVoRAAdapter)]

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        return {
            "r": int(one("rank", {name: node.rank for name, node in nodes.items()}, self.title)),
            "vera_dropout": one("dropout", {name: float(node.dropout) for name, node in nodes.items()}, self.title),
            "save_projection": True,
            "projection_prng_key": 0,
        }


def shared_pair(nodes: Sequence[tuple[VeRAAdapter, Fit]]) -> dict[str, np.ndarray] | None:
    """The pair of which all adapters have a corner, with its keys; None where there is none."""
    corners_a = [to_tensor(fit, np.asarray(node.a), IN) for node, fit in nodes]
    corners_b = [to_tensor(fit, np.asarray(node.b), OUT).T for node, fit in nodes]
    if len({len(a) for a in corners_a}) > 1:
        return None
    whole_a = max(corners_a, key=lambda a: a.shape[1])
    whole_b = max(corners_b, key=lambda b: b.shape[0])
    if not all(np.array_equal(a, whole_a[:, : a.shape[1]]) for a in corners_a):
        return None
    if not all(np.array_equal(b, whole_b[: b.shape[0]]) for b in corners_b):
        return None
    return dict(zip(PAIR, map(np.ascontiguousarray, (whole_a, whole_b))))
