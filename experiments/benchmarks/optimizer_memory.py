"""The memory of training steps by optimizer and method, measured and by XLA's analysis (LoRA §4.2, QLoRA §3)."""

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.aot import topology
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.benchmarks.memory_process import Figures, analyze_step, run_in_process
from experiments.benchmarks.memory_shapes import Shape
from experiments.benchmarks.memory_steps import make_step, on_device
from experiments.configs.optimizer_memory import Config
from experiments.errors import UserError
from experiments.reports.findings import Finding
from experiments.reports.page import FILES, Grid, Page
from experiments.studies import provenance
from experiments.training import outputs, processes

_METHODS = {
    "full, SGD": {"method": "full", "optimizer": "sgd"},
    "full, momentum": {"method": "full", "optimizer": "momentum"},
    "full, Adam": {"method": "full", "optimizer": "adam"},
    "LoRA, Adam": {"method": "lora", "optimizer": "adam"},
    "QLoRA, Adam": {"method": "qlora", "optimizer": "adam"},
}
_CHIP = "v5p:2x2x1"
_PARTS = {"weights": "#bbbbbb", "adapter": "#54a24b", "optimizer": "#f58518", "others": "#4c78a8"}


@outputs.exclusive
def run(config: Config) -> dict[str, Figures]:
    """Measures the steps, prints a table and findings, and writes a page, a figure and a JSON record to `config.out`.

    Raises:
      UserError: A step failed.
    """
    outputs.claim(config.out, *FILES)
    console = processes.console()
    shape = Shape(config.layers, config.width, config.width * 8 // 3, config.width // 64, config.vocabulary)
    measured: dict[str, Figures] = {}
    for name, fields in _METHODS.items():
        problem = Problem(shape, bytes=4, rank=config.rank, tokens=config.tokens, **fields)
        figures = run_in_process(problem, "cpu", config.steps)
        if isinstance(figures, str):
            raise UserError(f"the step of {name} failed: {figures}")
        measured[name] = figures
        console.print(f"{name}: {figures.measured / 1e6:,.0f} MB measured", highlight=False)
    compiled = _compile(config, shape) if importlib.util.find_spec("libtpu") else {}
    if not compiled:
        console.print("no libtpu (`pip install 'jax[tpu]'`): nothing is compiled for a TPU")
    page = Page(
        claim="Without optimizer state for frozen weights, training takes a third of the memory",
        source="LoRA §4.2 (GPT-3 175B: 1.2 TB to 350 GB); QLoRA §3, paged optimizers",
        conditions=f"A Llama-shaped model of {shape.parameters:,} parameters in float32, one sequence of "
        f"{config.tokens} tokens, rank {config.rank} on all linear layers. Memory in MB, of a step in a process of "
        "its own and by XLA's analysis of the compiled step.",
        grid=_grid(measured, compiled),
        findings=_findings(measured, compiled),
        draw=lambda figure: _draw(figure, measured),
        entries={"measured": _plain(measured), "compiled": _plain(compiled)},
    )
    page.publish(config, provenance.record(config), console)
    return measured


def _compile(config: Config, shape: Shape) -> dict[str, Figures]:
    """Compiles full fine-tuning with Adam for a TPU chip, in bfloat16."""
    sharding, compiled = on_device(topology.describe(_CHIP).devices[0]), {}
    for tokens in (config.tokens, config.long):
        for on_host in (False, True):
            name = f"v5p, {tokens:,} tokens, state {'on the host' if on_host else 'on the chip'}"
            problem = Problem(shape, "full", tokens=tokens, on_host=on_host)
            compiled[name] = analyze_step(make_step(problem, sharding, "tpu"), "tpu")
    return compiled


def _grid(measured: Mapping[str, Figures], compiled: Mapping[str, Figures]) -> Grid:
    header = ["step", "weights", "adapter", "optimizer state", "on the host", "whole step, XLA", "measured"]
    rows = [
        [name, *(f"{count / 1e6:,.1f}" for count in (step.base, step.delta, step.optimizer, step.host)), *_whole(step)]
        for name, step in {**measured, **compiled}.items()
    ]
    return Grid(header, rows)


def _whole(step: Figures) -> list[str]:
    return [f"{(step.peak or step.device) / 1e6:,.1f}", f"{step.measured / 1e6:,.1f}" if step.measured else "–"]


def _findings(measured: Mapping[str, Figures], compiled: Mapping[str, Figures]) -> list[Finding]:
    adam, lora, sgd = (measured[name] for name in ("full, Adam", "LoRA, Adam", "full, SGD"))
    share, state = lora.measured / adam.measured, adam.optimizer / adam.base
    findings = [
        Finding(
            "LoRA takes at most half of the memory of full fine-tuning with Adam",
            "observed" if share <= 0.5 else "not observed",
            f"measured {lora.measured / 1e6:,.0f} of {adam.measured / 1e6:,.0f} MB: {share:.0%}",
        ),
        Finding(
            "Adam's state is twice the size of the weights",
            "observed" if abs(state - 2) < 0.05 else "not observed",
            f"{adam.optimizer / 1e6:,.0f} and {adam.base / 1e6:,.0f} MB",
        ),
        Finding(
            "LoRA with Adam takes less than full fine-tuning with SGD, which has no state",
            "observed" if lora.measured < sgd.measured else "not observed",
            f"measured {lora.measured / 1e6:,.0f} and {sgd.measured / 1e6:,.0f} MB",
        ),
    ]
    if compiled:
        on_chip, on_host = list(compiled.values())[-2:]
        saved = on_chip.peak - on_host.peak
        findings.append(
            Finding(
                "state on the host makes room for a long rematerialized batch",
                "observed" if saved > 0.9 * (on_chip.optimizer - on_host.optimizer) else "not observed",
                f"the peak on the chip falls by {saved / 1e6:,.0f} MB, of {on_chip.optimizer / 1e6:,.0f} MB of state",
            )
        )
    return findings


def _draw(figure: Figure, measured: Mapping[str, Figures]) -> None:
    """Draws a bar for each step, of its parts by XLA's analysis, with the measured memory as a mark."""
    axes = figure.subplots()
    left = [0.0] * len(measured)
    for (name, color), values in zip(_PARTS.items(), zip(*(_parts(step) for step in measured.values()))):
        axes.barh(list(measured), values, left=left, color=color, label=name)
        left = [start + value for start, value in zip(left, values)]
    marks = [step.measured / 1e6 for step in measured.values()]
    axes.plot(marks, list(measured), "k|", markersize=18, markeredgewidth=2, label="measured")
    axes.set(xlabel="memory of a step, MB")
    axes.invert_yaxis()
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(edgecolor="none")


def _parts(step: Figures) -> Sequence[float]:
    parts = (step.base, step.delta, step.optimizer)
    return [count / 1e6 for count in (*parts, step.device - sum(parts))]


def _plain(steps: Mapping[str, Figures]) -> dict[str, Any]:
    return {name: dataclasses.asdict(step) for name, step in steps.items()}
