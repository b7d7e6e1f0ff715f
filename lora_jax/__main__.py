"""The command line: `python -m lora_jax inspect | merge | convert | diff | doctor`."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from lora_jax import __version__
from lora_jax.io import printable, raise_on_signal, shorten

PROGRAM = "lora-jax"
DIFFERENT, PROBLEM, WRONG, INTERRUPTED, TERMINATED = 1, 1, 2, 130, 143

_ADAPTER = "a directory that PEFT or lora_jax wrote"
_WIDE = 1000  # the width of tables if the output is not a terminal
_PROBLEMS = 12  # the number of an adapter's problems that are listed


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      args: The arguments; None for `sys.argv[1:]`.

    Returns:
      The exit status: 0; 1 if `diff` finds a difference, or `doctor` a problem; 2 for an error that the user can
      correct; 130 after an interrupt, and 143 after a termination signal.
    """
    try:
        arguments = _parser().parse_args(args)
        with raise_on_signal(_Terminated):
            return _run(arguments)
    except SystemExit as stop:  # from argparse (--help, or invalid arguments), or a closed pipe
        return stop.code if isinstance(stop.code, int) else WRONG
    except (ValueError, OSError) as error:
        print(f"error: {_format_error(error)}", file=sys.stderr)
        return WRONG
    except (KeyboardInterrupt, _Terminated) as error:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED


def _run(arguments: argparse.Namespace) -> int:
    from lora_jax import commands  # imported only for valid arguments, since JAX takes seconds to start

    console, progress = _console(), _console(stderr=True)
    match arguments.command:
        case "inspect":
            commands.inspect(arguments.adapter, arguments.base, console, progress, ignore=arguments.ignore)
        case "merge":
            commands.merge(
                arguments.base,
                arguments.adapter,
                arguments.out,
                force=arguments.force,
                ignore=arguments.ignore,
                console=console,
                progress=progress,
            )
        case "convert":
            commands.convert(
                arguments.adapter,
                arguments.out,
                target=arguments.target,
                base=arguments.base,
                dtype=arguments.dtype,
                force=arguments.force,
                ignore=arguments.ignore,
                console=console,
                progress=progress,
            )
        case "diff":
            return (
                DIFFERENT
                if commands.diff(arguments.adapter, arguments.other, console, progress, ignore=arguments.ignore)
                else 0
            )
        case "doctor":
            return 0 if commands.doctor(console, progress) else PROBLEM
    return 0


def _console(*, stderr: bool = False) -> Console:
    """Makes a console for plain text: names of files and weights may contain markup characters."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDE
    return console


class _Terminated(BaseException):
    """A termination signal as an exception, so that incomplete outputs are removed."""


def _format_error(error: Exception) -> str:
    """Formats an error: an operating system's error begins with the file, and long lists are truncated."""
    if isinstance(error, OSError) and error.strerror:
        return shorten(f"{error.filename or error.filename2 or 'output'}: {error.strerror}.")
    text = re.sub(r"ignore=\('([^']+)',\)", r"--ignore \1", str(error))  # the library's argument, as the option
    lines = shorten(printable(text)).splitlines() or [type(error).__name__]
    more = len(lines) - 1 - _PROBLEMS
    return "\n".join(lines if more <= 0 else [*lines[: _PROBLEMS + 1], f"  … and {more} more"])


class _CommandParser(argparse.ArgumentParser):
    """Parses the arguments of one command. Errors end with the form of the command."""

    form: str

    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:  # otherwise the main parser reports them, without the command's form
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}; the form is {self.form}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Inspects, merges, converts and compares adapters on disk, and checks the installation.",
        epilog=f"{PROGRAM} COMMAND --help has an example of each.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_CommandParser)

    def add(name: str, form: str, summary: str, details: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary} {details}",
            epilog=f"example: {PROGRAM} {example}",
        )
        command.form = f"{PROGRAM} {name} {form}".rstrip()
        return command

    inspect = add(
        "inspect",
        "ADAPTER [--base BASE]",
        "Prints an adapter's ranks, scales, norms of ΔW, and which base it fits.",
        "With --base every tensor is checked against the checkpoint, and norms are compared with its weights'.",
        "inspect my-adapter --base llama",
    )
    inspect.add_argument("adapter", metavar="ADAPTER", type=Path, help=_ADAPTER)
    inspect.add_argument("--base", type=Path, help="the checkpoint directory to check the adapter against")

    merge = add(
        "merge",
        "BASE ADAPTER OUT",
        "Merges an adapter into a checkpoint that transformers loads.",
        "Sums are computed in float32 and rounded once to the stored dtype; files, shards and dtypes are the base's.",
        "merge llama my-adapter merged",
    )
    merge.add_argument("base", metavar="BASE", type=Path, help="a checkpoint directory: config.json and safetensors")
    merge.add_argument("adapter", metavar="ADAPTER", type=Path, help=_ADAPTER)
    merge.add_argument("out", metavar="OUT", type=Path, help="the new checkpoint directory")

    convert = add(
        "convert",
        "ADAPTER OUT --target TARGET",
        "Converts an adapter for another reader.",
        "Anything that the reader does not support is an error; uneven scales are folded into B if it has one for all.",
        "convert my-adapter for-vllm --target vllm",
    )
    convert.add_argument("adapter", metavar="ADAPTER", type=Path, help=f"{_ADAPTER}; or a GGUF file of llama.cpp")
    convert.add_argument("out", metavar="OUT", type=Path, help="the new adapter directory, or .gguf file")
    convert.add_argument(
        "--target",
        required=True,
        choices=("peft", "vllm", "gguf", "gguf-file", "mlx"),
        help="vllm and gguf (llama.cpp's converter) support a part of PEFT's format, mlx (mlx-lm) has its own; "
        "gguf-file is the file that llama.cpp loads, for which --base may be a directory with config.json alone, or a "
        "GGUF file",
    )
    convert.add_argument(
        "--dtype", choices=("f32", "f16", "bf16"), help="the type of the factors of a gguf-file; f32 without"
    )
    convert.add_argument(
        "--base",
        type=Path,
        help="the checkpoint directory: needed if the adapter stores embeddings that may not be trained, and for "
        "methods other than LORA and TRAINABLE_TOKENS, whose adapters do not define the shapes of weights",
    )
    for command in (merge, convert):
        command.add_argument("--force", action="store_true", help="replace an existing output of the same kind")

    diff = add(
        "diff",
        "ADAPTER OTHER",
        "Compares two adapters.",
        "Supports adapters of lora_jax, and of PEFT's LORA and TRAINABLE_TOKENS. The exit status is 0 if they are "
        "equal, bit for bit, 1 if they differ, 2 if one cannot be read.",
        "diff before after",
    )
    diff.add_argument("adapter", metavar="ADAPTER", type=Path, help=_ADAPTER)
    diff.add_argument("other", metavar="OTHER", type=Path, help="the adapter to compare with")
    add(
        "doctor",
        "",
        "Prints a report to paste into an issue.",
        "It has versions, installed extras, settings, devices, free memory, and one training step on the device, in at "
        "most 15 lines. The exit status is 0 without a problem, otherwise 1.",
        "doctor",
    )
    for command in (inspect, merge, convert, diff):
        command.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="NAME",
            help="ignore tensors of a PEFT adapter whose name, or a part of it, begins with NAME (v_head); repeatable",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
