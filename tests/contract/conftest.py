"""The contract suite's cases: all pairs by default, a few or the full product on request."""

from contract.cases import FACTORS, allowed
from contract.pairs import all_pairs, product

QUICK = {"dtype": ("float32",), "transformation": ("plain", "grad")}


def quick_cases() -> list[tuple[str, ...]]:
    """Each layer with LoRA, and each recipe on one layer."""
    by_layer = product(FACTORS | QUICK | {"recipe": ("LoRA",)}, allowed)
    by_recipe = product(FACTORS | QUICK | {"layer": ("raw.x_w",)}, allowed)
    return sorted({*by_layer, *by_recipe})


def pytest_generate_tests(metafunc):
    if {"layer", "recipe", "dtype", "transformation"} <= set(metafunc.fixturenames):
        if metafunc.config.getoption("--quick"):
            cases = quick_cases()
        elif metafunc.config.getoption("--full-product"):
            cases = product(FACTORS, allowed)
        else:
            cases = all_pairs(FACTORS, allowed)
        metafunc.parametrize(tuple(FACTORS), cases, ids=["-".join(case) for case in cases])
