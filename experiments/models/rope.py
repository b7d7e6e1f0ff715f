"""Rotary position embeddings and the ways in which their frequencies are scaled for longer texts.

References:
  Su et al., `RoFormer <https://arxiv.org/abs/2104.09864>`_, 2021
  Peng et al., `YaRN <https://arxiv.org/abs/2309.00071>`_, 2023
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.errors import UserError

_THETA = 10_000.0  # where a config says none
# The fields that each type needs, in Hugging Face's names; 'dynamic' needs none below the length it extends.
_NEEDS = {
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
      frequencies: Radians a position, of each of the width / 2 pairs.
      factor: What sines and cosines are multiplied by (YaRN's temperature).
      longest: The last position is one less: beyond it the frequencies would be others. None has no bound.
      trained_length: The longest sequence that the checkpoint is made for; None where its config does not say it.
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    longest: int | None = None
    trained_length: int | None = None

    @classmethod
    def from_json(cls, config: Mapping[str, Any], width: int) -> "Rope":
        """Reads `rope_parameters` of a `config.json`, or `rope_theta` and `rope_scaling` of an older one.

        'dynamic' scaling equals none up to `max_position_embeddings`; beyond it every new token would turn all
        earlier keys anew, which neither a cache nor a batch of different lengths can have: such lengths are
        refused when they come.

        Raises:
          UserError: The type of scaling is unknown or not computed, or lacks a field.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise UserError(f"config.json: rope parameters are {given!r}, supported is one set for all layers")
        given = {name: value for name, value in given.items() if value is not None}
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in _NEEDS:
            reason = f" ({_REFUSED[kind]})" if kind in _REFUSED else ""
            raise UserError(
                f"config.json: rope_type is {kind!r}{reason}, supported is {' or '.join(map(repr, _NEEDS))}"
            )
        if missing := [name for name in _NEEDS[kind] if not isinstance(given.get(name), int | float)]:
            raise UserError(f"config.json: {kind} RoPE needs a number as {missing[0]}, given is {given!r}")
        partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if partial not in (None, 1):
            raise UserError(f"config.json: partial_rotary_factor is {partial!r}, supported is 1")
        longest = config.get("max_position_embeddings")
        theta = float(given.get("rope_theta") or config.get("rope_theta") or _THETA)
        original = config.get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings", longest
        )
        plain = np.float32(theta) ** (-np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
        factor = 1.0
        if kind == "linear":
            plain = plain / given["factor"]
        elif kind == "llama3":
            plain = _llama3(plain, given, original)
        elif kind == "yarn":
            plain, factor = _yarn(plain, theta, given, original)
        reach = longest
        if kind in ("linear", "yarn") and longest is not None and original is not None:
            reach = max(longest, round(original * given["factor"]))
        return cls(tuple(map(float, plain)), factor, longest if kind == "dynamic" else None, reach)

    def turns(self, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cosines and sines, `float32[batch, length, width / 2]`, of the angles at some positions."""
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        angles_BLP = positions_BL.astype(jnp.float32)[..., None] * frequencies[None, None]
        return self.factor * jnp.cos(angles_BLP), self.factor * jnp.sin(angles_BLP)


def apply_rope(x_BLHK: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns each pair of features (k, k + width / 2) by the angle of its position, in float32."""
    cos_BL1P, sin_BL1P = (part[:, :, None] for part in turns)
    first_BLHP, second_BLHP = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = (first_BLHP * cos_BL1P - second_BLHP * sin_BL1P, second_BLHP * cos_BL1P + first_BLHP * sin_BL1P)
    return jnp.concatenate(turned, axis=-1).astype(x_BLHK.dtype)


def _llama3(plain: np.ndarray, given: Mapping[str, Any], original: int) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    turns = original * plain / (2 * math.pi)  # in the length that the model was first trained on
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / given["factor"])


def _yarn(plain: np.ndarray, theta: float, given: Mapping[str, Any], original: int) -> tuple[np.ndarray, float]:
    """Like Llama 3's, interpolated along the features between two numbers of turns; and a temperature."""
    pairs = len(plain)

    def pair_with(turns: float) -> float:
        return 2 * pairs * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    # The paper's numbers of turns: more than 32 are kept, fewer than 1 stretched.
    low, high = pair_with(given.get("beta_fast") or 32), pair_with(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    stretched = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)  # transformers' guard against 0/0
    frequencies = plain * (1 - stretched) + plain / given["factor"] * stretched

    def temperature(weight: float) -> float:
        return 1.0 if given["factor"] <= 1 else 0.1 * weight * math.log(given["factor"]) + 1  # the paper's fit

    factor = given.get("attention_factor")
    if factor is None and given.get("mscale") and given.get("mscale_all_dim"):
        factor = temperature(given["mscale"]) / temperature(given["mscale_all_dim"])
    return frequencies, temperature(1) if factor is None else float(factor)
