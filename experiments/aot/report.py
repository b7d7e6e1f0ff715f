"""An analysis as tables and as JSON."""

from typing import Any

from rich import box
from rich.table import Table

from experiments.aot.analysis import Analysis
from experiments.aot.topology import Topology
from experiments.reports.table import size

_LIMITS = {"compute": "compute", "memory": "HBM bandwidth", "links": "chip-to-chip links"}


def as_json(analysis: Analysis, topology: Topology) -> dict[str, Any]:
    """All figures, in bytes, operations and seconds; those of memory and cost are one chip's."""
    memory, cost, bound = analysis.memory, analysis.cost, analysis.roofline
    sent, runs = cost.sent(), cost.runs()
    return {
        "topology": topology.name,
        "chips": analysis.chips,
        "tokens": analysis.tokens,
        "compile_seconds": analysis.seconds,
        "memory": {
            **memory.parts,
            "temporaries": memory.temporaries,
            "program": memory.program,
            "total": memory.total,
            "capacity": memory.capacity,
            "host": memory.host,
        },
        "flops": {"dots": cost.dots, "kernels": cost.kernels, "total": cost.flops, "model": analysis.model_flops},
        "uncounted": dict(cost.unknown),
        "exchanges": {kind: {"bytes": sent[kind], "runs": runs[kind]} for kind in sent},
        "traffic": {"hbm": cost.traffic.device, "host": cost.traffic.host},
        "roofline": {
            "compute": bound.compute,
            "memory": bound.memory,
            "links": bound.links,
            "seconds": bound.seconds,
            "limit": bound.limit,
            "mfu": bound.mfu,
            "tokens_per_second": analysis.tokens / bound.seconds,
        },
    }


def tables(analysis: Analysis, topology: Topology) -> list[Table | str]:
    """What the command line prints."""
    memory, cost, bound = analysis.memory, analysis.cost, analysis.roofline
    held = _table("HBM of a chip", "")
    for name, count in (*memory.parts.items(), ("temporaries", memory.temporaries), ("program", memory.program)):
        held.add_row(name, size(count))
    held.add_section()
    held.add_row("at the worst moment", size(memory.total))
    held.add_row(f"there is, of a {topology.chip.name}", size(memory.capacity))
    if memory.host:
        held.add_row("of the host's memory, beside", size(memory.host))

    done = _table("A step on a chip", "")
    done.add_row("matrix products", f"{cost.dots:.4g} FLOP")
    done.add_row("kernels (attention, experts)", f"{cost.kernels:.4g} FLOP")
    done.add_row("what the model needs, nothing twice", f"{analysis.model_flops / analysis.chips:.4g} FLOP")
    done.add_row("read from and written to HBM", size(cost.traffic.device))
    if cost.traffic.host:
        done.add_row("to and from the host", size(cost.traffic.host))

    exchanged = _table("Sent by a chip", "", "times")
    sent, runs = cost.sent(), cost.runs()
    for kind in sent:
        exchanged.add_row(kind, size(sent[kind]), str(runs[kind]))

    least = _table("The least time of a step", "ms", "of the bound")
    for name, seconds in (("compute", bound.compute), ("memory", bound.memory), ("links", bound.links)):
        least.add_row(_LIMITS[name], f"{1000 * seconds:.3f}", f"{seconds / bound.seconds:.0%}")
    said: list[Table | str] = [held, done, exchanged, least]
    said.append(
        f"limited by {_LIMITS[bound.limit]}: {1000 * bound.seconds:,.3f} ms a step at least, MFU {bound.mfu:.1%} and "
        f"{analysis.tokens / bound.seconds:,.0f} tokens/s at most"
    )
    if cost.unknown:
        named = ", ".join(f"{name} × {times}" for name, times in cost.unknown)
        said.append(f"not counted, for want of knowing what they do: {named}")
    return said


def _table(name: str, *columns: str) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column(name)
    for column in columns:
        made.add_column(column, justify="right", no_wrap=True)
    return made
