"""The benchmark of quantized formats at a tiny size: its figures are errors, and its command prints them."""

import pytest

import lora_jax as lora
from experiments.benchmarks import formats


@pytest.fixture
def config(tiny_model, tiny_data):
    return formats.Config(
        model=str(tiny_model), data=str(tiny_data), sentences=5, lengths=(12,), blocks=(16,), repeats=1
    )


def test_command_prints_a_line_a_format_the_best_of_equal_bits_first(config, capsys, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", (lora.NF4, lora.Int4, lora.Int8))
    monkeypatch.setattr(formats, "ENCODED", (lora.Q4_1(),))
    monkeypatch.setattr(formats, "STORED", (lora.Q4_1(), lora.Q4_K()))
    assert formats.main(config) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = [line for line in printed if "block 16" in line]
    assert len(lines) == 2 * len(formats.FORMATS)
    rows = [[float(cell) for cell in line[26:].split()] for line in lines]
    four, eight = [row for row in rows if row[0] < 7], [row for row in rows if row[0] > 7]
    for bits, weights, normal, vectors in rows:
        assert 4 < bits < 11 and 0 < weights < 0.2 and 0 < normal < 0.2 and vectors > 0
    assert sum("block 32" in line for line in printed) == len(formats.ENCODED)
    times = {line.split()[0]: line.split()[-4:] for line in printed[-1 - len(formats.STORED) :]}
    assert times.pop("NF4,") == ["1.00"] * 4 and list(times) == [form.name for form in formats.STORED]
    assert all(0 < float(ratio) < 100 for ratios in times.values() for ratio in ratios)
    assert lines[0].startswith("NF4") and max(row[1] for row in eight) < 0.05 < min(row[1] for row in four)


def test_errors_are_one_sentence(config, capsys):
    assert formats.main(formats.Config(model="nowhere/at/all", data=config.data)) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(ValueError, match="positive even number"):
        formats.Config(blocks=(3,))
    assert (lora.NF4, lora.FP4, lora.Int4, lora.Int8) == formats.FORMATS
