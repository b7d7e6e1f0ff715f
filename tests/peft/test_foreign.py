"""LoRA files of kohya's scripts, diffusers and mlx-lm: their deltas, and the command line."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lora
from lora_jax.__main__ import main
from lora_jax.peft import CONV2D, LINEAR, Names, Weight

NAMES = Names(
    (
        Weight("attention/query/kernel", "down_blocks.0.attn1.to_q.weight", LINEAR),
        Weight("attention/output/kernel", "down_blocks.0.attn1.to_out.0.weight", LINEAR),
        Weight("conv/kernel", "conv_in.weight", CONV2D),
    )
)
QUERY, OUTPUT = "down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0"
RANK, ALPHA = 2, 3.0


def random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


BASE = {
    "attention": {"query": {"kernel": jnp.zeros((4, 6))}, "output": {"kernel": jnp.zeros((6, 4))}},
    "conv": {"kernel": jnp.zeros((3, 3, 2, 5))},
}
DOWN = {QUERY: random(0, RANK, 4), OUTPUT: random(1, RANK, 6)}
UP = {QUERY: random(2, 6, RANK), OUTPUT: random(3, 4, RANK)}
CONV = random(4, RANK, 2, 3, 3), random(5, 5, RANK, 1, 1)


def expected(scale, *, conv=False):
    """What the factors add, in the orientation of the base."""
    added = {name: scale * (UP[name] @ DOWN[name]).T for name in (QUERY, OUTPUT)}
    product = np.einsum("or,rihw->hwio", CONV[1][:, :, 0, 0], CONV[0]) if conv else np.zeros((3, 3, 2, 5))
    return added[QUERY], added[OUTPUT], scale * product


def check(delta, scale, *, conv=False):
    merged = lora.merge(BASE, delta)
    weights = merged["attention"]["query"]["kernel"], merged["attention"]["output"]["kernel"], merged["conv"]["kernel"]
    for one, other in zip(weights, expected(scale, conv=conv)):
        np.testing.assert_allclose(one, other, atol=1e-6)


def kohya(alpha=True):
    """As kohya's scripts write it."""
    flat = {name: "lora_unet_" + name.replace(".", "_") for name in (QUERY, OUTPUT)}
    tensors = {f"{flat[name]}.lora_down.weight": DOWN[name] for name in flat}
    tensors |= {f"{flat[name]}.lora_up.weight": UP[name] for name in flat}
    tensors |= {"lora_unet_conv_in.lora_down.weight": CONV[0], "lora_unet_conv_in.lora_up.weight": CONV[1]}
    modules = (*flat.values(), "lora_unet_conv_in")
    return tensors | ({f"{name}.alpha": np.array(ALPHA, np.float32) for name in modules} if alpha else {})


@pytest.mark.parametrize("alpha", [True, False])
def test_kohya(alpha, tmp_path):
    save_file(kohya(alpha), tmp_path / "style.safetensors")
    for path in (tmp_path / "style.safetensors", tmp_path):
        check(lora.peft.load(path, BASE, NAMES), ALPHA / RANK if alpha else 1.0, conv=True)


def test_kohya_with_another_component(tmp_path):
    other = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_{x}.weight": random(7, 2, 2) for x in ("down", "up")}
    save_file(kohya() | other, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"text_model_encoder_layers_0_mlp_fc1.*the base has no such weight"):
        lora.peft.load(tmp_path, BASE, NAMES)
    check(lora.peft.load(tmp_path, BASE, NAMES, ignore=("lora_te",)), ALPHA / RANK, conv=True)


@pytest.mark.parametrize("form", ["peft", "down and up", "processors"])
def test_diffusers(form, tmp_path):
    def key(name, which):
        if form == "peft":
            return f"unet.{name}.lora_{'A' if which == 'down' else 'B'}.weight"
        if form == "down and up":
            return f"unet.{name}.lora.{which}.weight"
        parent, to = name.removesuffix(".0").rsplit(".", 1)
        return f"unet.{parent}.processor.{to}_lora.{which}.weight"

    tensors = {key(name, "down"): DOWN[name] for name in DOWN} | {key(name, "up"): UP[name] for name in UP}
    metadata = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata if form == "peft" else None)
    check(lora.peft.load(tmp_path, BASE, NAMES), ALPHA / RANK if form == "peft" else 1.0)


def mlx(directory, scale=5.0):
    """As mlx-lm writes it."""
    tensors = {f"{name}.lora_a": DOWN[name].T for name in DOWN} | {f"{name}.lora_b": UP[name].T for name in UP}
    save_file({key: np.ascontiguousarray(x) for key, x in tensors.items()}, directory / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": RANK, "scale": scale, "dropout": 0.0}}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def test_mlx(tmp_path):
    mlx(tmp_path)
    delta = lora.peft.load(tmp_path, BASE, NAMES)
    check(delta, 5.0)
    lora.peft.save(tmp_path / "again", delta, NAMES, target="mlx")
    again = lora.peft.load(tmp_path / "again", BASE, NAMES)
    jax.tree.map(np.testing.assert_array_equal, again, delta)


@pytest.mark.parametrize("scale", [None, 0, "20", True])
def test_mlx_without_a_scale(scale, tmp_path):
    mlx(tmp_path, scale)
    with pytest.raises(ValueError, match=r"lora_parameters\.scale is"):
        lora.peft.load(tmp_path, BASE, NAMES)


def test_other_files_are_named(tmp_path):
    save_file({"layer.weight": random(0, 2, 2)}, tmp_path / "some.safetensors")
    with pytest.raises(ValueError, match=r"some\.safetensors: not a LoRA of kohya's scripts or diffusers"):
        lora.peft.load(tmp_path, BASE, NAMES)


def test_the_command_line_takes_them(tmp_path, capsys):
    for name in ("kohya", "mlx", "model"):
        (tmp_path / name).mkdir()
    mlx(tmp_path / "mlx")
    save_file(kohya(), tmp_path / "kohya" / "style.safetensors")
    weights = {f"{QUERY}.weight": random(8, 6, 4), f"{OUTPUT}.weight": random(9, 4, 6)}
    weights |= {"conv_in.weight": random(10, 5, 2, 3, 3)}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    for adapter in (tmp_path / "kohya" / "style.safetensors", tmp_path / "kohya", tmp_path / "mlx"):
        assert main(["inspect", str(adapter)]) == 0, capsys.readouterr().err
        assert "rank 2" in capsys.readouterr().out
        out = tmp_path / f"merged-{adapter.name}"
        assert main(["merge", str(tmp_path / "model"), str(adapter), str(out)]) == 0, capsys.readouterr().err
        scale = 5.0 if adapter.name == "mlx" else ALPHA / RANK
        with lora.peft.Tensors([out / "model.safetensors"]) as merged:
            added = merged.read(f"{QUERY}.weight") - weights[f"{QUERY}.weight"]
        np.testing.assert_allclose(added.T, expected(scale)[0], atol=1e-5)
    assert main(["convert", str(tmp_path / "mlx"), str(tmp_path / "peft"), "--target", "peft"]) == 0
    check(lora.peft.load(tmp_path / "peft", BASE, NAMES), 5.0)
