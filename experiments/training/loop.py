"""The loop around a compiled train step: progress, evaluation, checkpoints, resuming."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from typing import Any, TypeVar

from experiments.errors import UserError
from experiments.input.pipeline import Batches, iterate
from experiments.tasks.batching import Batch
from experiments.training import mesh as meshes
from experiments.training.checkpoints import Checkpoints
from experiments.training.interrupt import defer_signals
from experiments.training.meter import Meter, profile_steps
from experiments.training.processes import broadcast
from experiments.training.progress import Bar
from experiments.training.record import Record
from experiments.training.run import History, TrainingRun

S = TypeVar("S")
Step = Callable[[S, Batch], tuple[S, dict[str, Any]]]


def train(
    run: TrainingRun,
    step: Step[S],
    state: S,
    batches: Batches,
    total: int,
    *,
    due: set[int],
    score: float | None,
    evaluate: Callable[[S], float],
    format_score: Callable[[float], str],
    bar: Bar,
) -> tuple[S, History]:
    """Starts or resumes a training run and trains to its end.

    Args:
      run: The settings of the run.
      step: The library's compiled train step.
      state: The initial state, on the run's mesh.
      batches: The batches by step.
      total: The total number of steps.
      due: The steps after which the state is evaluated and saved.
      score: The validation score of the initial state; None if it is not evaluated.
      evaluate: Returns the validation score of a state.
      format_score: Formats a score for printing.
      bar: The progress bar.

    Returns:
      The final state and the measurements, as if the run had never been interrupted.

    Raises:
      UserError: The loss or a gradient is not finite, or a checkpoint cannot be read or written or is of a step after
        `total`.
      KeyboardInterrupt: The run was interrupted; a checkpoint is written.
      Preempted: The run received SIGTERM; a checkpoint is written.
    """
    with Checkpoints(run.checkpoints, best=run.best, settings=run.settings, say=bar.say) as checkpoints:
        state, content = checkpoints.restore(state)
        before = [] if score is None else [(0, score)]
        history = History(**content["history"]) if content else History(evaluations=before)
        start = len(history.losses)
        if start > total:
            raise UserError(
                f"{run.directory}: holds a run that was interrupted at step {start:,}, beyond the {total:,} steps of "
                "this one; request at least as many steps, or start over with --fresh"
            )
        if content:
            bar.say(f"  resumed at step {start} of {total}")
            bar.start_at(sum(map(batches.examples, range(start))))
        rows = meshes.process_rows(run.mesh, batches.batch_size)
        with (
            closing(iterate(batches, total, rows=rows, start=start)) as iterator,
            Record(run.directory, run.config, start) as record,
            profile_steps(run, start, total) as profile,
            defer_signals() as interrupt,
        ):
            if content:
                iterator.set_state(content["input"])
            meter = Meter(run, history, record)
            for number in range(start + 1, total + 1):
                profile(number, meter)
                batch = next(iterator)
                state, metrics = step(state, meshes.put_batch(run.mesh, batch, batches.batch_size))
                meter.add(number, metrics, batches.tokens(number - 1), batches.labels(number - 1))
                stopping = interrupt.requested(number)
                # The clocks of processes differ, so all use that of the first process.
                late = run.limits.minutes is not None and bool(broadcast(run.limits.reached(history) is not None))
                evaluating = bool(due) and (number in due or late)
                if evaluating:
                    meter.settle()
                    history.evaluations.append((number, evaluate(state)))
                    record.write(number, validation=history.evaluations[-1][1])
                    meter.settle()
                ending = late or (evaluating and run.limits.reached(history) is not None)
                if evaluating or stopping or ending or number % run.checkpoint_every == 0 or number == total:
                    meter.settle()
                    content = {"history": asdict(history), "input": iterator.get_state()}
                    last = history.evaluations[-1][1] if evaluating else None
                    checkpoints.save(number, state, content, score=last, wait=stopping)
                    meter.restart_clock()
                if stopping:
                    raise interrupt.error(number)
                note = f"step {number}/{total}  {history.recent(run.shown)}"
                bar.advance(batches.examples(number - 1), note)
                if number % batches.steps_per_epoch == 0 and number in due:
                    note += f", validation {format_score(history.evaluations[-1][1])}"
                    bar.say(f"  epoch {number // batches.steps_per_epoch}: {note}")
                if ending and number < total:
                    bar.say(f"  ended at step {number} of {total}: {run.limits.reached(history)}")
                    break
            meter.settle()
    return state, history


def plan_steps(
    epochs: int, steps_per_epoch: int, limit: int | None = None, every: int | None = None
) -> tuple[int, set[int]]:
    """Returns the total number of steps, and the steps after which to evaluate.

    Args:
      epochs: The number of passes over the data.
      steps_per_epoch: The number of steps per pass.
      limit: The maximum number of steps; None has no limit.
      every: The number of steps between evaluations. None evaluates after every pass, and in the middle of a single
        pass. The last step is always evaluated.

    Example:
      >>> total, due = plan_steps(2, 10, 15, every=4)
      >>> total, sorted(due)
      (15, [4, 8, 12, 15])
    """
    total = min(epochs * steps_per_epoch, limit or epochs * steps_per_epoch)
    if every is not None:
        return total, {*range(every, total, every), total}
    due = {*range(steps_per_epoch, total, steps_per_epoch), total}
    return total, due if len(due) > 1 else {total, round(total / 2)} - {0}
