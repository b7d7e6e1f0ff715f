"""`import lora_jax` loads neither other packages than JAX, Flax and Optax do, nor parts that few programs use."""

import json
import subprocess
import sys

import pytest

import lora_jax as lora

LAZY = ("analysis", "peft", "testing")

PROGRAM = """
import json, sys, tempfile
import jax, flax.nnx, optax
before = set(sys.modules)
import lora_jax as lora
imported = set(sys.modules) - before
delta = lora.init(jax.random.key(0), {"w": jax.numpy.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
created = set(sys.modules) - before - imported
with tempfile.TemporaryDirectory() as folder:
    lora.save(folder + "/adapter", delta)
    lora.load(folder + "/adapter")
saved = set(sys.modules) - before - imported
listed = dir(lora)
lazy = [lora.analysis.similarity.__module__, lora.peft.load.__module__, lora.testing.check_adapter.__module__]
json.dump([sorted(imported), sorted(created), sorted(saved), listed, lazy], sys.stdout)
"""


def packages(modules):
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names


@pytest.fixture(scope="module")
def loaded():
    """The modules that a new process loads: by the import, by `init`, and by `save` and `load`; then the names."""
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_import_loads_no_other_package(loaded):
    imported, created, *_ = loaded
    assert packages(imported) <= {"lora_jax", "jax"}
    assert packages(created) <= {"lora_jax", "jax", "jaxlib"}
    for name in (*LAZY, "commands"):
        assert not [module for module in (*imported, *created) if module.startswith(f"lora_jax.{name}")], name


def test_checkpoints_load_what_they_need(loaded):
    saved = loaded[2]
    assert {"orbax", "tensorstore"} <= packages(saved) and "lora_jax.peft" not in saved


def test_lazy_modules_are_attributes(loaded):
    *_, listed, modules = loaded
    assert set(lora.__all__) <= set(listed)
    assert [module.split(".")[1] for module in modules] == list(LAZY)
    assert set(LAZY) <= set(lora.__all__)
