"""PyTorch's tensors as leaves: kinds of modules are inferred from names and shapes."""

import time

import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.commands import fitting, layout
from lora_jax.peft.tensors import Tensors
from tests.peft.cases import CASES, PREFIX, write_adapter


@pytest.fixture
def fit(tmp_path):
    """A function that writes a base and an adapter from shapes, and gives the kinds and the delta."""

    def make(base, factors, config=None, model_type=""):
        rng = np.random.default_rng(0)
        stored = {PREFIX + name: rng.normal(size=shape).astype(np.float32) for name, shape in factors.items()}
        write_adapter(tmp_path, stored, {"peft_type": "LORA", "r": 2, "target_modules": ["x"]} | (config or {}))
        save_file({name: np.zeros(shape, np.float32) for name, shape in base.items()}, tmp_path / "model.safetensors")
        with Tensors([tmp_path / "model.safetensors"]) as tensors:
            weights, names, _ = fitting.fit_checkpoint(tensors, tmp_path, {"model_type": model_type})
            delta = lora.peft.load(tmp_path, weights, names)
        return {row.name: row.module for row in names.weights if row.module}, delta

    return make


def pair(module, in_size, out_size, rank=2):
    return {f"{module}.lora_A.weight": (rank, in_size), f"{module}.lora_B.weight": (out_size, rank)}


FLAG = {"fan_in_fan_out": True}


@pytest.mark.parametrize(
    "shapes, config, model_type, expected",
    [
        ({"h.0.x": (4, 6)}, {}, "", "linear"),
        ({"h.0.x": (4, 4)}, {}, "", "linear"),
        ({"h.0.x": (4, 4)}, FLAG, "", "conv1d"),
        ({"h.0.x": (4, 4)}, {}, "gpt2", "conv1d"),
        ({"x": (4, 4)}, {}, "gpt2", "linear"),  # a head
    ],
)
def test_a_matrix(fit, shapes, config, model_type, expected):
    ((module, (out_size, in_size)),) = shapes.items()
    kinds, _ = fit({f"{module}.weight": (out_size, in_size)}, pair(module, in_size, out_size), config, model_type)
    assert kinds[f"{module}.weight"] == expected


def test_a_square_matrix_as_its_namesakes(fit):
    """GPT-2's c_proj, where a head of another kind decided what the config says."""
    base = {"h.0.attn.x.weight": (4, 4), "h.0.mlp.x.weight": (8, 4), "head.weight": (9, 4)}
    factors = pair("h.0.attn.x", 4, 4) | pair("h.0.mlp.x", 8, 4) | pair("head", 4, 9)
    kinds, _ = fit(base, factors)
    assert kinds == {"h.0.attn.x.weight": "conv1d", "h.0.mlp.x.weight": "conv1d", "head.weight": "linear"}


def test_an_ambiguous_square_matrix(fit):
    base = {"x.weight": (4, 4), "y.weight": (8, 4)}
    with pytest.raises(ValueError, match=r"'x\.weight' is square.*model_type"):
        fit(base, pair("x", 4, 4) | pair("y", 8, 4))


def experts(*shapes, rank=2):
    """Factors of some parameters of one module in its order, the first the innermost: `(experts, in, out)`."""
    tensors = {}
    for depth, (count, in_size, out_size) in enumerate(reversed(shapes)):
        at = ".".join(["m", *["base_layer"] * depth])
        tensors |= {f"{at}.lora_A.weight": (rank * count, in_size), f"{at}.lora_B.weight": (out_size, rank * count)}
    return tensors


TWO = {"target_modules": [], "target_parameters": ["m.down", "m.up"]}


@pytest.mark.parametrize("model_type", ["", "llama", "gpt_oss"])
def test_the_order_of_parameters_follows_from_shapes(fit, model_type):
    base = {"m.down": (3, 4, 5), "m.up": (3, 10, 4)}
    kinds, delta = fit(base, experts((3, 4, 10), (3, 5, 4)), TWO, model_type)
    assert list(kinds) == ["m.up", "m.down"] and set(kinds.values()) == {"experts"}
    assert delta["m/up"].shape() == (3, 10, 4) and delta["m/down"].shape() == (3, 4, 5)


@pytest.mark.parametrize("model_type, expected", [("llama", "experts"), ("gpt_oss", "transposed_experts")])
def test_square_experts_as_the_model_has_them(fit, model_type, expected):
    kinds, _ = fit({"m.down": (3, 4, 4)}, experts((3, 4, 4)), TWO | {"target_parameters": ["m.down"]}, model_type)
    assert kinds == {"m.down": expected}


