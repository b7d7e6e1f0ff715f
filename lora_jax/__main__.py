"""Adapters on disk: `python -m lora_jax inspect | merge | convert | diff`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

PROGRAM = "lora-jax"
_PIPE_WIDTH = 160  # into a file or another program, where no window tells
DIFFERENT, WRONG, INTERRUPTED = 1, 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      args: In place of `sys.argv[1:]`.

    Returns:
      The exit status: 0; 1 where `diff` finds a difference; 2 for what the user can put right.
    """
    try:
        given = _parser().parse_args(args)
    except SystemExit as stop:  # argparse's own: --help, or arguments that do not parse
        return stop.code if isinstance(stop.code, int) else WRONG
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    try:
        return _run(given, console)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED


def _run(given: argparse.Namespace, console: Console) -> int:
    from lora_jax import commands  # after the arguments are known to be right: JAX takes seconds to start

    match given.command:
        case "inspect":
            commands.inspect(given.adapter, given.base, console)
        case "merge":
            commands.merge(given.base, given.adapter, given.out, force=given.force, console=console)
        case "convert":
            commands.convert(given.adapter, given.out, target=given.target, force=given.force, console=console)
        case "diff":
            return DIFFERENT if commands.diff(given.adapter, given.other, console) else 0
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Adapters on disk: look at them, merge, convert, compare."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {PROGRAM} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    inspect = add("inspect", "What an adapter holds, and which base it fits.", "inspect my-adapter")
    inspect.add_argument("adapter", type=Path, help="a directory that PEFT or lora_jax wrote")
    inspect.add_argument("--base", type=Path, help="a checkpoint directory to compare a PEFT adapter with")

    merge = add(
        "merge", "Folds a PEFT adapter into a checkpoint that transformers loads.", "merge llama my-adapter merged"
    )
    merge.add_argument("base", type=Path, help="a checkpoint directory: config.json and safetensors")
    merge.add_argument("adapter", type=Path, help="a directory that PEFT wrote")
    merge.add_argument("out", type=Path, help="the new checkpoint directory")

    convert = add("convert", "Writes a PEFT adapter for another reader.", "convert my-adapter for-vllm --target vllm")
    convert.add_argument("adapter", type=Path, help="a directory that PEFT wrote")
    convert.add_argument("out", type=Path, help="the new adapter directory")
    convert.add_argument(
        "--target",
        required=True,
        choices=("peft", "vllm", "gguf", "mlx"),
        help="vllm and gguf (llama.cpp's converter) read PEFT's format in part, mlx (mlx-lm) has its own",
    )
    for command in (merge, convert):
        command.add_argument("--force", action="store_true", help="replace an existing output of the same kind")

    diff = add("diff", "How two adapters differ; status 1 if they do.", "diff before after")
    diff.add_argument("adapter", type=Path, help="a directory that PEFT or lora_jax wrote")
    diff.add_argument("other", type=Path, help="another")
    return parser


if __name__ == "__main__":
    sys.exit(main())
