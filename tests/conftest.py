"""Settings for every test: eight virtual CPU devices, quick compilation, and JAX at its strictest."""

import importlib.metadata
import itertools
import os
import shutil
import zlib
from pathlib import Path

# Virtual CPU devices wherever the tests run, so that none skips for want of devices and numbers do not depend
# on the machine. Compiled code runs once or twice here: without LLVM's optimizations the suite takes a quarter
# less time, and without the emitters that pass through MLIR, compilation takes half the CPU time.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later releases have these emitters only
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
users_flags = os.environ.get("XLA_FLAGS", "")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # in processes that a test starts
os.environ["XLA_FLAGS"] = " ".join((users_flags, *FLAGS))

import jax  # noqa: E402
import pytest  # noqa: E402

assert jax.device_count() == 8, "Something used JAX before the tests could ask for eight devices."
# XLA has read its flags. Processes that a test starts (notebooks, commands) run as they do for a user.
os.environ["XLA_FLAGS"] = users_flags

MAX_PROGRAMS = 50_000
"""How many compiled programs later runs may find, of about 7 kB each; above that, all are deleted."""

MAX_MAPPINGS = 30_000
"""How many memory mappings a worker may have. Every compiled program has some, and Linux allows a process 65,530."""

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--full-product", action="store_true", help="The contract suite runs every combination, not all pairs."
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help="The contract suite runs each layer with LoRA and each recipe on one layer, as they are and under grad.",
    )


def pytest_configure(config):
    """Lets all workers, and later runs, share compiled programs.

    JAX's key of a program holds all that its result depends on. `pytest --cache-clear` forgets them.
    """
    if hasattr(config, "workerinput"):
        directory = config.workerinput["programs"]
    elif hasattr(config, "cache"):
        # The key has the flags of the environment, but not those that XLA read above.
        directory = config.cache.mkdir(f"programs-{zlib.crc32(' '.join(FLAGS).encode()):08x}")
        if sum(1 for _ in directory.iterdir()) > MAX_PROGRAMS:
            shutil.rmtree(directory)
        directory = str(directory)
    else:
        return  # -p no:cacheprovider
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", directory)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["programs"] = jax.config.jax_compilation_cache_dir


@pytest.fixture(scope="session")
def tests_so_far():
    return itertools.count(1)


@pytest.fixture(autouse=True)
def few_mappings(tests_so_far):
    """Drops compiled programs before the process has so many that LLVM cannot map another one, and aborts."""
    yield
    mappings = Path("/proc/self/maps")
    if next(tests_so_far) % 20 == 0 and mappings.exists() and mappings.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def getkey():
    """A function whose every call returns another key; the same keys in every run."""
    keys = (jax.random.fold_in(jax.random.key(0), i) for i in itertools.count())
    return lambda: next(keys)


@pytest.fixture
def lenient():
    """JAX's default promotions, for tests that run code of others: optax's Adam mixes dtypes, for one."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
