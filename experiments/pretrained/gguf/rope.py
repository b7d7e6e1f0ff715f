"""Derives Hugging Face's `rope_scaling` from the fields and tensors of a GGUF file.

A file holds Llama 3's scaling as the factors by which frequencies are divided. Only ratios of the original length and
the two limits matter for them, so the lower limit is always Llama 3's, 1; the upper one is Llama 3's, 4, if the factors
allow it.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_LOW, _HIGH = 1.0, 4.0  # Llama 3's limits, in rotations within the original length
_TOLERANCE = 1e-5
_YARN = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def rope_scaling(field: Callable[[str], Any], longest: int) -> dict[str, Any] | None:
    """Returns the scaling that the fields of a file describe; None if they describe none.

    Args:
      field: Returns the value of a field of the architecture, or None.
      longest: The length of texts that the file states.

    Raises:
      ValueError: The type of scaling is unknown, or a field is not a positive number.
    """

    def number(name: str, default: Any = None) -> Any:
        value = field(f"rope.scaling.{name}")
        if value is None or value == 0:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"rope.scaling.{name} is {value!r}, expected a positive number")
        return value

    kind = field("rope.scaling.type")
    if kind in (None, "none"):
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"rope.scaling.type is {kind!r}, supported is 'none' or 'linear' or 'yarn'")
    scaling = {"rope_type": kind, "factor": number("factor", 1.0)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = number("original_context_length", longest)
        others = {theirs: number(name) for name, theirs in _YARN.items()}
        scaling |= {name: value for name, value in others.items() if value is not None}
    return scaling


def llama3_scaling(factors: np.ndarray, theta: float, width: int) -> dict[str, Any]:
    """Returns a scaling of Llama 3's form that divides the frequencies by some factors.

    Args:
      factors: `float[width / 2]`.
      theta: The base of the frequencies.
      width: The width of a head.

    Raises:
      ValueError: No such scaling has these factors.
    """
    factors = np.asarray(factors, np.float64)
    rotations = theta ** (-np.arange(0, width, 2) / width) / (2 * math.pi)  # per position
    if len(factors) != len(rotations) or not np.max(factors, initial=0) > 1:
        raise ValueError(f"{len(factors)} factors, expected {len(rotations)} with some above 1")
    for factor, high, length in _settings(factors, rotations):
        length, high = _round(length, 0), _round(high, 3)
        if high <= _LOW:
            continue
        weights = np.clip((length * rotations - _LOW) / (high - _LOW), 0, 1)
        if np.allclose(weights + (1 - weights) / factor, 1 / factors, rtol=_TOLERANCE, atol=0):
            limits = {"low_freq_factor": _LOW, "high_freq_factor": high}
            return {"rope_type": "llama3", "factor": factor, **limits, "original_max_position_embeddings": length}
    raise ValueError("the factors are not those of Llama 3's scaling")


def _round(number: float, digits: int) -> float | int:
    """Returns the number with so many digits that a number approximates, or the number itself."""
    rounded = round(float(number), digits or None)
    return rounded if math.isclose(number, rounded, rel_tol=_TOLERANCE) else float(number)


def _settings(factors: np.ndarray, rotations: np.ndarray) -> Iterator[tuple[float, float, float]]:
    """Yields settings that may explain the factors: the largest factor, the upper limit and the original length.

    Between the limits, the inverse of a factor is a linear function of the rotations within the original length.
    """
    largest = float(np.max(factors))
    weights = (1 / factors - 1 / largest) / (1 - 1 / largest)  # 1 keeps a frequency, 0 divides it by the largest factor
    between = np.flatnonzero((weights > _TOLERANCE) & (weights < 1 - _TOLERANCE))
    slowest_kept = np.min(rotations[weights >= 1 - _TOLERANCE], initial=np.inf)
    fastest_divided = np.max(rotations[weights <= _TOLERANCE])
    if not len(between):
        if np.isfinite(slowest_kept):
            yield largest, _HIGH, 2.0 ** math.ceil(math.log2(_HIGH / slowest_kept))
        yield largest, slowest_kept / fastest_divided, _LOW / fastest_divided
        return
    first, last = between[0], between[-1]
    yield largest, _HIGH, (weights[first] * (_HIGH - _LOW) + _LOW) / rotations[first]
    yield largest, _LOW + (rotations[first] / fastest_divided - _LOW) / weights[first], _LOW / fastest_divided
    if first != last:
        slope = (weights[first] - weights[last]) / (rotations[first] - rotations[last])
        high = _LOW - _LOW / (weights[first] - slope * rotations[first])
        yield largest, high, slope * (high - _LOW)
    # The frequency that is divided by the largest factor may be between the limits, too.
    last = int(np.argmax(factors))
    slope = (1 / factors[first] - 1 / largest) / (rotations[first] - rotations[last])
    start = 1 / largest - slope * rotations[last]
    factor = _HIGH / ((_HIGH - _LOW) * start + _LOW)
    yield factor, _HIGH, slope * (_HIGH - _LOW) / (1 - 1 / factor)
