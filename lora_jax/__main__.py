"""Adapters on disk: `python -m lora_jax inspect | merge | convert | diff`."""

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
DIFFERENT, WRONG, INTERRUPTED, TERMINATED = 1, 2, 130, 143

_WIDE = 1000  # of a table into a file or another program, where no window tells
_PROBLEMS = 12  # how many of an adapter's problems are listed


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      args: In place of `sys.argv[1:]`.

    Returns:
      The exit status: 0; 1 where `diff` finds a difference; 2 for what the user can put right; 130 and 143 after
      an interrupt and a termination signal.
    """
    try:
        given = _parser().parse_args(args)
        with raise_on_signal(_Terminated):
            return _run(given)
    except SystemExit as stop:  # argparse's own (--help, or arguments that do not parse), or a closed pipe
        return stop.code if isinstance(stop.code, int) else WRONG
    except (ValueError, OSError) as error:
        print(f"error: {_said(error)}", file=sys.stderr)
        return WRONG
    except (KeyboardInterrupt, _Terminated) as error:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else TERMINATED


def _run(given: argparse.Namespace) -> int:
    from lora_jax import commands  # after the arguments are known to be right: JAX takes seconds to start

    console, progress = _console(), _console(stderr=True)
    match given.command:
        case "inspect":
            commands.inspect(given.adapter, given.base, console, progress, ignore=given.ignore)
        case "merge":
            commands.merge(
                given.base,
                given.adapter,
                given.out,
                force=given.force,
                ignore=given.ignore,
                console=console,
                progress=progress,
            )
        case "convert":
            commands.convert(
                given.adapter,
                given.out,
                target=given.target,
                base=given.base,
                force=given.force,
                ignore=given.ignore,
                console=console,
                progress=progress,
            )
        case "diff":
            return DIFFERENT if commands.diff(given.adapter, given.other, console, progress, ignore=given.ignore) else 0
    return 0


def _console(*, stderr: bool = False) -> Console:
    """Plain text: names of files and weights are no markup."""
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _WIDE
    return console


class _Terminated(BaseException):
    """A termination signal, as an exception: what is half-written is removed on the way out."""


def _said(error: Exception) -> str:
    """An error's message: an operating system's with the file first, a long list with its beginning."""
    if isinstance(error, OSError) and error.strerror:
        return shorten(f"{error.filename or error.filename2 or 'output'}: {error.strerror}.")
    text = re.sub(r"ignore=\('([^']+)',\)", r"--ignore \1", str(error))  # the library's argument, as the option
    lines = shorten(printable(text)).splitlines() or [type(error).__name__]
    more = len(lines) - 1 - _PROBLEMS
    return "\n".join(lines if more <= 0 else [*lines[: _PROBLEMS + 1], f"  … and {more} more"])


class _CommandParser(argparse.ArgumentParser):
    """The arguments of one command. Errors end with the form of the command."""

    form: str

    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:  # otherwise the main parser reports them, which does not know the command
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        super().error(f"{message}; the form is {self.form}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Adapters on disk: look at them, merge, convert, compare.",
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
        command.form = f"{PROGRAM} {name} {form}"
        return command

    inspect = add(
        "inspect",
        "ADAPTER [--base BASE]",
        "What an adapter holds: ranks, scales, norms of ΔW, and which base it fits.",
        "With --base every tensor is checked against the checkpoint, and norms are compared with its weights'.",
        "inspect my-adapter --base llama",
    )
    inspect.add_argument("adapter", metavar="ADAPTER", type=Path, help="a directory that PEFT or lora_jax wrote")
    inspect.add_argument("--base", type=Path, help="the checkpoint directory that a PEFT adapter may be for")

    merge = add(
        "merge",
        "BASE ADAPTER OUT",
        "Folds a PEFT adapter into a checkpoint that transformers loads.",
        "Sums are computed in float32 and rounded once to the stored dtype; files, shards and dtypes stay the base's.",
        "merge llama my-adapter merged",
    )
    merge.add_argument("base", metavar="BASE", type=Path, help="a checkpoint directory: config.json and safetensors")
    merge.add_argument("adapter", metavar="ADAPTER", type=Path, help="a directory that PEFT wrote")
    merge.add_argument("out", metavar="OUT", type=Path, help="the new checkpoint directory")

    convert = add(
        "convert",
        "ADAPTER OUT --target TARGET",
        "Writes a PEFT adapter for another reader.",
        "What the reader cannot hold is refused by name; uneven scales are folded into B where it has one for all.",
        "convert my-adapter for-vllm --target vllm",
    )
    convert.add_argument("adapter", metavar="ADAPTER", type=Path, help="a directory that PEFT wrote")
    convert.add_argument("out", metavar="OUT", type=Path, help="the new adapter directory")
    convert.add_argument(
        "--target",
        required=True,
        choices=("peft", "vllm", "gguf", "mlx"),
        help="vllm and gguf (llama.cpp's converter) read PEFT's format in part, mlx (mlx-lm) has its own",
    )
    convert.add_argument(
        "--base",
        type=Path,
        help="the checkpoint directory: tells embeddings that are stored but were not trained, and the shapes of "
        "weights, which adapters of ADALORA, IA3, LN_TUNING, LOHA, LOKR and VERA do not tell",
    )
    for command in (merge, convert):
        command.add_argument("--force", action="store_true", help="replace an existing output of the same kind")

    diff = add(
        "diff",
        "ADAPTER OTHER",
        "How two adapters differ.",
        "Adapters of lora_jax, and of PEFT's LORA and TRAINABLE_TOKENS. The exit status is 0 if they hold the same, "
        "bit for bit, 1 if they differ, 2 if one cannot be read.",
        "diff before after",
    )
    diff.add_argument("adapter", metavar="ADAPTER", type=Path, help="a directory that PEFT or lora_jax wrote")
    diff.add_argument("other", metavar="OTHER", type=Path, help="another")
    for command in (inspect, merge, convert, diff):
        command.add_argument(
            "--ignore",
            action="append",
            default=[],
            metavar="NAME",
            help="pass over tensors of a PEFT adapter whose name, or a part of it, begins so (v_head); may be repeated",
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
