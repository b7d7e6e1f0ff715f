"""Runs a comparison: its runs, its table beside the paper's values, its figure, its page and its record."""

from experiments.configs.comparison import Comparison
from experiments.reports.page import FILES, Page
from experiments.studies import provenance
from experiments.studies.comparison import report
from experiments.studies.comparison.description import Study, Summary
from experiments.studies.comparison.runs import run_rows
from experiments.studies.problem import Problem, load
from experiments.tasks import examples
from experiments.training import outputs, processes


@outputs.exclusive
def run(config: Comparison, study: Study) -> list[Summary]:
    """Runs or resumes a comparison, prints its table and findings, and writes table, figure and record to `config.out`.

    Raises:
      UserError: Model or data are missing or malformed, a row does not fit the model, or training diverged.
    """
    outputs.claim(config.out, *FILES)
    console = processes.console()
    console.print(f"{study.source}: {study.claim}", highlight=False)
    problem = load(config.model, config.data, examples.limits(config), config.lengths, report=console.print)
    summaries = run_rows(study.rows(config, problem), problem, config, console)
    page = Page(
        claim=study.claim,
        source=study.source,
        conditions=_conditions(config, problem, study.note, summaries),
        grid=report.grid(summaries, study.paper) if study.grid is None else study.grid(summaries),
        findings=study.findings(summaries),
        draw=lambda figure: study.draw(figure, summaries),
        entries={"rows": [report.as_json(summary) for summary in summaries], **study.entries(summaries)},
        size=study.size,
    )
    page.publish(config, provenance.record(config), console)
    return summaries


def _conditions(config: Comparison, problem: Problem, note: str, summaries: list[Summary]) -> str:
    minutes = sum(outcome.seconds for summary in summaries for outcome in summary.results) / 60
    seeds = "one seed" if config.seeds == 1 else f"mean ± standard deviation of {config.seeds} seeds"
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in problem.splits.items())
    return (
        f"{config.model} on {config.data}; examples: {sizes}; {seeds}. Validation examples select the head's penalty, "
        f"learning rates and the rows that findings compare; test examples are those of the table. {note} The runs of "
        f"the table took {minutes:.0f} minutes of training."
    )
