"""The memory benchmark's arithmetic is the trees', its table has what it says, and a step at a tiny size runs."""

import dataclasses
import importlib.util

import jax
import pytest

from experiments.benchmarks import memory
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.benchmarks.memory_process import Figures, run
from experiments.benchmarks.memory_shapes import SIZES, SMALL, Shape
from experiments.benchmarks.memory_steps import make_step, on_device, quantized_leaves
from experiments.errors import UserError

pytestmark = pytest.mark.usefixtures("lenient")

TINY = Shape(layers=2, width=64, hidden=128, heads=2, vocabulary=256)
FIGURES = Figures(
    base=4_000_000_000,
    delta=640_000_000,
    optimizer=1_280_000_000,
    temporaries=2_000_000_000,
    device=7_920_000_000,
    peak=7_000_000_000,
    host=0,
    quantized=3_340_000_000,
)


@pytest.mark.parametrize(
    ("size", "count"),
    [("7B", 159_907_840), ("13B", 250_347_520), ("33B", 487_587_840), ("65B", 799_539_200)],
)
def test_adapters_and_bytes_a_parameter_of_llama(size, count):
    shape = SIZES[size]
    assert shape.factors(64) == count
    bits = 8 * Problem(shape, "qlora").quantized / (shape.layers * shape.block)
    # Codes, scales in eight bits, scales of these for 256 of them; the mean of a layer's scales is next to nothing.
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_full_fine_tuning_takes_what_the_paper_says():
    """Twelve bytes a parameter: weights and gradients in bfloat16, two moments in float32."""
    problem = Problem(SIZES["65B"], "full")
    assert problem.base + problem.moments + problem.items["gradients"] == 12 * SIZES["65B"].parameters
    assert SIZES["65B"].parameters == pytest.approx(65.3e9, rel=1e-3)
    assert 90e6 < SMALL.parameters < 110e6


@pytest.mark.parametrize("bytes", [2, 4])
@pytest.mark.parametrize("variant", memory.VARIANTS)
def test_the_arithmetic_is_that_of_the_trees(variant, bytes):
    problem = Problem(TINY, bytes=bytes, adapter_bytes=bytes, rank=4, tokens=16, **memory.VARIANTS[variant])
    setup = make_step(problem, on_device(jax.devices()[0]), "cpu")

    def count(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    parts = {name: count(tree) for name, tree in setup.parts().items()}
    assert parts["base"] == problem.base
    assert parts["delta"] == pytest.approx(problem.delta, abs=300)  # the adapters' scales
    assert parts["optimizer"] == pytest.approx(problem.moments, abs=4)  # the count of steps
    expected = problem.quantized if problem.method == "qlora" else 0
    assert sum(leaf.nbytes for leaf in quantized_leaves(setup.state.base)) == expected


def test_a_step_runs_and_its_memory_is_measured():
    figures = run(Problem(TINY, "qlora", bytes=4, rank=4, tokens=16), steps=1)
    assert figures.seconds > 0
    assert 0 <= figures.measured < 200e6  # what the process had before the step is not the step's
    held = figures.base + figures.delta + figures.optimizer + figures.temporaries
    assert figures.device == pytest.approx(held, abs=10_000)


def test_table_and_verdicts(capsys, monkeypatch):
    config = memory.Config(sizes=("7B",))
    host = dataclasses.replace(FIGURES, optimizer=16_000, host=1_280_000_000, device=6_640_000_000)
    figures = {("7B", memory.FULL): None, ("7B", memory.QLORA): FIGURES, ("7B", memory.HOST): host}
    shown = memory.table(config, figures)
    for _, variant in figures:
        assert f"7B   {variant} " in shown
    assert shown.count("estimate") == 3
    assert "2.000       7.920       7.000       0.000" in shown
    assert shown.count("exceeds one chip") == 1
    assert "2.000       1.080           –" in memory.items(config, figures)

    monkeypatch.setattr(memory, "fits", lambda problem, bytes: True)
    assert not memory.verdicts(config, figures), "these temporaries are above their bound"
    printed = capsys.readouterr().out
    assert printed.count("PASS") == 9
    assert printed.count("FAIL") == 2


def test_without_the_compiler_the_command_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert memory.main(memory.Config(parts=("v5p",))) == 2
    assert capsys.readouterr().err == (
        "compiling for a TPU needs libtpu, which the `tpu` extra installs: uv sync --extra tpu\n"
    )


def test_unknown_size_is_one_sentence():
    with pytest.raises(UserError, match=r"^unknown size 70B, expected one of 7B, 13B, 33B, 65B$"):
        memory.Config(sizes=("70B",))
