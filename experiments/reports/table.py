"""The table of a study's results, with a line for each method."""

from collections.abc import Sequence

import numpy as np
from rich import box
from rich.table import Table

from experiments.reports.results import Result

_COLUMNS = (
    "trained\nparameters",
    "Adam\nstate",
    "adapter\nfile",
    "seconds",
    "validation\naccuracy",
    "test\naccuracy",
)


def table(results: Sequence[Result]) -> Table:
    """Returns costs and accuracy of each method, as mean ± standard deviation if it ran with several seeds."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("method")
    for name in _COLUMNS:
        rows.add_column(name, justify="right", no_wrap=True)
    for group in by_method(results).values():
        first = group[0]
        rows.add_row(
            first.method,
            f"{first.trained_parameters:,}",
            "–" if first.adam_bytes is None else size(first.adam_bytes),
            size(first.adapter_bytes),
            spread([run.seconds for run in group], "{:.0f}"),
            spread([100 * run.validation_accuracy for run in group], "{:.1f}"),
            spread([100 * run.test_accuracy for run in group], "{:.1f}"),
        )
    return rows


def merged_line(results: Sequence[Result]) -> str:
    """Describes the differences between merged and unmerged predictions."""
    difference = max(run.merged_difference for run in results)
    agreement = min(run.merged_agreement for run in results)
    verdict = "agree" if agreement == 1 else "differ"
    return (
        f"merged and unmerged predictions {verdict}: {agreement:.2%} of the test examples have the same "
        f"class, logits differ by at most {difference:.1e}"
    )


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Groups results by method, in the order in which the methods first occur."""
    groups: dict[str, list[Result]] = {}
    for run in results:
        groups.setdefault(run.method, []).append(run)
    return groups


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
