"""The codes of GGUF files as the base, as they are stored: `--quantize stored`."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from experiments.configs.decoder import BatchSizes
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.models import checkpoint, families, stored_codes
from experiments.models.options import Options
from experiments.models.weights import flatten_weights
from experiments.studies.sft import program as programs
from experiments.training.mesh_sizes import MeshSizes
from lora_jax.quantization import Quantized, from_gguf
from tests.experiments import gguf_files
from tests.experiments.decoders import FIXTURES

TOKENS = np.arange(12, dtype=np.int32)[None]


def load(path, **loading):
    family = families.get_family(checkpoint.read_config(path))
    return lora.nnx.functional(family.load(path, Options(scan=True), **loading))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", "Q8_0"), ("llama", "Q4_1"), ("mixtral", "Q4_0"), ("gpt2", "Q8_0"), ("qwen2", "Q5_1")),
        *(("llama", "Q4_K"), ("llama", "Q6_K")),
    ],
)
def test_values_and_logits_are_those_of_the_dequantized_weights(name, kind, tmp_path):
    path, plain = gguf_files.widen(tmp_path, kind, name)
    apply, expected = load(plain)
    _, actual = load(path, stored=True)
    coded = {key for key, leaf in flatten_weights(actual).items() if isinstance(leaf, Quantized)}
    assert {"token/embedding"} < coded and all(key.endswith(("kernel", "embedding")) for key in coded)
    for key, leaf in flatten_weights(actual).items():
        np.testing.assert_array_equal(np.asarray(leaf), flatten_weights(expected)[key], err_msg=key)
    logits = [jax.jit(lora.adapt(apply))(base, {}, TOKENS) for base in (expected, actual)]
    np.testing.assert_allclose(logits[1], logits[0], rtol=1e-5, atol=1e-4)


def test_the_program_of_a_study_has_the_shapes_of_the_loaded_base(tmp_path):
    path, _ = gguf_files.widen(tmp_path, "Q8_0", "llama")
    config = Config(model=str(path), quantize="stored", length=16, dtype="bfloat16")
    program = programs.abstract(config, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        base = program.load(path)
    assert jax.tree.structure(program.base) == jax.tree.structure(base)
    for expected, actual in zip(jax.tree.leaves(program.base), jax.tree.leaves(base)):
        assert (expected.shape, expected.dtype, expected.sharding) == (actual.shape, actual.dtype, actual.sharding)
    assert base["token"]["embedding"].dtype == jnp.bfloat16


def test_a_mesh_divides_whole_blocks(tmp_path):
    path, _ = gguf_files.widen(tmp_path, "Q8_0", "llama")
    config = Config(model=str(path), quantize="stored", length=16, mesh=MeshSizes(fsdp=2), batch=BatchSizes(2))
    program = programs.abstract(config, jax.devices()[:2])
    with jax.set_mesh(program.mesh):
        kernel = program.load(path)["layers"]["attention"]["query"]["kernel"]
    assert kernel.codes.addressable_shards[0].data.size == kernel.codes.size // 2
    config = dataclasses.replace(config, mesh=MeshSizes(fsdp=4), batch=BatchSizes(global_=4))
    with pytest.raises(UserError, match=r"quantize stored: each shard of .* not a multiple of the block of 32"):
        programs.abstract(config, jax.devices()[:4])


def test_no_device_holds_more_than_its_shards(tmp_path, monkeypatch):
    """Codes are read shard by shard, and each shard is made on the first of its devices."""
    path, _ = gguf_files.widen(tmp_path, "Q8_0", "gpt2")
    config = Config(model=str(path), quantize="stored", length=16, mesh=MeshSizes(data=2, fsdp=2, tensor=2))
    program, received = programs.abstract(config), collections.Counter()

    def record(rows, *args, **options):
        leaf = from_gguf(rows, *args, **options)
        if rows.any():  # others are read for their shape
            (device,) = leaf.codes.devices()
            received[device] += rows.nbytes
        return leaf

    monkeypatch.setattr(stored_codes, "from_gguf", record)
    with jax.set_mesh(program.mesh):
        base = flatten_weights(program.load(path))
    monkeypatch.undo()
    expected = flatten_weights(load(path, stored=True)[1])
    codes = {key: leaf.codes for key, leaf in base.items() if isinstance(leaf, Quantized)}
    for key, array in codes.items():
        np.testing.assert_array_equal(array, expected[key].codes, err_msg=key)
    total = sum(array.nbytes for array in codes.values())
    held = sum(array.addressable_shards[0].data.nbytes for array in codes.values())
    assert held < total / 2 and max(received.values()) <= held and received.total() == total


def test_what_has_no_codes_is_refused(tmp_path):
    for path in (FIXTURES / "llama", gguf_files.FILES / "llama_f16.gguf"):
        with pytest.raises(UserError, match=f"{path.name}: holds no codes of GGUF's formats .*--quantize nf4 or int8"):
            load(path, stored=True)
    path, _ = gguf_files.widen(tmp_path, "Q4_1", other="Q8_0")
    with pytest.raises(UserError, match=r"key/kernel: stored as Q4_1 .* and Q8_0 .*, but layers and experts that are"):
        load(path, stored=True)


def test_layers_of_different_types_are_unrolled(tmp_path, lenient):
    path, plain = gguf_files.widen(tmp_path, "Q4_1", other="Q8_0")
    program = programs.abstract(Config(model=str(path), quantize="stored", length=16), jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        base = program.load(path)
        state = program.create(jax.random.key(0), base)
        batch = {name: jnp.ones(array.shape, array.dtype) for name, array in program.batch().items()}
        state, metrics = program.step(state, batch)
    weights = flatten_weights(base)
    kinds = [weights[f"layers/{layer}/attention/query/kernel"].format.name for layer in range(2)]
    assert kinds == ["Q4_1", "Q8_0"] and len(state.delta) == 14 and np.isfinite(metrics["loss"])
    apply, expected = load(plain)
    with jax.set_mesh(program.mesh):
        logits = jax.jit(lora.adapt(program.apply))(base, {}, TOKENS)
    np.testing.assert_allclose(logits, jax.jit(apply)(expected, TOKENS), rtol=1e-5, atol=1e-4)
