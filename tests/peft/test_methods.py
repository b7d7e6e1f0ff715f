"""PEFT's methods other than LoRA: equal outputs, and the same tensors when saved again."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.__main__ import main
from lora_jax.peft import LINEAR, Names, Weight, methods
from lora_jax.peft.config import METHODS

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft_methods"
NEWER = ["oft", "oft_neumann", "miss", "hira"]
WRITTEN = ["adalora", "vera", "loha", "loha_uneven", "lokr", "lokr_full", "ia3", "tokens", "norms", *NEWER]
READ = [*WRITTEN, "lokr_both"]
LAYER, HF = "blocks/{layer}", "blocks.{layer}"
NAMES = Names(
    (
        Weight("embed/embedding", "embed.weight", module="embedding"),
        Weight(f"{LAYER}/norm/scale", f"{HF}.norm.weight"),
        Weight(f"{LAYER}/norm/bias", f"{HF}.norm.bias"),
        Weight(f"{LAYER}/up/kernel", f"{HF}.up.weight", LINEAR),
        Weight(f"{LAYER}/up/bias", f"{HF}.up.bias"),
        Weight(f"{LAYER}/down/kernel", f"{HF}.down.weight", LINEAR),
        Weight(f"{LAYER}/down/bias", f"{HF}.down.bias"),
        Weight("head/kernel", "head.weight", LINEAR),
        Weight("head/bias", "head.bias"),
    )
)


def model(params, ids):
    """With layers that are stacked, or numbered."""
    x = params["embed"]["embedding"][ids]

    def block(x, layer):
        centered = x - x.mean(-1, keepdims=True)
        normal = centered * jax.lax.rsqrt((centered**2).mean(-1, keepdims=True) + 1e-5)
        h = normal * layer["norm"]["scale"][None, None] + layer["norm"]["bias"][None, None]
        h = jnp.tanh(h @ layer["up"]["kernel"] + layer["up"]["bias"][None, None])
        return x + h @ layer["down"]["kernel"] + layer["down"]["bias"][None, None], None

    if "0" in params["blocks"]:
        for number in ("0", "1"):
            x, _ = block(x, params["blocks"][number])
    else:
        x, _ = jax.lax.scan(block, x, params["blocks"])
    return x @ params["head"]["kernel"] + params["head"]["bias"][None, None]


@pytest.fixture(scope="module")
def stored():
    with np.load(FIXTURES / "base.npz") as file:
        return dict(file)


def base_of(stored, stacked):
    def linear(name):
        return {"kernel": jnp.asarray(stored[f"{name}.weight"].T), "bias": jnp.asarray(stored[f"{name}.bias"])}

    blocks = {
        str(i): {
            "norm": {"scale": stored[f"blocks.{i}.norm.weight"], "bias": stored[f"blocks.{i}.norm.bias"]},
            "up": linear(f"blocks.{i}.up"),
            "down": linear(f"blocks.{i}.down"),
        }
        for i in (0, 1)
    }
    if stacked:
        blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks.values())
    return jax.tree.map(
        jnp.asarray, {"embed": {"embedding": stored["embed.weight"]}, "blocks": blocks, "head": linear("head")}
    )


def tensors(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
def test_outputs_are_those_of_peft(name, stacked, stored):
    base = base_of(stored, stacked)
    delta = lora.peft.load(FIXTURES / name, base, NAMES)
    expected = np.load(FIXTURES / name / "expected.npz")["y"]
    assert np.abs(expected - stored["y"]).max() > 0.05
    adapted = jax.jit(lora.adapt(model))(base, delta, stored["ids"])
    np.testing.assert_allclose(adapted, expected, atol=1e-5)
    np.testing.assert_allclose(model(lora.merge(base, delta), stored["ids"]), expected, atol=1e-5)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("stacked", [False, True], ids=["numbered", "stacked"])
def test_written_back_it_is_the_same_adapter(name, stacked, stored, tmp_path):
    base = base_of(stored, stacked)
    delta = lora.peft.load(FIXTURES / name, base, NAMES)
    lora.peft.save(tmp_path / "out", delta, NAMES, base=base)
    before, after = tensors(FIXTURES / name), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    again = lora.peft.load(tmp_path / "out", base, NAMES)
    expected = np.load(FIXTURES / name / "expected.npz")["y"]
    np.testing.assert_allclose(jax.jit(lora.adapt(model))(base, again, stored["ids"]), expected, atol=1e-5)
    kinds = [
        json.loads((at / "adapter_config.json").read_text())["peft_type"] for at in (FIXTURES / name, tmp_path / "out")
    ]
    assert kinds[0] == kinds[1]
    if name not in ("adalora", "loha_uneven"):  # whose scales, or stacked ranks, are written another way
        for key, value in before.items():
            np.testing.assert_array_equal(value, after[key])


def test_modules_of_one_size_share_veras_pair(stored):
    delta = lora.peft.load(FIXTURES / "vera", base_of(stored, False), NAMES)
    assert delta["blocks/0/up/kernel"].a is delta["blocks/1/up/kernel"].a


def test_vera_without_its_pair_is_refused(stored):
    with pytest.raises(ValueError, match=r"missing: base_model\.vera_A .*save_projection=True"):
        lora.peft.load(FIXTURES / "vera_without_projection", base_of(stored, False), NAMES)


def test_vera_whose_pairs_are_not_one_is_written_as_lora(stored, tmp_path):
    base = base_of(stored, False)
    delta = lora.init(jax.random.key(0), base, {"(up|down)/kernel": lora.VeRA(4)}, model, stored["ids"])
    lora.peft.save(tmp_path, delta, NAMES)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_gains_of_a_bias_are_those_of_its_weight(stored, tmp_path):
    base = base_of(stored, False)
    spec = {"0/up/kernel": lora.IA3()}
    delta = lora.init(jax.random.key(0), base, spec, model, stored["ids"])
    delta = jax.tree.map(lambda x: 2 * x, delta)
    with pytest.raises(ValueError, match="PEFT multiplies the bias too; adapt 'blocks/0/up/bias'"):
        lora.peft.save(tmp_path, delta, NAMES, base=base)
    with pytest.raises(ValueError, match="give base="):
        lora.peft.save(tmp_path, delta, NAMES)
    both = lora.init(jax.random.key(0), base, spec | {"0/up/bias": lora.IA3(axes=("out",))}, model, stored["ids"])
    both = jax.tree.map(lambda x: 2 * x, both)
    lora.peft.save(tmp_path, both, NAMES, base=base)
    assert lora.peft.load(tmp_path, base, NAMES).keys() == both.keys()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "loha",
            {"base_model.model.blocks.0.up.hada_w1_a": None},
            r"missing: .*blocks\.0\.up\.hada_w1_a",
        ),
        ("loha", {"base_model.model.blocks.0.up.hada_t1": np.ones((2, 2), np.float32)}, "hada_t1"),
        ("lokr", {"base_model.model.blocks.0.up.lokr_w1": np.ones((3, 3), np.float32)}, r"lokr_w1 .*divides no weight"),
        ("ia3", {"base_model.model.blocks.0.up.ia3_l": np.ones((5, 1), np.float32)}, r"ia3_l .*expected \(8, 1\)"),
        ("adalora", {"base_model.model.blocks.7.up.lora_A": np.ones((3, 6), np.float32)}, r"the base has no blocks\.7"),
        ("vera", {"base_model.model.blocks.1.up.vera_lambda_d": np.full(4, np.nan, np.float32)}, "not finite"),
    ],
)
def test_what_does_not_fit_is_named(name, change, message, stored, tmp_path):
    shutil.copytree(FIXTURES / name, tmp_path / "edited")
    edited = {key: value for key, value in (tensors(FIXTURES / name) | change).items() if value is not None}
    save_file(edited, tmp_path / "edited" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        lora.peft.load(tmp_path / "edited", base_of(stored, False), NAMES)


@pytest.mark.parametrize("field", ["alpha", "r"])
@pytest.mark.parametrize("value", [0, "four", float("nan"), True])
def test_numbers_of_the_config_are_checked(field, value, stored, tmp_path):
    shutil.copytree(FIXTURES / "loha", tmp_path / "edited")
    config = json.loads((FIXTURES / "loha" / "adapter_config.json").read_text()) | {field: value}
    (tmp_path / "edited" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{field} is"):
        lora.peft.load(tmp_path / "edited", base_of(stored, False), NAMES)


@pytest.mark.parametrize("name", WRITTEN)
def test_the_command_line_merges_and_inspects_them(name, stored, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    weights = {key: value for key, value in stored.items() if key not in ("ids", "y", "versions")}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    merge = ["merge", str(tmp_path / "model"), str(FIXTURES / name), str(tmp_path / "merged")]
    assert main(merge) == 0, capsys.readouterr().err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = np.load(FIXTURES / name / "expected.npz")["y"]
    np.testing.assert_allclose(model(base_of(merged, False), stored["ids"]), expected, atol=1e-5)
    assert main(["inspect", str(FIXTURES / name), "--base", str(tmp_path / "model")]) == 0, capsys.readouterr().err
    has_shapes = name == "tokens"  # whose shapes the file has
    assert main(["inspect", str(FIXTURES / name)]) == (0 if has_shapes else 2)
    assert has_shapes or "give --base" in capsys.readouterr().err


@pytest.mark.parametrize("name", READ)
def test_converted_on_the_command_line(name, stored, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    weights = {key: value for key, value in stored.items() if key not in ("ids", "y", "versions")}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    args = ["convert", str(FIXTURES / name), str(tmp_path / "out"), "--target", "peft"]
    assert main([*args, "--base", str(tmp_path / "model")]) == 0, capsys.readouterr().err
    before, after = (
        json.loads((path / "adapter_config.json").read_text()) for path in (FIXTURES / name, tmp_path / "out")
    )
    assert after["peft_type"] == before["peft_type"] and after["task_type"] == before["task_type"]
    assert main(["merge", str(tmp_path / "model"), str(tmp_path / "out"), str(tmp_path / "merged")]) == 0
    expected = np.load(FIXTURES / name / "expected.npz")["y"]
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(model(base_of(merged, False), stored["ids"]), expected, atol=1e-5)
    if name != "tokens":  # whose shapes the file has
        capsys.readouterr()
        assert main([*args, "--force"]) == 2 and "give --base" in capsys.readouterr().err
        assert main(["diff", args[1], args[1]]) == 2
        error = capsys.readouterr().err
        assert "diff compares" in error and "--base" not in error


def test_the_error_of_an_unsupported_method_lists_the_supported_ones(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "XLORA"}')
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "'XLORA'" in error and all(repr(kind) in error for kind in METHODS)
    assert set(METHODS) == {"LORA", "TRAINABLE_TOKENS", *methods.METHODS, methods.NORM_TUNING}


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_the_error_of_virtual_tokens_says_what_reads_them(kind, tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(ValueError, match=rf"peft_type is '{kind}', virtual tokens instead of weights; ") as error:
        lora.peft.load(tmp_path, {"w": jnp.ones((2, 2))}, lora.peft.Names((lora.peft.Weight("w", "w.weight"),)))
    assert ("peft_virtual_tokens.load" in str(error.value)) == (kind != "P_TUNING")
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(error.value).rstrip(".") in capsys.readouterr().err.replace("\n", " ")


def test_a_method_on_modules_that_it_does_not_adapt(tmp_path):
    names = lora.peft.Names((lora.peft.Weight("table", "embed.weight", module="embedding"),))
    delta = lora.init(jax.random.key(0), {"table": jnp.ones((6, 4))}, {"table": lora.LoHa(2, axes=("in", "out"))})
    with pytest.raises(
        ValueError, match=r"PEFT's LOHA \(1 problem\):\n  unsupported: LoHa on a module of the kind 'embedding'"
    ):
        lora.peft.save(tmp_path / "out", delta, names)
    assert not (tmp_path / "out").exists()
