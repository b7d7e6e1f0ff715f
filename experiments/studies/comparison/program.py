"""Runs a comparison: its runs, its table beside the paper's values, its figure, its page and its record."""

from collections.abc import Sequence

from rich.console import Console

from experiments.configs.comparison import Comparison
from experiments.reports.page import FILES, Page
from experiments.studies import provenance
from experiments.studies.comparison import paper, report
from experiments.studies.comparison.description import Study, Summary
from experiments.studies.comparison.runs import run_rows
from experiments.studies.problem import Problem, load
from experiments.tasks import examples
from experiments.training import mesh as meshes
from experiments.training import outputs, processes

_FEW = 0.01


@outputs.exclusive
def run(config: Comparison, study: Study) -> list[Summary]:
    """Runs or resumes a comparison, prints its table and findings, and writes table, figure and record to `config.out`.

    Raises:
      UserError: Model or data are missing or malformed, a row does not fit the model, or training diverged.
    """
    console = processes.console()
    meshes.make_mesh(config.mesh)  # raises if it does not fit, before anything is read
    meshes.check_batch(config.batch_size, config.mesh, "batch_size")
    processes.write(lambda: outputs.claim(config.out, *FILES))
    console.print(f"{study.source}: {study.claim}", highlight=False)
    notes = paper.notes(config)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    problem = load(
        config.model,
        config.data,
        examples.limits(config),
        config.lengths,
        report=console.print,
        regression=True,
        development=paper.preset(config) is not None,
    )
    if line := _truncated(problem):
        console.print(line, highlight=False, soft_wrap=True)
    rows = paper.rows(config, study.rows(config, problem))
    summaries = run_rows(rows, problem, config, console, apart=study.apart)
    if processes.is_first():
        _publish(config, study, problem, summaries, notes, console)
        study.after(config, summaries, console)
    return summaries


def _publish(
    config: Comparison,
    study: Study,
    problem: Problem,
    summaries: list[Summary],
    notes: Sequence[str],
    console: Console,
) -> None:
    page = Page(
        claim=study.claim,
        source=study.source,
        conditions=" ".join([_conditions(config, study, problem, summaries), *notes]),
        grid=report.grid(summaries, paper.heading(config) or study.paper)
        if study.grid is None
        else study.grid(summaries),
        findings=study.findings(summaries),
        draw=lambda figure: study.draw(figure, summaries),
        entries={"rows": [report.as_json(summary) for summary in summaries], **study.entries(summaries)},
        size=study.size,
    )
    page.publish(config, provenance.record(config), console)


def _truncated(problem: Problem) -> str:
    """Returns a line about texts of the maximum length, unless they are few."""
    longest = problem.lengths[-1]
    are_full = [len(sequence) == longest for split in problem.splits.values() for sequence in split.sequences]
    share = sum(are_full) / len(are_full)
    line = f"{share:.0%} of the texts have {longest} tokens or more; the tokens beyond are dropped, see --lengths"
    return line if share > _FEW else ""


def _conditions(config: Comparison, study: Study, problem: Problem, summaries: list[Summary]) -> str:
    note = f"{study.note} " if study.note else ""
    minutes = sum(outcome.seconds for summary in summaries for outcome in summary.results) / 60
    seeds = "one seed" if config.seeds == 1 else f"mean ± standard deviation of {config.seeds} seeds"
    names = {"train": "train", "validation": "validation", "test": problem.reported}
    sizes = ", ".join(f"{len(problem.splits[split]):,} {name}" for split, name in names.items())
    held_out = "" if problem.reported == "test" else ", which are held out from training,"
    return (
        f"{config.model} on {config.data}; examples: {sizes}; {seeds}. Validation examples{held_out} select the head's "
        f"penalty, learning rates and the rows that findings compare; {problem.reported} examples are those of the "
        f"table. {note}The runs of the table took {minutes:.0f} minutes of training."
    )
