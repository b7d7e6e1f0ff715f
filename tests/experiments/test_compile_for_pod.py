"""The command that compiles for TPU slices: for a real one, with libtpu and without a TPU, and what it refuses."""

import collections
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments import compile_for_pod, pods
from experiments.aot import fitting, table, topology
from experiments.aot.cost import Cost, Exchange
from experiments.aot.roofline import roofline, usable_links
from experiments.aot.topology import Topology
from experiments.aot.traffic import Traffic
from experiments.command_line import config_names
from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.models import shapes
from experiments.models.flops import count_flops, multiplied_weights
from experiments.studies.sft import program
from experiments.training import mesh as meshes
from experiments.training.chips import GIB, TPUS, find_tpu
from experiments.training.mesh import MeshSizes

SLICE = "v5e:2x2"
MESH = ("--mesh.fsdp", "2", "--mesh.tensor", "2", "--dtype", "bfloat16")


def run(capfd, *flags, config="sft", slice_=SLICE):
    tiny = ("--model", "tiny-llama", "--length", "128", "--batch.global", "8") if config == "sft" else ()
    status = compile_for_pod.main([config, "--topology", slice_, *tiny, *flags])
    return status, capfd.readouterr()


@pytest.fixture
def small_llama(tmp_path):
    """A Llama of three layers whose weights differ in size, by its config.json alone."""
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 3, "vocab_size": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**shapes.read("Meta-Llama-3-8B"), **sizes, **heads}))
    return tmp_path


@pytest.mark.usefixtures("lenient")
def test_a_step_that_fits(capfd, monkeypatch, small_llama):
    file, analyses, compiled = small_llama / "figures.json", [], compile_for_pod.compile_config
    monkeypatch.setattr(
        compile_for_pod, "compile_config", lambda *args: analyses.append(compiled(*args)) or analyses[0]
    )
    status, said = run(capfd, *MESH, "--model", str(small_llama), "--rank", "1", "--json", str(file))
    assert status == 0, said.err
    figures = json.loads(file.read_text())
    memory, flops, bound = figures["memory"], figures["flops"], figures["roofline"]
    parts = sum(memory[name] for name in ("base", "delta", "optimizer", "batch", "temporaries", "program"))
    assert memory["total"] == pytest.approx(parts, rel=0.01)
    assert memory["total"] < memory["capacity"] == int(15.75 * GIB)
    # With what is computed again, products take from once to twice what the model needs, which has attention in it.
    assert flops["model"] / 4 < flops["total"] < 2 * flops["model"] / 4
    assert figures["uncounted"] == {}
    assert all(figures["exchanges"][kind]["bytes"] > 0 for kind in ("all-gather", "all-reduce"))
    assert bound["seconds"] == bound[bound["limit"]] == max(bound[name] for name in ("compute", "memory", "links"))
    assert 0 < bound["mfu"] < 1
    for words in ("HBM of a chip", "optimizer", "all-gather", "Lower bound of the time of a step", "limited by"):
        assert words in said.out
    _check_gathers(analyses[0].cost.exchanges)


def _check_gathers(exchanges):
    """FSDP gathers a tensor axis's part of each weight, layer by layer: in the forward and in the backward pass."""
    gathers = collections.Counter()
    for one in exchanges:
        if one.kind == "all-gather":
            gathers[one.bytes] += one.times
    layers, part = 3, lambda ins, outs: ins * outs * 2 // 2  # in bfloat16, half of it
    assert gathers.pop(part(512, 1792)) == 2 * 3 * layers  # gate, up, down
    assert gathers.pop(part(512, 2048)) == 2  # the head
    # For the gradient of their input XLA gathers query, key and value once more than for computing them again.
    assert 2 * 2 * layers <= gathers.pop(part(512, 512)) <= 3 * 2 * layers  # query and output
    assert 2 * 2 * layers <= gathers.pop(part(512, 256)) <= 3 * 2 * layers  # key and value
    delta = 4 * layers * (2 * (512 + 512) + 2 * (512 + 256) + 3 * (512 + 1792))  # of rank 1, in float32
    assert sum(size * times for size, times in gathers.items()) <= delta


@pytest.mark.usefixtures("lenient")
def test_a_step_that_does_not_fit(capfd):
    status, said = run(capfd, *MESH, "--batch.global", "4194304")
    assert status == 1
    assert "does not fit v5e:2x2: the step needs" in said.err
    assert "estimated to fit with --batch.accumulate" in said.err


