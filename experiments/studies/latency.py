"""The time of a forward pass with adapters, and of switching tasks (LoRA paper, table 1, §4.2 and appendix B)."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib import colormaps
from matplotlib.figure import Figure

import lora_jax as lora
from experiments.configs.latency import Config
from experiments.models.gpt2 import Gpt2, Gpt2Config
from experiments.models.options import Options
from experiments.reports.findings import Finding
from experiments.reports.page import FILES, Grid, Page
from experiments.reports.results import stored_bytes
from experiments.reports.table import size
from experiments.studies import provenance
from experiments.training import outputs, processes

_LORA, _LATE, _BOTH = "attention/qkv/kernel", "feed_forward/down/kernel", "(attention/output|feed_forward/down)/kernel"
_PAPER = "the paper: +20.7 to +30.3 % at 1x128 with 11M parameters, +2.2 to +3.0 % at 32x512 with 0.5M"
_FROM_DISK, _RELOAD = "another delta from disk", "all weights from disk"
_SHARE = 11 / 355
"""The trained parameters of the paper's larger adapters, as a share of GPT-2 medium's."""

BASE, MERGED, FACTORED = "base", "LoRA, merged", "LoRA, not merged"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compute the logits.

    Attributes:
      parameters: The number of trained parameters.
      seconds: The times of the passes, by shape.
    """

    parameters: int
    seconds: dict[str, list[float]]


@outputs.exclusive
def run(config: Config) -> dict[str, Variant]:
    """Times all variants, prints a table and findings, and writes a page, a figure and a JSON record."""
    outputs.claim(config.out, *FILES)
    console = processes.console()
    apply, base = _model(config)
    deltas = {name: _delta(apply, base, spec) for name, spec in _specs(config).items()}
    adapted = jax.jit(lora.adapt(apply))
    merged = lora.merge(base, deltas[FACTORED])
    passes = {BASE: (base, {}), MERGED: (merged, {})} | {name: (base, delta) for name, delta in deltas.items()}
    variants = {
        name: Variant(_count(deltas.get(name, deltas[FACTORED] if name == MERGED else {})), {}) for name in passes
    }
    for shape, batch in zip(config.shapes, config.batches()):
        tokens = jnp.zeros(batch, jnp.int32)
        calls = {name: partial(adapted, *params, tokens) for name, params in passes.items()}
        for name, seconds in _alternate(calls, config.repeats).items():
            variants[name].seconds[shape] = seconds
        console.print(
            f"{shape}: {statistics.median(variants[BASE].seconds[shape]):.3f} s for the base", highlight=False
        )
    switches = _switches(config, base, merged, deltas[FACTORED])
    small, large = _bytes(config, base, deltas[FACTORED])
    size_of_base = sum(leaf.size for leaf in jax.tree.leaves(base))
    page = Page(
        claim="Bottleneck adapters make inference slower, most with small batches; merged LoRA does not",
        source="LoRA, table 1 (GPT-2 medium on a Quadro RTX 8000)",
        conditions=f"A GPT-2 of {size_of_base:,} parameters with random weights in "
        f"float32, layers scanned, no cache; median of {config.repeats} alternating passes. Switching tasks: "
        + "; ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in switches.items())
        + f". {config.tasks} tasks on disk: {size(small)} of adapters and the base, {size(large)} of full models.",
        grid=_grid(config, variants),
        findings=_findings(config, variants, size_of_base, switches),
        draw=lambda figure: _draw(figure, config, variants),
        entries={
            "variants": {name: dataclasses.asdict(variant) for name, variant in variants.items()},
            "switches": switches,
            "bytes_on_disk": {"adapters": small, "full": large},
        },
    )
    page.publish(config, provenance.record(config), console)
    return variants


def _model(config: Config) -> tuple[Callable, Any]:
    shape = Gpt2Config(
        vocab_size=config.vocabulary,
        n_positions=max(1024, *(length for _, length in config.batches())),
        n_embd=config.width,
        n_layer=config.layers,
        n_head=config.width // 64,
    )
    return lora.nnx.functional(Gpt2(shape, Options(scan=True), rngs=nnx.Rngs(0)))


def _specs(config: Config) -> dict[str, dict[str, Any]]:
    """Returns LoRA, and adapters after the feed-forward layer (Lin) and also after attention (Houlsby)."""
    specs: dict[str, dict[str, Any]] = {FACTORED: {_LORA: lora.LoRA(config.rank)}}
    for width in config.sizes:
        specs[f"adapters, Lin, size {width}"] = {_LATE: lora.Bottleneck(width, norm=True)}
        specs[f"adapters, Houlsby, size {width}"] = {_BOTH: lora.Bottleneck(width)}
    return specs


