"""Prints the table of `experiments/pods/README.md`: `python -m experiments.aot.table [--rows N …] [--out DIR]`.

Compiles the steps of the pod configs for TPU slices, some with overrides, and one step for slices of 16 to 256 chips
with the same batch per chip. A row takes one to four minutes on two CPU cores. With `--out` the values of each row are
stored as JSON, and stored rows are not compiled again.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import startup
from experiments.aot import report, topology
from experiments.aot.analysis import DoesNotFit
from experiments.aot.compilation import compile_config, parse_config
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.training.chips import GIB


@dataclasses.dataclass(frozen=True)
class Row:
    """A step and the slice that it is compiled for, as in `compile_for_pod NAME --topology SLICE FLAGS`.

    Attributes:
      name: The name of the config.
      slice: The topology.
      flags: The overrides of the config.
    """

    name: str
    slice: str
    flags: str = ""

    @property
    def config(self) -> Config:
        return parse_config(self.name, self.flags.split())

    @property
    def file(self) -> str:
        """The name of the file of the row's values."""
        words = " ".join((self.slice, self.name, self.flags)).strip()
        return words.replace("--", "").replace(":", "_").replace(" ", "_") + ".json"


_LONG = "--length 8192"
ROWS = (
    Row("llama3-8b-lora", "v5e:4x4"),
    Row("llama3-8b-lora", "v5e:4x4", f"{_LONG} --batch.global 16"),
    Row("llama3-8b-lora", "v5p:2x2x2", "--mesh.fsdp 8 --remat dots"),
    Row("llama3-8b-lora", "v5p:2x2x2", f"{_LONG} --batch.global 16 --mesh.fsdp 8 --remat dots"),
    Row("llama3-8b-dora", "v5e:4x4"),
    Row("llama2-70b-lora", "v5e:16x16", "--batch.global 256 --mesh.fsdp 256 --remat full"),
    Row(
        "llama2-70b-lora",
        "v5e:16x16",
        f"{_LONG} --batch.global 64 --mesh.fsdp 64 --mesh.tensor 4 --mesh.sequence --remat full",
    ),
    Row("llama2-70b-lora", "v5p:2x4x4"),
    Row("llama2-70b-lora", "v5p:2x4x4", f"{_LONG} --remat full"),
    Row("llama2-70b-qlora", "v5e:8x8"),
    Row(
        "llama2-70b-qlora",
        "v5e:8x8",
        f"{_LONG} --batch.global 32 --mesh.fsdp 32 --mesh.tensor 2 --mesh.sequence",
    ),
    Row("mixtral-8x7b-lora", "v5e:4x4"),
    Row("mixtral-8x7b-qlora", "v5e:2x4"),
)
"""The rows of the table."""

SCALING = tuple(
    Row("llama3-8b-lora", slice_, f"--batch.global {chips} --mesh.data {chips // 16}")
    for slice_, chips in (("v5e:4x4", 16), ("v5e:4x8", 32), ("v5e:8x8", 64), ("v5e:8x16", 128), ("v5e:16x16", 256))
)
"""One sequence per chip, on 16 to 256 chips."""

_LIMITS = {"compute": "compute", "memory": "HBM", "links": "links"}


def figures(row: Row, out: Path | None) -> Mapping[str, Any]:
    """Returns what `compile_for_pod --json` writes for a row, from its file if it exists."""
    file = None if out is None else out / row.file
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    slice_ = topology.describe(row.slice)
    values = report.as_json(compile_config(row.config, slice_), slice_)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return values


def line(row: Row, values: Mapping[str, Any]) -> str:
    """Formats a row of the table in Markdown."""
    config, memory, bound = row.config, values["memory"], values["roofline"]
    sent = sum(kind["bytes"] for kind in values["exchanges"].values())
    mesh = config.mesh
    axes = ", ".join(f"{name} {getattr(mesh, name)}" for name in ("data", "fsdp", "tensor") if getattr(mesh, name) > 1)
    cells = (
        row.name,
        row.slice,
        config.row_length,
        config.batch_size,
        axes + (", sequence" if mesh.sequence else ""),
        config.remat,
        f"{memory['total'] / GIB:.1f} of {memory['capacity'] / GIB:.2f}",
        f"{values['flops']['total'] / 1e12:.1f}",
        f"{sent / 1e9:.1f}",
        f"{bound['compute']:.3f}",
        f"{bound['memory']:.3f}",
        f"{bound['links']:.3f}",
        _LIMITS[bound["limit"]],
        f"{100 * bound['mfu']:.0f} %",
        f"{bound['tokens_per_second'] / values['chips']:,.0f}",
        f"`{row.flags}`" if row.flags else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: Sequence[Row], out: Path | None) -> Iterator[str]:
    """Yields the lines of the table, each after it is compiled."""
    head = (
        "| config | slice | length | batch | mesh | remat | HBM per chip, GiB | TFLOP per chip | sent per chip, GB "
        "| compute, s | HBM, s | links, s | limit | max. MFU | max. tokens/s per chip | flags |"
    )
    yield head
    yield f"|{'---|' * (head.count('|') - 1)}"
    for row in rows:
        yield line(row, figures(row, out))


def scaling(rows: Sequence[Row], out: Path | None) -> Iterator[str]:
    """Yields the lines of a table of the bytes that a chip sends, by the number of chips."""
    yield "| slice | chips | mesh | batch | sent per chip, GB | change from half the chips | max. MFU |"
    yield "|---|---|---|---|---|---|---|"
    previous = None
    for row in rows:
        values, config = figures(row, out), row.config
        sent = sum(kind["bytes"] for kind in values["exchanges"].values())
        change = "" if previous is None else f"{100 * (sent / previous - 1):+.2f} %"
        mesh = f"data {config.mesh.data}, fsdp {config.mesh.fsdp}"
        cells = (row.slice, values["chips"], mesh, config.batch_size, f"{sent / 1e9:.3f}", change)
        yield f"| {' | '.join(map(str, cells))} | {100 * values['roofline']['mfu']:.0f} % |"
        previous = sent


def main(args: Sequence[str] | None = None) -> int:
    """Prints both tables; returns 1 if a step does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows, from 1; omits the second table")
    parser.add_argument("--out", type=Path, help="the directory of the stored values")
    options = parser.parse_args(args)
    try:
        for text in table(ROWS if options.rows is None else [ROWS[number - 1] for number in options.rows], options.out):
            print(text, flush=True)
        if options.rows is None:
            print()
            for text in scaling(SCALING, options.out):
                print(text, flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except DoesNotFit as error:
        print(error.advice, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(startup.run("python -m experiments.aot.table", main))
