"""Text of numbers in tables."""

from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float], form: str) -> str:
    """Formats one value, or mean ± standard deviation of several."""
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def size(count: float) -> str:
    """Formats a number of bytes with a suitable unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def short(rate: float) -> str:
    """Formats a learning rate in few characters.

    Example:
      >>> short(0.0001), short(0.00183), short(3e-5)
      ('1e-4', '1.8e-3', '3e-5')
    """
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