@pytest.mark.parametrize(
    ("slice_", "message"),
    [
        ("v5e:3x3", r"there is no slice v5e:3x3 \(9 chips along 2 axes\); nearest is v5e:2x4"),
        ("v5p:4x4", r"there is no slice v5p:4x4 \(16 chips along 2 axes\); nearest is v5p:2x2x4"),
        ("v5:4x4", r"--topology is GENERATION:AxB .* not 'v5:4x4'; the nearest is v5e:4x4"),
        ("pod", r"--topology is GENERATION:AxB"),
    ],
)
def test_slices_that_there_are_not(capfd, slice_, message):
    with pytest.raises(UserError, match=message):
        topology.describe(slice_)
    status, said = run(capfd, slice_=slice_)
    assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1


def test_what_the_command_line_refuses(capfd, monkeypatch, tmp_path):
    status, said = run(capfd, config="sfd")
    assert status == 2 and "did you mean sft?" in said.err
    status, said = run(capfd, config="quickstart")
    assert status == 2 and "quickstart has no step for a pod" in said.err
    status, said = run(capfd, "--mesh.fsdp", "3")
    assert status == 2 and "has 3 devices, v5e:2x2 has 4 chips; choose sizes whose product is 4" in said.err
    status, said = run(capfd, "--json", "/nowhere/figures.json")
    assert status == 2 and said.err == "error: --json /nowhere/figures.json: there is no directory /nowhere\n"
    status, said = run(capfd, "--json", str(tmp_path))
    assert status == 2 and said.err == f"error: --json {tmp_path} is a directory, expected a file\n"
    status, said = run(capfd, "--model", "nowhere")
    assert status == 2 and "shapes are shipped for Llama-2-70b-chat-hf, Llama-2-70b-hf" in said.err
    status, said = run(capfd, "--model", "Meta-Llama-3-8B-Instuct")
    assert status == 2 and said.err.endswith("did you mean Meta-Llama-3-8B-Instruct?\n")
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    status, said = run(capfd)
    assert status == 2 and "uv sync --extra tpu" in said.err


def test_help_is_the_commands_and_the_configs(capfd):
    with pytest.raises(SystemExit, match="0"):
        compile_for_pod.main(["llama3-8b-lora", "--help"])
    said = capfd.readouterr().out
    assert "--topology" in said and "--batch.global {None}|INT" in said
    with pytest.raises(SystemExit, match="2"):
        compile_for_pod.main(["llama3-8b", "--help"])
    assert "did you mean llama3-8b-lora?" in capfd.readouterr().err


def test_the_documented_slices():
    assert topology.names(find_tpu("v5e"))[-1] == "v5e:16x16"
    assert {"v5p:2x2x1", "v5p:2x4x4", "v5p:8x8x16"} <= set(topology.names(find_tpu("v5p")))
    assert all(":" in name for chip in TPUS for name in topology.names(chip))


@dataclasses.dataclass(frozen=True)
class Device:
    coords: tuple[int, ...]


def slice_of(name):
    sizes = tuple(map(int, name.partition(":")[2].split("x")))
    padded = (*sizes, 1)[:3]
    devices = [Device(tuple(map(int, np.unravel_index(n, padded)))) for n in range(math.prod(padded))]
    return Topology(name, find_tpu(name.partition(":")[0]), sizes, devices)


def test_links_that_a_group_can_use():
    flat, ring, cube = slice_of("v5e:4x4"), slice_of("v5e:16x16"), slice_of("v5p:4x4x4")
    rows = lambda groups: Exchange("all-gather", 1, np.array(groups), 1, "")  # noqa: E731
    assert usable_links(rows([[0, 1, 2, 3]]), flat, np.array(flat.devices)) == 1  # a row, whose ends are not joined
    assert usable_links(rows([list(range(16))]), flat, np.array(flat.devices)) == 2
    assert usable_links(rows([list(range(16))]), ring, np.array(ring.devices)) == 2  # a row of 16 is a ring
    assert usable_links(rows([list(range(256))]), ring, np.array(ring.devices)) == 4
    assert usable_links(rows([list(range(64))]), cube, np.array(cube.devices)) == 6
    around = Exchange("collective-permute", 1, np.array([[n, (n + 1) % 4] for n in range(4)]), 1, "")
    assert usable_links(around, cube, np.array(cube.devices)) == 2


def test_the_roofline_is_its_slowest_term():
    flat = slice_of("v5e:4x4")
    gathered = Exchange("all-gather", 16 * 10**9, np.arange(16)[None], 2, "")
    cost = Cost(dots=197e12, kernels=197e11, exchanges=(gathered,), traffic=Traffic(819e9 / 2))
    bound = roofline(cost, flat, np.array(flat.devices), 16 * 197e12)
    assert (bound.compute, bound.memory, bound.links) == (1.1, 0.5, 2 * 15e9 / (2 * 50e9))
    assert (bound.limit, bound.seconds, bound.mfu) == ("compute", 1.1, 1 / 1.1)


