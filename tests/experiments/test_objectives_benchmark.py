"""The benchmark of objectives: its table of roundings, and the readouts that it compares."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import objectives
from experiments.objectives.log_probabilities import LogProbabilities
from tests.experiments.decoders import load


def test_policies_differ_from_the_base_by_less_than_two_compilations_of_it(capsys):
    objectives.print_rounding()
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    values = {name: list(map(float, numbers)) for name, *numbers in rows}
    assert max(values["float32"]) < 1e-4
    spread, *differences = values["bfloat16"]
    assert 0 < max(differences) <= spread


def test_log_probabilities_from_whole_logits_are_those_in_chunks(monkeypatch):
    loaded = load("llama")
    monkeypatch.setattr(objectives, "LENGTH", 6)
    tokens = jnp.arange(24).reshape(2, 2, 6)
    batch = {"tokens": tokens, "labels": jnp.where(tokens % 6 > 2, tokens + 1, -1)}
    whole = objectives.with_readout(loaded.apply, objectives.from_logits)
    values = jax.jit(lambda base: [each(base, {}, batch) for each in (whole, LogProbabilities(loaded.apply))])
    np.testing.assert_allclose(*values(loaded.base), atol=1e-5)
