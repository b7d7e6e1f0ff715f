"""The benchmark of loops over a quantized base at a tiny size: codes stay codes outside of a loop's steps."""

from experiments.benchmarks import loops


def test_command_prints_a_line_a_program_and_nf4_needs_least(capsys, monkeypatch, lenient):
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    monkeypatch.setattr(loops, "SHAPE", loops.SHAPE | shape | {"num_key_value_heads": 2})
    config = loops.Config(layers=4, prompt=2, new_tokens=3, tokens=4, accumulate=2, rounds=1)
    assert loops.main(config) == 0
    lines = capsys.readouterr().out.splitlines()[-6:]
    rows = {line[:28].strip(): [float(cell) for cell in line[28:].split()] for line in lines}
    for task in ("decode", "train"):
        arguments, temporaries, median, least = rows[f"{task}, NF4"]
        floats = rows[f"{task}, float"][0] - arguments
        assert floats > 0 and 0 < least <= median
        # Dequantized before the loop all layers are there at once; within it, one weight at a time.
        assert rows[f"{task}, dequantized before"][1] - temporaries > 0.5 * floats
