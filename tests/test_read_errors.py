"""reading(): what readers raise becomes one sentence with the file's name."""

import json
import struct
import zlib

import pytest

from experiments.errors import Preempted, UserError
from experiments.errors import reading as reading_of_experiments
from lora_jax.io.read_errors import reading


class PanicException(BaseException):
    """As PyO3 raises where Rust panics."""

    __module__ = "pyo3_runtime"


def nested():
    json.loads("[" * 100_000)


@pytest.mark.parametrize(
    "raised, message",
    [
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
        (KeyError("shape"), "KeyError: 'shape'"),
        (TypeError("unhashable"), "TypeError: unhashable"),
        (AttributeError("no items"), "AttributeError: no items"),
        (OverflowError("too large"), "OverflowError: too large"),
        (MemoryError(), "out of memory"),
        (struct.error("unpack requires 8 bytes"), "error: unpack requires 8 bytes"),
        (zlib.error("incorrect header check"), "error: incorrect header check"),
        (Exception("data did not match any variant"), "data did not match any variant"),
        (PanicException("Missing additional token"), "PanicException: Missing additional token"),
        (ValueError("lone \ud800"), "lone \\ud800"),
        (ValueError("x " * 10_000), "…"),
    ],
)
@pytest.mark.parametrize("context, kind", [(reading, ValueError), (reading_of_experiments, UserError)])
def test_what_readers_raise(raised, message, context, kind):
    with pytest.raises(kind) as error, context("adapter.json"):
        raise raised
    text = str(error.value)
    assert type(error.value) is kind and error.value.__cause__ is raised
    assert text.startswith("adapter.json: cannot be read (") and text.endswith(").")
    assert message in text and "\n" not in text and len(text) < 500
    text.encode("utf-8")


def test_nested_json():
    with (
        pytest.raises(UserError, match=r"^data\.json: cannot be read \(nested too deeply\)\.$"),
        reading_of_experiments("data.json"),
    ):
        nested()


def test_own_words_stay():
    with pytest.raises(ValueError, match=r"^adapter\.json: r is 0\.$"), reading("adapter.json"):
        raise ValueError("adapter.json: r is 0.")
    with pytest.raises(UserError, match=r"^adapter\.json: r is 0\.$"), reading_of_experiments("adapter.json"):
        raise ValueError("adapter.json: r is 0.")
    with pytest.raises(UserError, match=r"^record 3 has no answer$"), reading_of_experiments("data.json"):
        raise UserError("record 3 has no answer")


@pytest.mark.parametrize("context", [reading, reading_of_experiments])
def test_a_long_value_loses_its_middle(context):
    with pytest.raises(ValueError) as error, context("adapter.json"):
        raise ValueError(f"adapter.json: bias is {'a' * 10_000!r}; expected 'none'.\nA second line.")
    text = str(error.value)
    assert text.startswith("adapter.json: bias is 'aaa") and text.endswith("aaa'; expected 'none'.\nA second line.")
    assert len(text) < 1100


@pytest.mark.parametrize("passing", [KeyboardInterrupt, SystemExit, Preempted, GeneratorExit])
def test_what_no_reader_raises(passing):
    with pytest.raises(passing), reading_of_experiments("data.json"):
        raise passing
