"""SmolLM2-135M-Instruct, which an installed package carries as a GGUF file."""

import pytest

from experiments.input.template_files import load_template
from experiments.models import checkpoint, location
from experiments.studies.decoder.encoding import read_end_tokens
from experiments.tasks.text import load_tokenizer


@pytest.fixture(scope="module")
def model():
    return location.find(location.SMOLLM2)


def test_its_config_is_that_of_the_published_checkpoint(model):
    published = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "hidden_act": "silu",
        "architectures": ["LlamaForCausalLM"],
    }
    assert checkpoint.read_config(model).items() >= published.items()
    assert read_end_tokens(model) == (2,)


def test_its_tokenizer_and_template(model):
    tokenizer, template = load_tokenizer(model), load_template(model)
    ids = tokenizer.encode("<|im_start|>user\nIt's 2024.<|im_end|>").ids
    assert [tokenizer.id_to_token(number) for number in ids[-6:]] == ["2", "0", "2", "4", ".", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nIt's 2024.<|im_end|>"
    assert template is not None and "<|im_start|>assistant" in template.source
