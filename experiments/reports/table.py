"""The table at the end of a study: a line a method, over its seeds."""

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
    """Costs and accuracy of each method; mean ± standard deviation where it ran with several seeds."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("method")
    for name in _COLUMNS:
        shown.add_column(name, justify="right", no_wrap=True)
    for group in by_method(results).values():
        first = group[0]
        shown.add_row(
            first.method,
            f"{first.trained_parameters:,}",
            "–" if first.adam_bytes is None else size(first.adam_bytes),
            size(first.adapter_bytes),
            spread([run.seconds for run in group], "{:.0f}"),
            spread([100 * run.validation_accuracy for run in group], "{:.1f}"),
            spread([100 * run.test_accuracy for run in group], "{:.1f}"),
        )
    return shown


def merged_line(results: Sequence[Result]) -> str:
    """Says by how much merged weights answer differently from base and adapter kept apart."""
    difference = max(run.merged_difference for run in results)
    agreement = min(run.merged_agreement for run in results)
    verdict = "agree" if agreement == 1 else "disagree in places"
    return (
        f"merged and unmerged predictions {verdict}: {agreement:.2%} of the test examples get the same "
        f"class, logits differ by {difference:.1e} at most"
    )


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each method, in the order in which methods first occur."""
    groups: dict[str, list[Result]] = {}
    for run in results:
        groups.setdefault(run.method, []).append(run)
    return groups


def spread(values: Sequence[float], form: str) -> str:
    """`mean` of one value, `mean ± deviation` of several."""
    mean = form.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(np.std(values, ddof=1))}"


def size(count: float) -> str:
    """Bytes in the unit in which they read best."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
