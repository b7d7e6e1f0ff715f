"""DeBERTa-v2 and v3: parity with transformers, forms of the encoder, relative positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from experiments.errors import UserError
from experiments.models import checkpoint, deberta
from experiments.models.options import DEFAULT, Options
from tests.experiments import encoders

both = pytest.mark.parametrize("name", ["deberta_v2", "deberta_v3"])


@both
def test_logits_agree_with_transformers(name):
    encoders.check_parity(name)


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


def test_the_convolution_of_the_large_models_agrees_with_transformers(tmp_path):
    encoders.check_parity("deberta_conv")
    encoders.check_round_trip("deberta_conv", DEFAULT, tmp_path)
    encoders.check_adapters("deberta_conv", DEFAULT)
    with pytest.raises(UserError, match=r"needs unrolled layers, Options\(scan=False\)"):
        encoders.load("deberta_conv", Options(scan=True))


def test_positions_that_are_not_added_to_words_may_be_stored(tmp_path):
    # the released v3 checkpoints hold them
    (tmp_path / "config.json").write_bytes((encoders.MODELS / "deberta_v3" / "config.json").read_bytes())
    extra = {"deberta.embeddings.position_embeddings.weight": np.zeros((24, 16), np.float32)}
    save_file(encoders.tensors(encoders.MODELS / "deberta_v3") | extra, tmp_path / "model.safetensors")
    model, usual = (deberta.load(directory) for directory in (tmp_path, encoders.MODELS / "deberta_v3"))
    np.testing.assert_array_equal(model.embeddings.word.embedding[...], usual.embeddings.word.embedding[...])


def test_buckets_of_the_released_models_agree_with_transformers():
    """256 buckets up to a distance of 512: where the logarithm falls on a bucket's edge, rounding decides."""
    config = config_of("deberta_v3", position_buckets=256, max_position_embeddings=512)
    rows = deberta.relative_rows(512, config)
    expected = encoders.fixture("deberta_v3").released_buckets
    np.testing.assert_array_equal(rows[:, 0], np.clip(expected + 256, 0, 511))
    np.testing.assert_array_equal(rows[0], np.clip(256 - expected, 0, 511))
    np.testing.assert_array_equal(np.diagonal(rows, -3), np.full(509, 259))


def test_without_buckets_every_distance_has_a_row():
    rows = deberta.relative_rows(4, config_of("deberta_v2", max_relative_positions=2))
    assert rows.tolist() == [[2, 1, 0, 0], [3, 2, 1, 0], [3, 3, 2, 1], [3, 3, 3, 2]]


def test_too_many_tokens():
    model = deberta.load(encoders.MODELS / "deberta_v2")
    with pytest.raises(ValueError, match="25 tokens, 24 positions"):
        model(jnp.ones((1, 25), jnp.int32), jnp.ones((1, 25), bool))


def test_relative_positions_alone_have_no_limit():
    model = deberta.load(encoders.MODELS / "deberta_v3")
    assert model(jnp.ones((1, 25), jnp.int32), jnp.ones((1, 25), bool)).shape == (1, 25, 16)


def test_other_attention_kernels_are_refused():
    with pytest.raises(UserError, match="attention is 'cudnn', DeBERTa's disentangled attention supports 'xla' only"):
        encoders.load("deberta_v3", Options(attention="cudnn"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deberta"}, "model_type is 'deberta', supported is 'deberta-v2'"),
        ({"conv_kernel_size": 4}, "conv_kernel_size is 4, supported is 0 or 3"),
        ({"conv_groups": 2}, "conv_groups is 2, supported is 1"),
        ({"conv_act": "relu"}, "conv_act is 'relu', supported is 'tanh' or 'gelu'"),
        ({"relative_attention": False}, "relative_attention is false"),
        ({"pos_att_type": ["p2p"]}, "pos_att_type has 'p2p'"),
        ({"norm_rel_ebd": "batch"}, "norm_rel_ebd is 'batch'"),
        ({"embedding_size": 8}, "embedding_size is 8, supported is 16"),
        ({"attention_head_size": 8}, "attention_head_size is 8, supported is 4"),
        ({"position_buckets": 1}, "position_buckets is 1"),
        ({"hidden_size": 18, "pooler_hidden_size": 18}, "not a multiple"),
    ],
)
def test_other_architectures_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        config_of("deberta_v3", **change)


@pytest.mark.parametrize("written", ["c2p|p2c", ["c2p", "p2c"]])
def test_both_spellings_of_the_kinds_of_attention(written):
    assert config_of("deberta_v3", pos_att_type=written).pos_att_type == ("c2p", "p2c")


def config_of(name, **change):
    return deberta.DebertaConfig.from_json(checkpoint.read_config(encoders.MODELS / name) | change)
