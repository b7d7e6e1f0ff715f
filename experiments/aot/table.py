"""Prints the table of `experiments/pods/README.md`: `python -m experiments.aot.table [--rows N …] [--out DIR]`.

Compiles, one after another, the steps of the pod configs for slices of TPUs, some with flags of their own, and one step
for slices of 16 to 256 chips with the same batch per chip. A row takes one to four minutes on two CPU cores; with
`--out` each row's figures are kept as JSON, and rows that are there are not compiled again.
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
    """A step and the slice that it is compiled for: `compile_for_pod NAME --topology SLICE FLAGS`.

    Attributes:
      name: Of the config.
      slice: The topology.
      flags: What differs from the config.
    """

    name: str
    slice: str
    flags: str = ""

    @property
    def config(self) -> Config:
        return parse_config(self.name, self.flags.split())

    @property
    def file(self) -> str:
        """Where figures of the row are kept."""
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
"""The steps of the table."""

SCALING = tuple(
    Row("llama3-8b-lora", slice_, f"--batch.global {chips} --mesh.data {chips // 16}")
    for slice_, chips in (("v5e:4x4", 16), ("v5e:4x8", 32), ("v5e:8x8", 64), ("v5e:8x16", 128), ("v5e:16x16", 256))
)
"""One sequence a chip, on more and more chips."""

_LIMITS = {"compute": "compute", "memory": "HBM", "links": "links"}


def figures(row: Row, out: Path | None) -> Mapping[str, Any]:
    """What `compile_for_pod --json` writes of a row; from a file where it is there."""
    file = None if out is None else out / row.file
    if file is not None and file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    slice_ = topology.describe(row.slice)
    found = report.as_json(compile_config(row.config, slice_), slice_)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def line(row: Row, found: Mapping[str, Any]) -> str:
    """A row of the table, in Markdown."""
    config, memory, bound = row.config, found["memory"], found["roofline"]
    sent = sum(kind["bytes"] for kind in found["exchanges"].values())
    mesh = config.mesh
    axes = ", ".join(f"{name} {getattr(mesh, name)}" for name in ("data", "fsdp", "tensor") if getattr(mesh, name) > 1)
    cells = (
        row.name,
        row.slice,
        config.length,
        config.batch.global_,
        axes + (", sequence" if mesh.sequence else ""),
        config.remat,
        f"{memory['total'] / GIB:.1f} of {memory['capacity'] / GIB:.2f}",
        f"{found['flops']['total'] / 1e12:.1f}",
        f"{sent / 1e9:.1f}",
        f"{bound['compute']:.3f}",
        f"{bound['memory']:.3f}",
        f"{bound['links']:.3f}",
        _LIMITS[bound["limit"]],
        f"{100 * bound['mfu']:.0f} %",
        f"{bound['tokens_per_second'] / found['chips']:,.0f}",
        f"`{row.flags}`" if row.flags else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def table(rows: Sequence[Row], out: Path | None) -> Iterator[str]:
    """The lines of the table, each as soon as it is compiled."""
    head = (
        "| config | slice | length | batch | mesh | remat | HBM per chip, GiB | TFLOP per chip | sent per chip, GB "
        "| compute, s | HBM, s | links, s | limit | max. MFU | max. tokens/s per chip | flags |"
    )
    yield head
    yield f"|{'---|' * (head.count('|') - 1)}"
    for row in rows:
        yield line(row, figures(row, out))


def scaling(rows: Sequence[Row], out: Path | None) -> Iterator[str]:
    """What a chip sends on more and more chips, and how much more than on half as many."""
    yield "| slice | chips | mesh | batch | sent per chip, GB | change from half the chips | max. MFU |"
    yield "|---|---|---|---|---|---|---|"
    before = None
    for row in rows:
        found, config = figures(row, out), row.config
        sent = sum(kind["bytes"] for kind in found["exchanges"].values())
        more = "" if before is None else f"{100 * (sent / before - 1):+.2f} %"
        mesh = f"data {config.mesh.data}, fsdp {config.mesh.fsdp}"
        cells = (row.slice, found["chips"], mesh, config.batch.global_, f"{sent / 1e9:.3f}", more)
        yield f"| {' | '.join(map(str, cells))} | {100 * found['roofline']['mfu']:.0f} % |"
        before = sent


def main(args: Sequence[str] | None = None) -> int:
    """Prints both tables; 1 where a step does not fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of rows, from 1; then the scaling is left out")
    parser.add_argument("--out", type=Path, help="where figures are kept")
    own = parser.parse_args(args)
    try:
        for text in table(ROWS if own.rows is None else [ROWS[number - 1] for number in own.rows], own.out):
            print(text, flush=True)
        if own.rows is None:
            print()
            for text in scaling(SCALING, own.out):
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
