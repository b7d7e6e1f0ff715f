"""Runs a comparison: its runs, its table beside the paper's values, its figure, and its record."""

from dataclasses import asdict
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.configs.comparison import Comparison
from experiments.reports import findings
from experiments.reports.results import write_json
from experiments.studies import provenance
from experiments.studies.comparison import report
from experiments.studies.comparison.description import Study, Summary
from experiments.studies.comparison.runs import run_rows
from experiments.studies.problem import load
from experiments.tasks import examples
from experiments.training import outputs, processes
from lora_jax.io import replace_file

_FILES = ("run.json", "README.md", "figure.png")


@outputs.exclusive
def run(config: Comparison, study: Study) -> list[Summary]:
    """Runs or resumes a comparison, prints its table and findings, and writes table, figure and record to `config.out`.

    Raises:
      UserError: Model or data are missing or malformed, a row does not fit the model, or training diverged.
    """
    outputs.claim(config.out, *_FILES)
    console = processes.console()
    console.print(f"{study.source}: {study.claim}", highlight=False)
    problem = load(config.model, config.data, examples.limits(config), config.lengths, report=console.print)
    summaries = run_rows(study.rows(config), problem, config, console)
    header, rows = report.cells(summaries, study.paper)
    console.print(report.table(header, rows))
    observed = list(study.findings(summaries))
    findings.show(observed, console)
    figure = Figure(figsize=(7.5, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    study.draw(figure, summaries)
    figure.savefig(config.out / "figure.png")
    record = provenance.record(
        config,
        claim=study.claim,
        source=study.source,
        rows=[_as_json(summary) for summary in summaries],
        findings=[asdict(finding) for finding in observed],
    )
    write_json(config.out / "run.json", record)
    minutes = sum(outcome.seconds for summary in summaries for outcome in summary.results) / 60
    machine = f"{record['devices'][0]}, jax {record['versions']['jax']}"
    with replace_file(config.out / "README.md") as file:
        text = report.page(config, study, minutes, report.markdown(header, rows), observed, machine)
        file.write_text(text, encoding="utf-8")
    console.print(f"written to {config.out}: {', '.join(_FILES)} and an adapter for each run", highlight=False)
    return summaries


def _as_json(summary: Summary) -> dict[str, Any]:
    row = summary.row
    results = [asdict(outcome) for outcome in summary.results]
    for result in results:  # of the head alone, whose training has no steps
        result.pop("losses", None), result.pop("evaluations", None)
    return {
        "name": row.name,
        "series": row.series,
        "position": row.position,
        "paper": row.paper,
        "rates": row.rates,
        "parameters": summary.parameters,
        "mean": summary.mean,
        "standard_deviation": summary.error,
        "results": results,
    }
