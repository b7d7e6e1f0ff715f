"""Rotary position embeddings, and the scaling of their frequencies for longer texts.

References:
  Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021
  Peng et al., `YaRN <https://arxiv.org/abs/2309.00071>`_, 2023
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError
from experiments.renamed import raise_missing

_THETA = 10_000.0  # the default of configs
# The required fields of each type, by Hugging Face's names; 'dynamic' needs none below the length that it extends.
_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_REFUSED = {"longrope": "its frequencies depend on the length of the text"}


@dataclasses.dataclass(frozen=True)
class Rope:
    """The angular frequencies of a head's pairs of features.

    Attributes:
      frequencies: Radians per position, for each of the width / 2 pairs.
      factor: The factor of sines and cosines (YaRN's temperature).
      longest: The number of positions; longer texts would need other frequencies. None has no limit.
      trained_length: The longest sequence that the checkpoint supports; None if its config does not state it.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    longest: int | None = None
    trained_length: int | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any], width: int) -> "Rope":
        """Reads `rope_parameters` of a `config.json`, or `rope_theta` and `rope_scaling` of an older one.

        'dynamic' scaling equals no scaling up to `max_position_embeddings`. Beyond, every new token would rotate all
        earlier keys again, which is incompatible with a cache and with batches of different lengths, so longer texts
        are an error.

        Raises:
          UserError: The type of scaling is unknown or not supported, or a field is missing.
        """
        fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(fields, Mapping) or any(isinstance(value, Mapping) for value in fields.values()):
            raise UserError(f"config.json: rope parameters are {fields!r}, supported is one set for all layers")
        fields = {name: value for name, value in fields.items() if value is not None}
        kind = fields.get("rope_type", fields.get("type", "default"))
        if kind not in _REQUIRED:
            reason = f" ({_REFUSED[kind]})" if kind in _REFUSED else ""
            raise UserError(
                f"config.json: rope_type is {kind!r}{reason}, supported is {' or '.join(map(repr, _REQUIRED))}"
            )
        if missing := [name for name in _REQUIRED[kind] if not isinstance(fields.get(name), int | float)]:
            raise UserError(f"config.json: {kind} RoPE needs a number as {missing[0]}, got {fields!r}")
        partial = fields.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise UserError(f"config.json: partial_rotary_factor is {partial!r}, supported is 1")
        longest = config.get("max_position_embeddings")
        theta = float(fields.get("rope_theta") or config.get("rope_theta") or _THETA)
        original = config.get("original_max_position_embeddings") or fields.get(
            "original_max_position_embeddings", longest
        )
        plain = np.float32(theta) ** (-np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
        factor = 1.0
        if kind == "linear":
            plain = plain / fields["factor"]
        elif kind == "llama3":
            plain = _llama3(plain, fields, original)
        elif kind == "yarn":
            plain, factor = _yarn(plain, theta, fields, original)
        reach = longest
        if kind in ("linear", "yarn") and longest is not None and original is not None:
            reach = max(longest, round(original * fields["factor"]))
        return cls(tuple(map(float, plain)), factor, longest if kind == "dynamic" else None, reach)

    def rotations(self, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the cosines and sines of the angles at positions, `float32[batch, length, width / 2]` each."""
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        angles_BLP = positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None]
        return self.factor * jnp.cos(angles_BLP), self.factor * jnp.sin(angles_BLP)


def apply_rope(x_BLHK: jax.Array, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair of features (k, k + width / 2) by the angle of its position, in float32."""
    cos_BL1P, sin_BL1P = (part[:, :, None] for part in rotations)
    first_BLHP, second_BLHP = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    rotated = (first_BLHP * cos_BL1P - second_BLHP * sin_BL1P, second_BLHP * cos_BL1P + first_BLHP * sin_BL1P)
    return jnp.concatenate(rotated, axis=-1).astype(x_BLHK.dtype)


def _llama3(plain: np.ndarray, fields: Mapping[str, Any], original: int) -> np.ndarray:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates in between."""
    rotations = original * plain / (2 * math.pi)  # full rotations within the original training length
    low, high = fields["low_freq_factor"], fields["high_freq_factor"]
    weight = np.clip((rotations - low) / (high - low), 0, 1)
    return plain * (weight + (1 - weight) / fields["factor"])


def _yarn(plain: np.ndarray, theta: float, fields: Mapping[str, Any], original: int) -> tuple[np.ndarray, float]:
    """Interpolates like Llama 3, but along the features between two numbers of rotations; and a temperature."""
    pairs = len(plain)

    def pair_with(rotations: float) -> float:
        return 2 * pairs * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    # The paper's numbers of rotations: above 32 frequencies do not change, below 1 they are divided.
    low, high = pair_with(fields.get("beta_fast") or 32), pair_with(fields.get("beta_slow") or 1)
    if fields.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    stretched = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)  # transformers' guard against 0/0
    frequencies = plain * (1 - stretched) + plain / fields["factor"] * stretched

    def temperature(weight: float) -> float:
        return 1.0 if fields["factor"] <= 1 else 0.1 * weight * math.log(fields["factor"]) + 1  # the paper's fit

    factor = fields.get("attention_factor")
    if factor is None and fields.get("mscale") and fields.get("mscale_all_dim"):
        factor = temperature(fields["mscale"]) / temperature(fields["mscale_all_dim"])
    return frequencies, temperature(1) if factor is None else float(factor)


__getattr__ = functools.partial(raise_missing, __name__)
