"""config.json: whatever it holds is a shape or one sentence."""

import pytest

from experiments.errors import UserError
from experiments.models import families

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 64, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_shapes(config):
    assert families.get_family(config).shape(config)


@pytest.mark.parametrize(
    "config, field, value, message",
    [
        (GPT2, "n_layer", 2**31, "n_layer is 2147483648, expected a whole number from 1 to"),
        (GPT2, "n_inner", -1, "n_inner is -1, expected a whole number from 0 to"),
        (LLAMA, "vocab_size", 0, "vocab_size is 0, expected a whole number from 1 to"),
        (GPT2, "n_layer", 2**31 - 1, "n_layer is 2,147,483,647, expected at most 10,000"),
        (GPT2, "n_embd", -1, "n_embd is -1, expected a whole number"),
        (GPT2, "n_embd", 10**400, "expected a whole number"),
        (GPT2, "n_head", True, "n_head is True"),
        (GPT2, "n_layer", "x" * 10_000, r"n_layer is 'xxx.*\.\.\..*', expected"),
        (LLAMA, "num_hidden_layers", 2**31 - 1, "expected at most 10,000"),
        (LLAMA, "rms_norm_eps", float("nan"), "rms_norm_eps is nan, expected a number"),
        (LLAMA, "rms_norm_eps", 10**400, "expected a number"),
        (LLAMA, "rope_scaling", 3, "config.json"),
        (LLAMA, "rope_scaling", {"rope_type": []}, "config.json"),
        (LLAMA, "num_attention_heads", 0, "config.json"),
        (LLAMA, "model_type", [], "model_type"),
        (LLAMA, "layer_types", 5, "config.json"),
    ],
)
def test_fields_of_other_types(config, field, value, message):
    changed = config | {field: value}
    with pytest.raises(UserError, match=message) as error:
        families.get_family(changed).shape(changed)
    assert len(str(error.value)) < 500


def test_fields_that_do_not_matter():
    for value in (True, [], {"a": 1}, None):
        assert families.get_family(LLAMA | {"architectures": value}).shape(LLAMA | {"architectures": value})
