"""The contract suite's cases: all pairs by default, the full product on request."""

from contract.cases import FACTORS, allowed
from contract.pairs import all_pairs, product


def pytest_generate_tests(metafunc):
    if {"layer", "recipe", "dtype", "transformation"} <= set(metafunc.fixturenames):
        full = metafunc.config.getoption("--full-product")
        cases = product(FACTORS, allowed) if full else all_pairs(FACTORS, allowed)
        metafunc.parametrize(tuple(FACTORS), cases, ids=["-".join(case) for case in cases])