def test_square_experts_as_their_neighbors(fit):
    base = {"m.down": (3, 4, 4), "m.up": (3, 4, 10)}
    kinds, _ = fit(base, experts((3, 4, 10), (3, 4, 4)), TWO)
    assert kinds == {"m.up": "transposed_experts", "m.down": "transposed_experts"}


@pytest.mark.parametrize(
    "base, said",
    [
        ({"m.down": (3, 4, 4), "m.up": (3, 4, 4)}, "more than one way"),
        ({"m.down": (3, 4, 7), "m.up": (3, 4, 4)}, "no order of these parameters"),
    ],
)
def test_parameters_that_are_refused(fit, base, said):
    with pytest.raises(ValueError, match=rf"m\.down \(3, 4, .*{said}"):
        fit(base, experts((3, 4, 4), (3, 4, 4)), TWO)


@pytest.mark.parametrize(
    "base, adapted", [("h.0.x", "bert.h.0.x"), ("bert.h.0.x", "h.0.x"), ("a.b.h.0.x", "h.0.x"), ("h.0.x", "h.0.x")]
)
def test_prefixes(fit, base, adapted):
    _, delta = fit({f"{base}.weight": (4, 6), "other.weight": (3,)}, pair(adapted, 6, 4))
    assert delta.keys() == {f"{base}.weight".replace(".", "/")}


def tied(change=0.0):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 9), (4, 2)))
    return {
        f"{PREFIX}embed_tokens.lora_embedding_A": a,
        f"{PREFIX}embed_tokens.lora_embedding_B": b,
        f"{PREFIX}lm_head.lora_A.weight": b.T.copy() + np.float32(change),
        f"{PREFIX}lm_head.lora_B.weight": a.T.copy(),
    }


def test_a_tied_head(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    save_file({"model.embed_tokens.weight": np.zeros((9, 4), np.float32)}, tmp_path / "model.safetensors")
    for change in (0.0, 1.0):
        stored = {key.replace("embed_tokens", "model.embed_tokens"): value for key, value in tied(change).items()}
        write_adapter(tmp_path, stored, config)
        with Tensors([tmp_path / "model.safetensors"]) as tensors:
            weights, names, untied = fitting.fit_checkpoint(tensors, tmp_path)
            delta = lora.peft.load(tmp_path, weights, names)
            assert delta.keys() == {"model/embed_tokens/weight"} | ({"lm_head/weight"} if change else set())
            assert list(untied) == (["lm_head.weight"] if change else [])


def test_biases_of_saved_modules_that_peft_repeats(fit):
    """With bias='all' and a saved head, PEFT also stores the wrapper's two biases."""
    factors = pair("x", 4, 6) | {
        "x.base_layer.bias": (6,),
        "head.weight": (3, 6),
        "head.bias": (3,),
        "head.modules_to_save.bias": (3,),
        "head.original_module.bias": (3,),
    }
    base = {"x.weight": (6, 4), "x.bias": (6,), "head.weight": (3, 6), "head.bias": (3,)}
    _, delta = fit(base, factors, {"bias": "all", "modules_to_save": ["head"]})
    assert delta.keys() == {"x/weight", "x/bias", "head/weight", "head/bias"}


@pytest.mark.parametrize(
    "fixture, expected",
    [
        ("embedding_saved", ["embed_tokens.weight"]),
        ("embedding_saved_untargeted", ["embed_tokens.weight", "lm_head.weight"]),
        ("modules_to_save", []),
        ("bias_all", []),
        ("llama", []),
    ],
)
def test_weights_that_are_stored_unasked(fixture, expected):
    assert sorted(layout.find_copies(CASES[fixture].adapter)) == expected


def test_attention_of_pytorch_without_a_base():
    _, names = layout.infer_base(CASES["multihead_attention"].adapter)
    assert {row.name for row in names.weights} == {"attn.in_proj_weight", "attn.out_proj.weight"}


def test_time_does_not_grow_with_the_square_of_the_names(fit):
    """4,000 names: a step a pair of names would take minutes."""
    base, factors = {}, {}
    for layer in range(2000):
        base |= {f"h.{layer}.x.weight": (3, 2), f"h.{layer}.x.bias": (3,)}
        factors |= pair(f"h.{layer}.x", 2, 3) | {f"h.{layer}.x.base_layer.bias": (3,)}
    start = time.monotonic()
    _, delta = fit(base, factors, {"bias": "lora_only"})
    assert len(delta) == 4000 and time.monotonic() - start < 30
    start = time.monotonic()
    with pytest.raises(ValueError, match="6000 problems"):
        fit({name.replace("x", "y"): shape for name, shape in base.items()}, factors)
    assert time.monotonic() - start < 30