def _delta(apply: Callable, base: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a delta whose trained leaves are random, so that nothing is skipped because it is zero."""
    delta = lora.init(jax.random.key(0), base, spec, apply, jnp.zeros((1, 8), jnp.int32))
    train, frozen = lora.partition(delta)
    leaves, treedef = jax.tree.flatten(train)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [leaf + 0.01 * jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys)]
    return lora.join(treedef.unflatten(leaves), frozen)


def _count(delta: Mapping[str, Any]) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(lora.partition(dict(delta))[0]))


def _alternate(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times calls in turn, in another order in every round; a first round compiles."""
    names = list(calls)
    for call in calls.values():
        jax.block_until_ready(call())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeats):
        shift = round_number % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _switches(config: Config, base: Any, merged: Any, old: dict[str, Any]) -> dict[str, float]:
    """Returns the seconds of the ways to switch to another task: one in host memory, or one on disk."""
    new = jax.tree.map(np.asarray, lora.merging.scale(old, -1.0))
    switch = jax.jit(lambda params, new: lora.switch_task(params, old, new))
    with tempfile.TemporaryDirectory() as directory:
        path, adapter = Path(directory) / "model.npz", Path(directory) / "adapter"
        lora.save(adapter, new)
        leaves, treedef = jax.tree.flatten(merged)
        np.savez(path, *map(np.asarray, leaves))

        def reload() -> Any:
            with np.load(path) as arrays:
                return jax.device_put(treedef.unflatten([arrays[name] for name in arrays.files]))

        calls = {
            "another delta from memory": lambda: jax.device_put(new),
            "unmerge and merge": lambda: switch(merged, new),
            _FROM_DISK: lambda: jax.device_put(lora.load(adapter, base)),
            _RELOAD: reload,
        }
        return {name: statistics.median(times) for name, times in _alternate(calls, min(3, config.repeats)).items()}


def _bytes(config: Config, base: Any, delta: dict[str, Any]) -> tuple[int, int]:
    """Returns the bytes of many tasks on disk: one base and adapters, or full models."""
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(base))
    with tempfile.TemporaryDirectory() as directory:
        lora.save(Path(directory) / "adapter", delta)
        return whole + config.tasks * stored_bytes(Path(directory)), config.tasks * whole


def _overhead(variants: Mapping[str, Variant], name: str, shape: str) -> float:
    """Returns the median of the ratios of a variant's times to the base's, minus 1, in percent."""
    pairs = zip(variants[name].seconds[shape], variants[BASE].seconds[shape])
    return 100 * (statistics.median(one / other for one, other in pairs) - 1)


def _grid(config: Config, variants: Mapping[str, Variant]) -> Grid:
    header = ["forward pass", "trained parameters", *(f"{shape}, s" for shape in config.shapes)]
    rows = []
    for name, variant in variants.items():
        cells = [f"{statistics.median(variant.seconds[shape]):.3f}" for shape in config.shapes]
        if name != BASE:
            overheads = [_overhead(variants, name, shape) for shape in config.shapes]
            cells = [f"{cell} ({overhead:+.1f} %)" for cell, overhead in zip(cells, overheads)]
        rows.append([name, f"{variant.parameters:,}", *cells])
    return Grid(header, rows)


def _findings(
    config: Config, variants: Mapping[str, Variant], size_of_base: int, switches: Mapping[str, float]
) -> list[Finding]:
    first, last = config.shapes[0], config.shapes[-1]
    merged = max(_overhead(variants, MERGED, shape) for shape in config.shapes)
    houlsby = [name for name in variants if "Houlsby" in name]
    nearest = min(houlsby, key=lambda name: abs(variants[name].parameters - _SHARE * size_of_base))
    small, large = (_overhead(variants, nearest, shape) for shape in (first, last))
    another, reload = switches[_FROM_DISK], switches[_RELOAD]
    return [
        Finding("merged LoRA adds no time", "observed" if merged <= 2 else "not observed", f"at most {merged:+.1f} %"),
        Finding(
            "bottleneck adapters add most with the smallest batch",
            "observed" if small > large and small > 2 else "not observed",
            f"{nearest}: {small:+.1f} % at {first}, {large:+.1f} % at {last}; {_PAPER}",
        ),
        Finding(
            "another task is another delta: faster to load than all weights",
            "observed" if another < reload else "not observed",
            f"{1000 * another:.1f} ms instead of {1000 * reload:.0f} ms",
        ),
    ]


def _draw(figure: Figure, config: Config, variants: Mapping[str, Variant]) -> None:
    """Draws the overhead of every variant by shape."""
    axes = figure.subplots()
    names = [name for name in variants if name != BASE]
    places, height = np.arange(len(names)), 0.8 / len(config.shapes)
    colors = colormaps["Blues"](np.linspace(0.4, 1.0, len(config.shapes)))
    for index, (shape, color) in enumerate(zip(config.shapes, colors)):
        overheads = [_overhead(variants, name, shape) for name in names]
        axes.barh(
            places + (index - (len(config.shapes) - 1) / 2) * height, overheads, height=height, color=color, label=shape
        )
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlabel="time beyond that of the base, %")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="batch × length", edgecolor="none")
