"""PEFT's LoKr."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.lokr import LoKrAdapter, LoKrFullAdapter
from lora_jax.adapters.protocol import BATCH, IN, OUT, Adapter
from lora_jax.peft.factor_layout import FactorLayout
from lora_jax.peft.methods.method import Method, Read, Settings, matrix_sizes, patterns_of


class LoKrMethod(Method):
    """`lokr_w1` [out₁, in₁] or its factors, and `lokr_w2` [out₂, in₂] or `lokr_w2_a` [out₂, rank], `lokr_w2_b`."""

    peft_type: ClassVar[str] = "LOKR"
    title: ClassVar[str] = "LoKr"
    parts: ClassVar[tuple[str, ...]] = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    adapters: ClassVar[tuple[type[Adapter], ...]] = (LoKrAdapter, LoKrFullAdapter)
    rank_fields: ClassVar[tuple[str, ...]] = ("a", "b")
    module_kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def fields(self, layout: FactorLayout, read: Read, module: str, settings: Settings) -> dict[str, np.ndarray]:
        if len(layout.labels(IN)) > 1 or len(layout.labels(OUT)) > 1:
            raise ValueError(f"unsupported: LoKr divides one in and one out axis; {module} has several in this base")
        in_size, out_size = matrix_sizes(layout)
        rank = int(settings.by_module("r", "rank_pattern", module, 8))
        alpha = settings.by_module("alpha", "alpha_pattern", module, 8)
        first = _product(read, "lokr_w1", module)
        rows, columns = first.shape
        if out_size % rows or in_size % columns:
            raise ValueError(
                f"shape: lokr_w1 of {module} is {first.shape}, which divides no weight of {(out_size, in_size)}"
            )
        rest = (out_size // rows, in_size // columns)
        arrays = {"c": first.T, "scale": np.asarray(alpha / rank, np.float32)}
        try:
            return arrays | {"d": read("lokr_w2", rest).T}
        except KeyError:
            b, a = read("lokr_w2_a", (rest[0], rank)), read("lokr_w2_b", (rank, rest[1]))
            return arrays | {"a": a, "b": b.T}

    def identity_like(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape)

    def build(self, arrays: Mapping[str, np.ndarray], layout: FactorLayout, settings: Settings) -> Adapter:
        scale = arrays["scale"].reshape(-1)
        used = scale[scale != 0]  # zero for layers without adapter
        c = arrays["c"]
        if not (used == used[0]).all():
            c = (c.reshape(len(scale), -1) * (scale / used[0])[:, None]).reshape(c.shape)
        shared = {
            "c": jnp.asarray(c),
            "scale": jnp.asarray(used[0], jnp.float32),
            "split": tuple(layout.axes.index(role) for role in (IN, OUT)),
            "axes": layout.axes,
        }
        if "d" in arrays:
            return LoKrFullAdapter(d=jnp.asarray(arrays["d"]), **shared)
        return LoKrAdapter(a=jnp.asarray(arrays["a"]), b=jnp.asarray(arrays["b"]), **shared)

    def arrays(self, node: Any) -> dict[str, np.ndarray]:
        second = ("d",) if isinstance(node, LoKrFullAdapter) else ("a", "b")
        return {name: np.asarray(getattr(node, name)) for name in ("c", *second, "scale")}

    def tensors(self, fields: Mapping[str, np.ndarray], layout: FactorLayout) -> dict[str, np.ndarray]:
        del layout
        if "d" in fields:
            return {"lokr_w1": fields["c"].T, "lokr_w2": fields["d"].T}
        return {"lokr_w1": fields["c"].T, "lokr_w2_a": fields["b"].T, "lokr_w2_b": fields["a"]}

    def check(self, nodes: Mapping[str, Any]) -> list[str]:
        problems = []
        for name, node in nodes.items():
            roles = [role for role in node.axes if role != BATCH]
            if sorted(roles) != [IN, OUT]:
                problems.append(f"{name}: LoKr can be written for weights with one in and one out axis only")
            elif node.axes[node.split[0]] != IN:
                problems.append(f"{name}: PEFT has no LoKr whose first matrix is (out, in)")
        return problems

    def config(self, nodes: Mapping[str, Any], scales: Mapping[str, float]) -> dict[str, Any]:
        # A full second matrix has no rank. PEFT selects this form if r is at least half of the larger side.
        ranks = {
            name: max(node.d.shape[-2:]) if isinstance(node, LoKrFullAdapter) else node.rank
            for name, node in nodes.items()
        }
        alphas = {name: scale * ranks[name] for name, scale in scales.items()}
        return patterns_of(ranks, alphas) | {"decompose_both": False, "decompose_factor": -1}


def _product(read: Read, part: str, module: str) -> np.ndarray:
    """Reads a matrix, or the product of its two factors."""
    try:
        matrix = read(part, None)
    except KeyError:
        matrix = read(f"{part}_a", None) @ read(f"{part}_b", None)
    if matrix.ndim != 2:
        raise ValueError(f"shape: {part} of {module} is {matrix.shape}, expected a matrix")
    return matrix
