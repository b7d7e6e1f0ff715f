"""Settings for every test: eight virtual CPU devices, and JAX at its strictest."""

import os

# Before jax is imported. Devices are virtual CPU ones wherever the tests run, so that sharding tests never
# skip for want of devices and numbers do not depend on the machine.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        *(f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f),
        "--xla_force_host_platform_device_count=8",
    ]
)

import itertools

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--full-product",
        action="store_true",
        help="run the contract suite over the full product of its factors instead of all pairs",
    )


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


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """A device count below eight would turn sharding tests into tests of nothing."""
    assert jax.device_count() == 8
