"""Compiles a config's training step for a TPU slice without TPUs, and reports its memory and a bound of its speed.

`python -m experiments.compile_for_pod CONFIG --topology v5e:4x4 [--json FILE] [--overrides of the config]`

The step is that of `python -m experiments.run CONFIG` on the slice with the same overrides. Requires the `tpu` extra
but no TPU. The exit status is 0 if the step fits, 1 if it does not (with advice on what would make it fit), 2 for
errors of the user.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import startup
from experiments.aot import report, topology
from experiments.aot.analysis import DoesNotFit
from experiments.aot.compilation import PROGRAM, compile_config, parse_config
from experiments.errors import UserError
from experiments.models import location, shapes
from lora_jax.io import replace_file


def main(args: Sequence[str] | None = None) -> int:
    """Parses the command line, compiles the step and prints the analysis.

    Args:
      args: The arguments; `sys.argv[1:]` by default.

    Returns:
      The exit status: 0 if the step fits, 1 if it does not, 2 for errors of the user.
    """
    options, overrides = _parser().parse_known_args(args)
    console = Console(highlight=False, soft_wrap=True)
    try:
        _check_file(options.json)  # before compiling, which takes minutes
        config = parse_config(options.config, overrides)
        _check_model(config.model)
        slice_ = topology.describe(options.topology)
        analysis = compile_config(config, slice_)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DoesNotFit as error:
        print(f"does not fit {options.topology}: {error.advice}", file=sys.stderr)
        return 1
    batch = f"{config.batch_size} sequences of {config.row_length} tokens"
    console.print(f"{options.config} on {slice_.name}: {config.model}, mesh {config.mesh}, {batch}")
    for part in report.tables(analysis, slice_):
        console.print(part)
    if options.json is not None:
        try:
            with replace_file(options.json) as file:
                file.write_text(json.dumps(report.as_json(analysis, slice_), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            print(f"error: {options.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0


def _check_file(path: Path | None) -> None:
    if path is not None and path.is_dir():
        raise UserError(f"--json {path} is a directory, expected a file")
    if path is not None and not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no directory {path.parent}")
    if path is not None and os.path.lexists(path):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            content = None
        if path.is_symlink() or not isinstance(content, dict) or "roofline" not in content:
            raise UserError(f"--json {path}: exists and was not written by this program; not replaced")


def _check_model(model: str) -> None:
    if shapes.has(model):
        return
    try:
        location.find(model)
    except UserError as error:
        near = difflib.get_close_matches(model, shapes.NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; shapes are shipped for {', '.join(shapes.NAMES)}"
        raise UserError(f"--model {error}{hint}") from None


class _Help(argparse.Action):
    """Prints the help of this command, and of the config if one precedes the flag."""

    def __init__(self, **options: Any):
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        if namespace.config is not None:
            print()
            try:
                parse_config(namespace.config, ["--help"])
            except UserError as error:
                parser.exit(2, f"error: {error}\n")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False, add_help=False,
        epilog="Other arguments are overrides of the config; CONFIG --help shows them.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="as for experiments.run")
    parser.add_argument("-h", "--help", action=_Help, dest=argparse.SUPPRESS, help="show this, and CONFIG's flags")
    parser.add_argument("--topology", required=True, help="the slice: v5e:4x4, v5p:2x2x2 …")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values to a file")
    return parser


if __name__ == "__main__":
    sys.exit(startup.run("python -m experiments.compile_for_pod", main))
