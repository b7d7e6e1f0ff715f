"""Adapters that were trained after the vocabulary was enlarged: they hold all rows of the embedding and the head."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.__main__ import main
from lora_jax.peft import LINEAR, Names, Weight

NAMES = Names(
    (
        Weight("token/embedding", "model.embed_tokens.weight", module="embedding"),
        Weight("up/kernel", "model.up.weight", LINEAR),
        Weight("output/kernel", "lm_head.weight", LINEAR),
    ),
    prefix="model.",
)
WIDTH, BEFORE, AFTER = 4, 6, 8


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


STORED = {
    "model.embed_tokens.weight": random(0, BEFORE, WIDTH),
    "model.up.weight": random(1, WIDTH, WIDTH),
    "lm_head.weight": random(2, BEFORE, WIDTH),
}
ADAPTER = {
    "base_model.model.model.embed_tokens.weight": random(3, AFTER, WIDTH),
    "base_model.model.lm_head.weight": random(4, AFTER, WIDTH),
    "base_model.model.model.up.lora_A.weight": random(5, 2, WIDTH),
    "base_model.model.model.up.lora_B.weight": random(6, WIDTH, 2),
}


@pytest.fixture
def adapter(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up"]}
    config |= {"modules_to_save": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM"}
    directory = tmp_path / "adapter"
    directory.mkdir()
    save_file(ADAPTER, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def base():
    return {
        "token": {"embedding": jnp.asarray(STORED["model.embed_tokens.weight"])},
        "up": {"kernel": jnp.asarray(STORED["model.up.weight"].T)},
        "output": {"kernel": jnp.asarray(STORED["lm_head.weight"].T)},
    }


def model(params, ids):
    x = params["token"]["embedding"][ids]
    return (x @ params["up"]["kernel"]) @ params["output"]["kernel"]


def test_it_is_merged_into_the_base(adapter):
    delta = lora.peft.load(adapter, base(), NAMES)
    merged = lora.merge(base(), delta)
    np.testing.assert_array_equal(merged["token"]["embedding"], ADAPTER["base_model.model.model.embed_tokens.weight"])
    np.testing.assert_array_equal(merged["output"]["kernel"], ADAPTER["base_model.model.lm_head.weight"].T)
    assert model(merged, jnp.array([[7]])).shape == (1, 1, AFTER)


def test_adapt_says_what_to_do(adapter):
    delta, params, ids = lora.peft.load(adapter, base(), NAMES), base(), jnp.array([[7]])
    expected = model(lora.merge(params, delta), ids)
    with pytest.raises(
        ValueError, match=r"\((8, 4|4, 8)\), an enlarged vocabulary; the base has \((6, 4|4, 6)\)"
    ) as raised:
        lora.adapt(model)(params, delta, ids)
    for path in ("token/embedding", "output/kernel"):
        line = f"base = lora.merge(base, {{{path!r}: delta.pop({path!r})}})"
        if path in str(raised.value):
            assert line in str(raised.value)
        params = lora.merge(params, {path: delta.pop(path)})
    np.testing.assert_allclose(lora.adapt(model)(params, delta, ids), expected, rtol=1e-5)


def test_the_command_line_writes_the_larger_checkpoint(adapter, tmp_path, capsys):
    directory = tmp_path / "model"
    directory.mkdir()
    save_file(STORED, directory / "model.safetensors")
    config = {"model_type": "llama", "vocab_size": BEFORE, "tie_word_embeddings": False}
    (directory / "config.json").write_text(json.dumps(config))
    assert main(["merge", str(directory), str(adapter), str(tmp_path / "merged")]) == 0, capsys.readouterr().err
    assert "enlarged: model.embed_tokens.weight to 8 rows" in capsys.readouterr().out
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config | {"vocab_size": AFTER}
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(merged["lm_head.weight"], ADAPTER["base_model.model.lm_head.weight"])
    np.testing.assert_array_equal(
        merged["model.embed_tokens.weight"], ADAPTER["base_model.model.model.embed_tokens.weight"]
    )
    update = ADAPTER["base_model.model.model.up.lora_B.weight"] @ ADAPTER["base_model.model.model.up.lora_A.weight"]
    np.testing.assert_allclose(merged["model.up.weight"], STORED["model.up.weight"] + 2 * update, atol=1e-6)


def test_a_smaller_table_is_refused(adapter):
    larger = base() | {"token": {"embedding": jnp.zeros((AFTER + 1, WIDTH))}}
    with pytest.raises(ValueError, match=r"embed_tokens\.weight \(8, 4\), expected \(9, 4\)"):
        lora.peft.load(adapter, larger, NAMES)
