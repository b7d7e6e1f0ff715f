"""The tiny encoders that transformers made, and the checks that every one of them passes."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

import lora_jax as lora
from experiments.models import checkpoint, heads, vit
from experiments.models.options import DEFAULT, Options

MODELS = Path(__file__).parent / "fixtures" / "models"
FORMS = {
    "scanned": Options(scan=True),
    "scanned, full remat": Options(scan=True, remat="full"),
    "unrolled, remat of all but products": Options(remat="dots"),
}


@functools.cache
def fixture(name):
    """The stored inputs in our layout, and what transformers gives for them."""
    with np.load(MODELS / name / "expected.npz") as stored:
        arrays = dict(stored)
    if name == "vit":
        inputs, real = (arrays["pixel_values"].transpose(0, 2, 3, 1),), np.ones(arrays["hidden"].shape[:2], bool)
    else:
        arrays.setdefault("token_type_ids", np.zeros_like(arrays["input_ids"]))  # DistilBERT has no segments
        inputs = tuple(arrays[key].astype(np.int32) for key in ("input_ids", "attention_mask", "token_type_ids"))
        real = inputs[1] == 1  # what stands at padding means nothing
    return SimpleNamespace(inputs=tuple(map(jnp.asarray, inputs)), real=real, **arrays)


def load(name, options=DEFAULT, **keywords):
    return (vit if name == "vit" else heads).load(MODELS / name, options, **keywords)


def names(model):
    return vit.NAMES if isinstance(model, vit.VitClassifier) else heads.names(model.encoder.config)


@functools.cache
def results(name, options=DEFAULT):
    """Logits, last hidden states and the gradients of all weights in the unrolled form, from one compiled function."""
    model, inputs = load(name, options), fixture(name).inputs
    apply_fn, base = lora.nnx.functional(model)
    hidden_fn, _ = lora.nnx.functional(model if name == "vit" else model.encoder)

    def loss(base):
        logits = apply_fn(base, *inputs)
        return jnp.sum(logits**2), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(base)
    hidden = None if name == "vit" else jax.jit(hidden_fn)(base["encoder"], *inputs)
    flat = {"/".join(str(key.key) for key in path): x for path, x in jax.tree_util.tree_leaves_with_path(gradients)}
    if options.scan:
        stacked = {path: x for path, x in flat.items() if "/layers/" in path}
        unrolled = {
            path.replace("/layers/", f"/layers/{layer}/"): x[layer] for path, x in stacked.items() for layer in (0, 1)
        }
        flat = {path: x for path, x in flat.items() if path not in stacked} | unrolled
    return SimpleNamespace(logits=logits, hidden=hidden, gradients=flat)


def check_parity(name):
    expected, actual = fixture(name), results(name)
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-5)
    if actual.hidden is not None:
        np.testing.assert_allclose(actual.hidden[expected.real], expected.hidden[expected.real], atol=1e-5)


def check_form(name, form):
    actual, usual = results(name, FORMS[form]), results(name)
    np.testing.assert_allclose(actual.logits, usual.logits, atol=1e-5)
    assert actual.gradients.keys() == usual.gradients.keys()
    for path, gradient in actual.gradients.items():
        np.testing.assert_allclose(gradient, usual.gradients[path], atol=1e-4, err_msg=path)


def check_bfloat16(name):
    """Forwards and backwards."""
    actual = results(name, Options(scan=True, dtype=jnp.bfloat16))
    assert actual.logits.dtype == jnp.float32
    np.testing.assert_allclose(actual.logits, fixture(name).logits, atol=0.1)
    for path, gradient in actual.gradients.items():
        usual = results(name).gradients[path]
        assert gradient.dtype == jnp.float32
        assert np.abs(gradient - usual).max() <= 0.1 * np.abs(usual).max() + 0.05, path


def check_round_trip(name, options, directory):
    model = load(name, options, dtype=None)
    _, base = lora.nnx.functional(model)
    config = checkpoint.read_config(MODELS / name)
    checkpoint.save(directory / name, base, names(model), config)
    assert checkpoint.read_config(directory / name) == config
    stored, written = tensors(MODELS / name), tensors(directory / name)
    assert stored.keys() == written.keys()
    for tensor, values in stored.items():
        assert values.dtype == written[tensor].dtype and values.tobytes() == written[tensor].tobytes(), tensor


def check_adapters(name, options):
    """Every product with a kernel is factored, and merging changes nothing but rounding."""
    apply_fn, base = lora.nnx.functional(load(name, options))
    inputs, spec = fixture(name).inputs, {"kernel$": lora.LoRA(rank=1, alpha=2)}
    delta = lora.init(jax.random.key(0), base, spec, apply_fn, *inputs)
    delta = jax.tree.map(lambda x: x + 0.05 if x.ndim > 1 else x, delta)
    explanation = str(lora.explain(apply_fn, base, delta, *inputs))
    assert "merged" not in explanation, explanation
    logits = jax.jit(lora.adapt(apply_fn))(base, delta, *inputs)
    assert np.abs(logits - fixture(name).logits).max() > 0.01
    np.testing.assert_allclose(jax.jit(apply_fn)(lora.merge(base, delta), *inputs), logits, atol=1e-5)


def tensors(directory):
    return {name: x for file in sorted(directory.glob("*.safetensors")) for name, x in load_file(file).items()}
