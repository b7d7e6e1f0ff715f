"""The ViT classifier: parity with transformers, forms of the encoder, sizes of images."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.errors import UserError
from experiments.models import checkpoint, vit
from experiments.models.options import DEFAULT, Options
from tests.experiments import encoders


def test_logits_agree_with_transformers():
    encoders.check_parity("vit")


def test_hidden_states_agree_with_transformers():
    hidden = nnx.jit(lambda model, images: model.hidden(images))(encoders.load("vit"), *encoders.fixture("vit").inputs)
    np.testing.assert_allclose(hidden, encoders.fixture("vit").hidden, atol=1e-5)


@pytest.mark.parametrize("form", encoders.FORMS)
def test_every_form_computes_the_same(form):
    encoders.check_form("vit", form)


def test_bfloat16():
    encoders.check_bfloat16("vit")


@pytest.mark.parametrize("options", [DEFAULT, Options(scan=True)], ids=["unrolled", "scanned"])
def test_round_trip_is_exact(options, tmp_path):
    encoders.check_round_trip("vit", options, tmp_path)


@pytest.mark.parametrize("options", [DEFAULT, Options(scan=True)], ids=["unrolled", "scanned"])
def test_adapters_are_factored(options):
    encoders.check_adapters("vit", options)


def test_a_new_head():
    new = encoders.load("vit", classes=3)
    assert new.classifier.kernel.shape == (16, 3)
    np.testing.assert_array_equal(new.embeddings.image[...], encoders.load("vit").embeddings.image[...])


@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 12, 3), (3, 16, 16)])
def test_other_sizes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(height, width, channels\) = \(16, 16, 3\)"):
        encoders.load("vit")(jnp.zeros((1, *shape)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deit"}, "model_type is 'deit', supported is 'vit'"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"image_size": [16, 20]}, r"image_size is \[16, 20\], expected a whole number"),
        ({"patch_size": 5}, "image_size 16 is not a multiple of patch_size 5"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"qkv_bias": 1}, "qkv_bias is 1, expected true or false"),
    ],
)
def test_other_architectures_are_refused(change, message):
    config = checkpoint.read_config(encoders.MODELS / "vit") | change
    with pytest.raises(UserError, match=message):
        vit.VitConfig.from_json(config)
