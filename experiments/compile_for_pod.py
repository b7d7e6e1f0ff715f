"""Compiles a config's training step for a TPU slice that is not here: what it takes, and how fast it can be.

`python -m experiments.compile_for_pod CONFIG --topology v5e:4x4 [--json FILE] [--overrides of the config]`

The step is the one that `python -m experiments.run CONFIG` runs on the slice with the same overrides. Needs the `tpu`
extra and no TPU. Exit status 0 if it fits, 1 if it does not (and a sentence on what would make it fit), 2 for what the
user can put right.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from experiments.ahead import fitting, report, topology
from experiments.ahead.analysis import Analysis, DoesNotFit, analyse
from experiments.ahead.model import step_flops
from experiments.ahead.topology import Topology
from experiments.errors import UserError
from experiments.run import find_config
from experiments.studies.sft import program
from experiments.studies.sft.config import Config

_PROGRAM = "python -m experiments.compile_for_pod"


def main(args: Sequence[str] | None = None) -> int:
    """Parses the command line, compiles, prints.

    Args:
      args: In place of `sys.argv[1:]`.

    Returns:
      The exit status: 0 where the step fits, 1 where it does not, 2 for what the user can put right.
    """
    own, flags = _parser().parse_known_args(args)
    console = Console(highlight=False, soft_wrap=True)
    try:
        if own.json is not None and not own.json.parent.is_dir():  # said before the minutes that compiling takes
            raise UserError(f"--json {own.json}: there is no directory {own.json.parent}")
        config = _config(own.config, flags)
        slice_ = topology.describe(own.topology)
        analysis = compiled(config, slice_)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DoesNotFit as error:
        print(f"does not fit {own.topology}: {error.advice}", file=sys.stderr)
        return 1
    batch = f"{config.batch.global_} sequences of {config.length} tokens"
    console.print(f"{own.config} on {slice_.name}: {config.model}, mesh {config.mesh}, {batch}")
    for part in report.tables(analysis, slice_):
        console.print(part)
    if own.json is not None:
        try:
            own.json.write_text(json.dumps(report.as_json(analysis, slice_), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: {own.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def compiled(config: Config, slice_: Topology) -> Analysis:
    """The analysis of a config's step on a slice.

    Raises:
      UserError: The config does not go with the slice.
      DoesNotFit: Its step does not fit the chips; the exception's `advice` says what would.
    """
    chips, mesh = len(slice_.devices), config.mesh
    if mesh.count != chips:
        data, rest = divmod(chips, mesh.fsdp * mesh.tensor)
        hint = f"--mesh.data {data} fits" if data and not rest else f"choose sizes whose product is {chips}"
        raise UserError(f"the mesh ({mesh}) has {mesh.count} devices, {slice_.name} has {chips} chips; {hint}")
    made = program.abstract(config, slice_.devices, "tpu")
    needs = step_flops(made.base, made.delta, made.shape, made.tokens, config.length)
    try:
        analysis = analyse(made, slice_, needs)
        if analysis.memory.total > analysis.memory.capacity:
            raise DoesNotFit(analysis.memory.total, analysis.memory.capacity)
    except DoesNotFit as error:
        said = fitting.advice(config, slice_.devices, error.needed, error.available)
        raise DoesNotFit(error.needed, error.available, f"the step {error}: {said}") from error
    return analysis


def _config(name: str, flags: Sequence[str]) -> Config:
    module = find_config(name)
    if not isinstance(module.DEFAULTS, Config):
        raise UserError(f"{name} has no step for a pod; configs of supervised fine-tuning have, such as sft")
    try:
        return tyro.cli(type(module.DEFAULTS), default=module.DEFAULTS, prog=f"{_PROGRAM} {name}", args=list(flags))
    except ValueError as error:
        raise UserError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM, description=(__doc__ or "").split("\n\n")[0], epilog="What else is given goes to the config.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("config", help="as for experiments.run")
    parser.add_argument("--topology", required=True, help="the slice: v5e:4x4, v5p:2x2x2 …")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    return parser


if __name__ == "__main__":
    sys.exit(main())
