"""Small runs of supervised fine-tuning."""

import json

import jax
import numpy as np

TINY = ("--model", "tiny-llama", "--data", "debian_sections")
ARGUMENTS = (
    *TINY,
    *("--train-examples", "160", "--validation-examples", "8", "--samples", "0", "--test-examples", "0"),
    *("--length", "32", "--batch.global", "4", "--rank", "2", "--epochs", "100", "--dropout", "0.1"),
)
"""Of the command line, for the shipped tiny Llama and data that need no chat template."""


def losses(out):
    """Of every step of a finished run."""
    return json.loads((out / "result.json").read_text())["losses"]


def adapters_equal(one, other):
    """Bit for bit."""
    assert one.keys() == other.keys()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)
