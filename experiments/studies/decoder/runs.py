"""What the runs of decoders' studies share: the state to start from, and the finished run to continue."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console

import lora_jax as lora
from experiments.configs.decoder import DecoderConfig
from experiments.errors import UserError
from experiments.models import location
from experiments.pretrained.files import open_files
from experiments.studies.decoder.choices import choose
from experiments.studies.decoder.program import Program, read_description
from experiments.studies.decoder.report import RunReport
from experiments.training import outputs, processes
from experiments.training.checkpoints import differences
from experiments.training.run import Limits

EXTENDED = ("epochs", "steps", "max_minutes", "patience", "eval_every")
"""Settings that may change when a run continues: its length and its evaluations."""


C = TypeVar("C", bound=DecoderConfig)
R = TypeVar("R", bound=RunReport)


def begin(config: C, written: Sequence[str], console: Console) -> tuple[C, Path, Mapping[str, Any]]:
    """Finds the model, claims the directory of a run, and chooses the settings that the config leaves open.

    Args:
      config: The study's config.
      written: What the run writes to its directory; see :func:`experiments.training.outputs.begin`.
      console: The output.

    Returns:
      The config with its choices, the checkpoint, and the content of its `config.json`.
    """
    with processes.first_before_others():
        directory = location.find(config.model)
        if processes.is_first():
            outputs.begin(config.out, *written, fresh=config.fresh)
    description = read_description(config.model)
    return choose(config, description, console), directory, description


def start(config: DecoderConfig, program: Program, directory: Path, console: Console) -> tuple[lora.TrainState, int]:
    """Loads the base, creates the initial state and prints a summary.

    Args:
      config: The study's config.
      program: The program.
      directory: The checkpoint.
      console: The output.

    Returns:
      The state and the number of trained scalars.
    """
    base = program.load(directory)
    state = program.create(jax.random.key(config.seed), base)
    console.print(f"base: {config.model} on a mesh of {config.mesh}", highlight=False, soft_wrap=True)
    console.print(f"\n{lora.summary(base, state.delta)}\n", highlight=False, soft_wrap=True)
    return state, sum(leaf.size for leaf in jax.tree.leaves(lora.partition(state.delta)[0]))


def result_settings(
    config: DecoderConfig, directory: Path, digests: Sequence[str], ignored: Collection[str]
) -> dict[str, Any]:
    """Returns everything that affects the results, except the base's weights: checkpoints have their fingerprint.

    Args:
      config: The study's config.
      directory: The checkpoint.
      digests: Digests of the data.
      ignored: Settings that do not affect the results, or that a digest covers.
    """
    included = {name: value for name, value in asdict(config).items() if name not in {*ignored, *EXTENDED}}
    files = hashlib.sha256((open_files(directory).read("config.json") or "").encode()).hexdigest()
    return json.loads(json.dumps(included | {"model files": files, "data files": digests}, default=str))


def read_finished(
    load: Callable[[Path], R], path: Path, settings: Mapping[str, Any], total: int, limits: Limits, console: Console
) -> R | None:
    """Reads the report of a finished run; None without one, or if the run continues to more steps.

    Args:
      load: Reads a report.
      path: The file of the report, in the directory of the run.
      settings: The settings that affect the results of the present run.
      total: The number of steps of the present run.
      limits: Conditions that end the present run before its last step.
      console: The output.

    Raises:
      UserError: The finished run had other settings, or it should continue and has no checkpoints.
    """
    if not processes.broadcast(path.exists()):
        return None
    finished, directory = load(path), path.parent
    before = {name: value for name, value in finished.settings.items() if name not in EXTENDED}
    if difference := differences(before, settings):
        raise UserError(f"{directory}: contains a finished run with {difference}; --fresh starts over")
    done = len(finished.history.losses)
    if done >= total or limits.reached(finished.history) is not None:
        return finished
    if not (directory / "checkpoints").is_dir():
        raise UserError(f"{directory}: no checkpoints to continue from step {done}; --fresh starts over")
    line = f"continues from step {done:,} to {total:,} with the learning rate schedule of the longer run"
    console.print(line, highlight=False)
    return None
