"""The intrinsic dimension d₉₀ from the accuracies of subspaces: thresholds, table, figure and findings."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure

from experiments.reports.findings import Finding
from experiments.reports.page import Grid
from experiments.studies.comparison import figures, report
from experiments.studies.comparison.description import Summary
from experiments.studies.comparison.judge import best, better

SAID, PLAIN = "a scale for each layer (SAID)", "plain"
_PAPER = {SAID: "207: RoBERTa-large on MRPC", PLAIN: "750: a fully connected network on MNIST"}
_SCORE, _GAIN = "90 % of the score", "90 % of the gain"
_SLOW = "random directions need more steps than all weights do, and both are trained equally long"
_SCALES = "scales start from 1 and train at the rate of the coordinates, which moves them little in the same steps"


def thresholds(summaries: Sequence[Summary]) -> dict[str, Summary]:
    """Returns what d₉₀ compares with, example by example: 90 % of full fine-tuning's score, or of its gain over the
    head alone.

    Args:
      summaries: The head alone, the subspaces, and full fine-tuning.
    """
    head, full = summaries[0], summaries[-1]
    floor, answers = head.results[0].test_accuracy, head.contributions[0]

    def threshold(name: str, share: float) -> Summary:
        results = [
            replace(outcome, test_accuracy=0.9 * outcome.test_accuracy + share * floor) for outcome in full.results
        ]
        contributions = [0.9 * right + share * answers for right in full.contributions]
        return replace(full, row=replace(full.row, name=name), results=results, contributions=contributions)

    return {name: threshold(name, share) for name, share in ((_SCORE, 0.0), (_GAIN, 0.1))}


def d90(summaries: Sequence[Summary]) -> dict[str, dict[str, int | None]]:
    """Returns the smallest dimension of each form whose mean accuracy reaches a threshold, by form and threshold.

    It is 0 if the head alone reaches it, and None if no dimension does.
    """
    return {
        form: {
            name: next((int(row.x) for row in (summaries[0], *group) if row.mean >= threshold.mean), None)
            for name, threshold in thresholds(summaries).items()
        }
        for form, group in _forms(summaries).items()
    }


def grid(summaries: Sequence[Summary]) -> Grid:
    """Returns the accuracies by dimension, from the head alone to all weights, and d₉₀; a column for each form."""
    groups, dimensions = _forms(summaries), d90(summaries)
    head, *_, full = summaries
    names = [head.row.name, *(f"d = {row.x:,.0f}" for row in groups[PLAIN]), full.row.name]
    rows = [
        [name, *map(report.score, row)]
        for name, row in zip(names, zip(*([head, *group, full] for group in groups.values())))
    ]
    reached = [[f"d₉₀: {name}", *(_text(dimensions[form][name]) for form in groups)] for name in (_SCORE, _GAIN)]
    papers = ["papers' d₉₀ of the score", *(_PAPER[form] for form in groups)]
    return Grid([head.title, *groups], [*rows, *reached, papers])


def _text(dimension: int | None) -> str:
    return "none of these" if dimension is None else f"{dimension:,}"


def draw(figure: Figure, summaries: Sequence[Summary]) -> None:
    """Draws the accuracy by dimension, with full fine-tuning and the thresholds as horizontal lines."""
    figures.lines(figure, summaries[:-1], xlabel="d, trained coordinates of the random subspace")
    (axes,) = figure.axes
    for row, style in zip((summaries[-1], *thresholds(summaries).values()), ("-", ":", "-.")):
        axes.axhline(row.mean, color="#888888", linestyle=style, label=row.row.name)
    axes.legend(fontsize=8, edgecolor="none", framealpha=0.85)


def findings(summaries: Sequence[Summary]) -> list[Finding]:
    """Compares d₉₀ with the papers', the subspaces with 90 % of the gain, and both forms at the same dimension."""
    groups, gain = _forms(summaries), thresholds(summaries)[_GAIN]
    one, other = (group[len(group) // 2] for group in (groups[SAID], groups[PLAIN]))
    return [
        _few(summaries),
        *(
            better(f"a subspace reaches {_GAIN} of full fine-tuning, {form}", best(group), gain).because(_SLOW)
            for form, group in groups.items()
        ),
        better("a scale for each layer is better than as many coordinates more", one, other).because(_SCALES),
    ]


def _few(summaries: Sequence[Summary]) -> Finding:
    """Judges the papers' claim: fewer than 1,000 coordinates reach 90 % of the score, which the head alone does not."""
    sizes = {form: reached[_SCORE] for form, reached in d90(summaries).items()}
    few = any(size is not None and size < 1000 for size in sizes.values())
    verdict = "not decided" if 0 in sizes.values() else "observed" if few else "not observed"
    figures = "; ".join(f"d₉₀ {_text(size)}, {form}" for form, size in sizes.items())
    scores = f"{_SCORE} is {thresholds(summaries)[_SCORE].mean:.1f}, and the head alone has {summaries[0].mean:.1f}"
    claim = f"fewer than 1,000 coordinates reach {_SCORE}"
    return Finding(claim, verdict, f"{figures}; {scores}").because(_SLOW)


def _forms(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    return {form: [row for row in summaries if row.row.series == form] for form in (SAID, PLAIN)}
