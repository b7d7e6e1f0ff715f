"""Trains adapters and full models of all tasks, serves the adapters in one batch, and writes the results."""

from experiments.configs.multitask import Config
from experiments.reports.page import FILES
from experiments.studies import provenance
from experiments.studies.multitask import problems, report, serving, training
from experiments.studies.multitask.report import Results
from experiments.training import outputs, processes


@outputs.exclusive
def run(config: Config) -> Results:
    """Runs or resumes the study, prints a table and findings, and writes a page, a figure and a JSON record.

    Raises:
      UserError: Model or data are missing or malformed, or training diverged.
    """
    outputs.claim(config.out, *FILES)
    console = processes.console()
    minutes = "" if config.fast else f"about {config.MINUTES} minutes on 2 CPU cores; "
    console.print(f"{minutes}after an interruption, the same command resumes", highlight=False)
    tasks = problems.load(config, lambda line: console.print(line, highlight=False))
    starts = training.fit_heads(tasks, config, console)
    outcomes, deltas = training.train_adapters(tasks, starts, config, console)
    full = training.train_full(tasks, starts, config, console)
    served = serving.serve(tasks, deltas, config, console)
    results = Results(tasks, [start.result for start in starts], outcomes, full, served)
    report.page(config, results).publish(config, provenance.record(config), console)
    return results
