"""Formats an analysis as tables and as JSON."""

from typing import Any

from rich import box
from rich.table import Table

from experiments.aot.analysis import Analysis
from experiments.aot.topology import Topology
from experiments.reports.table import size

_LIMITS = {"compute": "compute", "memory": "HBM bandwidth", "links": "chip-to-chip links"}


def as_json(analysis: Analysis, topology: Topology) -> dict[str, Any]:
    """Returns all values, in bytes, operations and seconds; memory and cost are those of one chip."""
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
    """Returns the tables and lines that the command line prints."""
    memory, cost, bound = analysis.memory, analysis.cost, analysis.roofline
    memory_table = _table("HBM of a chip", "")
    for name, count in (*memory.parts.items(), ("temporaries", memory.temporaries), ("program", memory.program)):
        memory_table.add_row(name, size(count))
    memory_table.add_section()
    memory_table.add_row("total at the peak", size(memory.total))
    memory_table.add_row(f"capacity of a {topology.chip.name}", size(memory.capacity))
    if memory.host:
        memory_table.add_row("host memory", size(memory.host))

    step_table = _table("A step on a chip", "")
    step_table.add_row("matrix products", f"{cost.dots:.4g} FLOP")
    step_table.add_row("kernels (attention, experts)", f"{cost.kernels:.4g} FLOP")
    step_table.add_row("model, without recomputation", f"{analysis.model_flops / analysis.chips:.4g} FLOP")
    step_table.add_row("read from and written to HBM", size(cost.traffic.device))
    if cost.traffic.host:
        step_table.add_row("to and from the host", size(cost.traffic.host))

    exchange_table = _table("Sent by a chip", "", "times")
    sent, runs = cost.sent(), cost.runs()
    for kind in sent:
        exchange_table.add_row(kind, size(sent[kind]), str(runs[kind]))

    time_table = _table("Lower bound of the time of a step", "ms", "of the bound")
    for name, seconds in (("compute", bound.compute), ("memory", bound.memory), ("links", bound.links)):
        time_table.add_row(_LIMITS[name], f"{1000 * seconds:.3f}", f"{seconds / bound.seconds:.0%}")
    parts: list[Table | str] = [memory_table, step_table, exchange_table, time_table]
    parts.append(
        f"limited by {_LIMITS[bound.limit]}: {1000 * bound.seconds:,.3f} ms per step at least, MFU {bound.mfu:.1%} and "
        f"{analysis.tokens / bound.seconds:,.0f} tokens/s at most"
    )
    if cost.unknown:
        names = ", ".join(f"{name} × {times}" for name, times in cost.unknown)
        parts.append(f"not counted, since their cost is unknown: {names}")
    return parts


def _table(name: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(name)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