def test_what_a_model_needs():
    config = Config(
        model="Mixtral-8x7B-v0.1", targets=("attention",), dtype="bfloat16", length=128, batch=BatchSizes(8)
    )
    parts = program.abstract(config, jax.devices()[:1], "cpu")
    met = sum(multiplied_weights(parts.base, parts.shape).values())  # of 46.7e9 weights
    assert met == pytest.approx(12.75e9, rel=0.01)
    llama = program.abstract(dataclasses.replace(config, model="Meta-Llama-3-8B"), jax.devices()[:1], "cpu")
    head = 4096 * 128256
    kernels = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    factors = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    flops = count_flops(llama.base, llama.delta, llama.shape, config.length)
    assert (flops.token, flops.label) == (4 * kernels + 6 * factors + 6 * 32 * 4096 * 128, 4 * head)


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
def test_what_a_head_needs(model):
    """Also a tied one, and its adapter; tokens without a label do not need it."""
    config = Config(model=model, length=64, rank=2)
    plain = program.abstract(config, jax.devices()[:1], "cpu")
    adapted = program.abstract(dataclasses.replace(config, targets=("attention", "embedding")), jax.devices()[:1])
    vocabulary, width = plain.base["token"]["embedding"].shape
    one, other = (count_flops(parts.base, parts.delta, parts.shape, 64) for parts in (plain, adapted))
    assert one.label == 4 * vocabulary * width
    tied = "output" not in plain.base
    assert other.label - one.label == (6 * 2 * (vocabulary + width) if tied else 0)


def test_advice_by_arithmetic():
    config = Config(model="Meta-Llama-3-8B", dtype="bfloat16", length=2048, batch=BatchSizes(8), mesh=MeshSizes(data=8))
    devices = jax.devices()
    size = fitting.argument_bytes(config, devices)
    assert 16.0e9 < size < 17.0e9
    said = fitting.advice(config, devices, size + 2e9, 14e9)
    assert "--mesh.data 4 --mesh.fsdp 2" in said and "--quantize nf4" in said
    assert "use a larger slice" in fitting.advice(config, devices, size + 2e9, 1e9)


def test_the_table_of_slices(tmp_path):
    for row in (*table.ROWS, *table.SCALING):
        chips = math.prod(map(int, row.slice.partition(":")[2].split("x")))
        assert row.slice in topology.names(find_tpu(row.slice.partition(":")[0]))
        assert row.config.mesh.count == chips
        assert row.config.batch_size % row.config.mesh.replicas == 0
    assert {row.name for row in table.ROWS} == set(config_names(pods))
    row = table.ROWS[0]
    bound = {"compute": 1.0, "memory": 0.5, "links": 0.25, "limit": "compute", "mfu": 0.7, "tokens_per_second": 16e3}
    figures = {
        "chips": 16,
        "memory": {"total": 6 * GIB, "capacity": int(15.75 * GIB)},
        "flops": {"total": 2e12},
        "exchanges": {"all-gather": {"bytes": 3e9, "runs": 1}, "all-reduce": {"bytes": 1e9, "runs": 1}},
        "roofline": bound,
    }
    for one in (row, *table.SCALING):
        (tmp_path / one.file).write_text(json.dumps(figures))
    *_, line = table.table([row], tmp_path)
    assert line.startswith(
        "| llama3-8b-lora | v5e:4x4 | 2048 | 64 | fsdp 16 | full | 6.0 of 15.75 | 2.0 | 4.0 | 1.000 |"
    )
    assert line.endswith("| compute | 70 % | 1,000 |  |")
    assert list(table.scaling(table.SCALING, tmp_path))[-1].endswith("| 4.000 | +0.00 % | 70 % |")


@pytest.mark.parametrize(
    ("slice_", "sizes"),
    [
        ("v5p:4x4x4", MeshSizes(fsdp=32, tensor=2)),  # 4 × 8 by 2 cuts an axis of 4 in two
        ("v5p:2x4x4", MeshSizes(fsdp=32)),
        ("v5e:4x4", MeshSizes(data=2, fsdp=4, tensor=2)),
    ],
)
def test_meshes_that_do_and_do_not_follow_the_axes_of_a_slice(slice_, sizes):
    devices = topology.describe(slice_).devices
    mesh = meshes.make_mesh(sizes, devices)
    assert mesh.devices.shape == (sizes.data, sizes.fsdp, sizes.tensor)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
