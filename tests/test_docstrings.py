"""The examples in docstrings run, and every public name has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import lora_jax

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lora_jax.__path__, "lora_jax.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name, lenient):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0


@pytest.mark.parametrize("name", sorted(lora_jax.__all__))
def test_public_names_are_documented(name):
    thing = getattr(lora_jax, name)
    assert inspect.getdoc(thing)
    if not inspect.ismodule(thing):
        assert "Example:" in inspect.getdoc(thing), f"{name} has no example"
