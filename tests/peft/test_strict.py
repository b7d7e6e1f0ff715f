"""Loading uses every tensor and requires every tensor, or lists all problems in one error."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lora_jax as lora
from tests.peft.cases import CASES, PREFIX, read, read_config, write_adapter
from tests.peft.meaning import targeted


@pytest.fixture
def edited(tmp_path):
    """A function that loads a fixture's adapter after changes to its files, and gives the message of the error."""

    def edit(name, tensors=None, config=None, *, base=None, names=None):
        case, directory = CASES[name], tmp_path / "adapter"
        directory.mkdir()
        stored = read(case.adapter / "adapter_model.safetensors")
        for key, value in (tensors or {}).items():
            if value is None:
                del stored[PREFIX + key]
            else:
                stored[PREFIX + key] = value(stored[PREFIX + key]) if callable(value) else value
        write_adapter(directory, stored, read_config(case.adapter) | (config or {}))
        return lora.peft.load(directory, case.base if base is None else base, names or case.names)

    return edit


def message(edited, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        edited(*args, **kwargs)
    return str(caught.value)


A, B = np.ones((3, 8), np.float32), np.ones((12, 3), np.float32)


# Tensors.


def test_a_tensor_that_nothing_uses(edited):
    assert f"{PREFIX}fc.lora_C.weight" in message(edited, "linear", {"fc.lora_C.weight": A})


def test_an_unknown_module_with_the_nearest_names(edited):
    text = message(edited, "llama", {"model.layers.0.self_attn.q_porj.lora_A.weight": np.ones((2, 8), np.float32)})
    assert "q_porj" in text and "model.layers.0.self_attn.q_proj" in text


def test_a_tensor_under_two_names(edited):
    assert "lora_A" in message(edited, "linear", {"fc.base_layer.lora_A.weight": A})


def test_a_missing_tensor(edited):
    assert "fc.lora_B.weight" in message(edited, "linear", {"fc.lora_B.weight": None})


def test_a_missing_module(edited):
    text = message(edited, "stacked", {"layers.1.up.lora_A.weight": None, "layers.1.up.lora_B.weight": None})
    assert "layers.1.up" in text


@pytest.mark.parametrize("factor, shape", [("A", (3, 9)), ("B", (11, 3)), ("B", (3, 12)), ("A", (3,))])
def test_a_misshapen_tensor_with_both_shapes(edited, factor, shape):
    text = message(edited, "linear", {f"fc.lora_{factor}.weight": np.ones(shape, np.float32)})
    assert f"fc.lora_{factor}.weight" in text and str(shape) in text
    assert str({"A": (3, 8), "B": (12, 3)}[factor]) in text


def test_the_other_orientation_of_a_square_is_refused_where_shapes_tell(edited):
    text = message(edited, "linear_no_bias", {"fc.lora_A.weight": np.ones((12, 4), np.float32)})
    assert "(12, 4)" in text and "(4, 12)" in text


def test_one_error_lists_everything(edited):
    text = message(
        edited,
        "llama",
        {
            "model.layers.0.mlp.up_proj.lora_A.weight": None,
            "model.layers.1.mlp.up_proj.lora_B.weight": np.ones((3, 2), np.float32),
            "model.layers.2.mlp.up_proj.lora_A.weight": np.ones((2, 8), np.float32),
            "model.layers.0.mlp.down_proj.lora_C.weight": np.ones((2, 8), np.float32),
        },
    )
    for wrong in (
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.1.mlp.up_proj.lora_B.weight",
        "model.layers.2.mlp.up_proj",
        "model.layers.0.mlp.down_proj.lora_C.weight",
    ):
        assert wrong in text


def test_names_without_the_prefix_of_peft(tmp_path):
    case = CASES["linear"]
    stored = read(case.adapter / "adapter_model.safetensors")
    write_adapter(
        tmp_path, {key.removeprefix(PREFIX): value for key, value in stored.items()}, read_config(case.adapter)
    )
    with pytest.raises(ValueError, match=r"fc\.lora_A\.weight"):
        lora.peft.load(tmp_path, case.base, case.names)


@pytest.mark.parametrize("dtype", [np.int32, np.int8])
def test_integers_are_no_factors(edited, dtype):
    text = message(edited, "linear", {"fc.lora_A.weight": A.astype(dtype)})
    assert "fc.lora_A.weight" in text


@pytest.mark.parametrize("shape", [(8, 0, 1, 1), (0, 0), (8,), ()])
def test_an_empty_factor_of_a_convolution(edited, shape):
    assert "conv.lora_B.weight" in message(edited, "conv2d", {"conv.lora_B.weight": np.ones(shape, np.float32)})


# The base.


def test_a_base_of_another_shape(edited):
    text = message(edited, "linear", base={"fc/kernel": jnp.ones((9, 12)), "fc/bias": jnp.ones(12)})
    assert "fc" in text and "(3, 8)" in text and "(3, 9)" in text


def test_a_base_without_the_leaf(edited):
    assert "fc" in message(edited, "linear", base={"fc/bias": jnp.ones(12)})


def test_a_changed_matrix_beside_factors_is_not_dropped(edited):
    text = message(edited, "embedding_saved", {"embed_tokens.base_layer.weight": lambda w: w + 1})
    assert "embed_tokens.base_layer.weight" in text


def test_a_resized_vocabulary_is_named(edited):
    text = message(edited, "embedding_saved", {"embed_tokens.base_layer.weight": np.ones((15, 8), np.float32)})
    assert "embed_tokens.base_layer.weight" in text and "(15, 8)" in text and "(14, 8)" in text


def test_a_changed_matrix_alone_is_a_full_leaf(edited):
    delta = edited("embedding_saved_untargeted", {"embed_tokens.weight": lambda w: w + 1})
    assert delta["embed_tokens/embedding"].kind == "Full" and "lm_head/kernel" not in delta
    before = CASES["embedding_saved_untargeted"].base["embed_tokens/embedding"]
    np.testing.assert_array_equal(delta["embed_tokens/embedding"].value, before + 1)


# Files.


def test_a_pickle_is_refused(tmp_path):
    case = CASES["linear"]
    shutil.copy(case.adapter / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ValueError, match=r"pickle.*code"):
        lora.peft.load(tmp_path, case.base, case.names)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path, file):
    case = CASES["linear"]
    for other in {"adapter_config.json", "adapter_model.safetensors"} - {file}:
        shutil.copy(case.adapter / other, tmp_path)
    with pytest.raises(ValueError, match=file):
        lora.peft.load(tmp_path, case.base, case.names)


def test_a_missing_directory(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        lora.peft.load(tmp_path / "nowhere", CASES["linear"].base, CASES["linear"].names)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path, length):
    case = CASES["linear"]
    shutil.copy(case.adapter / "adapter_config.json", tmp_path)
    content = (case.adapter / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        lora.peft.load(tmp_path, case.base, case.names)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"r": 1'])
def test_a_config_that_is_not_an_object(tmp_path, text):
    case = CASES["linear"]
    shutil.copy(case.adapter / "adapter_model.safetensors", tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        lora.peft.load(tmp_path, case.base, case.names)


# The config.


def test_a_minimal_config_is_enough(tmp_path):
    case = CASES["linear"]
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["fc"]}
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors"), config)
    delta = lora.peft.load(tmp_path, case.base, case.names)
    np.testing.assert_allclose(delta["fc/kernel"].scale, 5 / 3, rtol=1e-6)
    assert float(delta["fc/kernel"].dropout) == 0


def test_the_dropout_is_kept(edited):
    assert float(edited("linear")["fc/kernel"].dropout) == 0.25


def test_unknown_keys_are_tolerated(edited):
    assert edited("linear", config={"of_a_later_version": None, "runtime": {"x": 1}}).keys() == {"fc/kernel"}


@pytest.mark.parametrize("left_out, value", [("lora_alpha", 8 / 3), ("lora_dropout", 5 / 3)])
def test_what_a_config_leaves_out_is_as_in_peft(tmp_path, left_out, value):
    case = CASES["linear"]
    config = read_config(case.adapter)
    del config[left_out]
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors"), config)
    delta = lora.peft.load(tmp_path, case.base, case.names)
    assert float(delta["fc/kernel"].scale) == pytest.approx(value)


def test_a_rank_that_is_left_out_is_8(tmp_path):
    case = CASES["linear"]
    config = read_config(case.adapter)
    del config["r"]
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors"), config)
    with pytest.raises(ValueError, match=r"(?s)fc.*\b8\b"):
        lora.peft.load(tmp_path, case.base, case.names)


@pytest.mark.parametrize(
    "config",
    [
        {"rank_pattern": {"[": 3}},
        {"rank_pattern": {"fc": "3"}},
        {"rank_pattern": {"fc": 0}},
        {"alpha_pattern": {"fc": None}},
        {"lora_alpha": "16"},
        {"lora_alpha": True},
        {"lora_dropout": 1.5},
        {"lora_dropout": float("nan")},
        {"target_modules": "("},
        {"target_modules": ["fc", 3]},
        {"target_parameters": [1]},
        {"modules_to_save": [None]},
        {"trainable_token_indices": {"fc": 1}},
        {"layers_to_transform": ["1"]},
    ],
    ids=str,
)
def test_entries_that_are_wrong(edited, config):
    (name,) = config
    assert name in message(edited, "linear", config=config)


def test_a_pattern_for_each_of_many_modules():
    """Looked up, where a pattern is a plain name; the first in the file's order counts, plain or not."""
    from lora_jax.peft.config import Config

    plain = {re.escape(f"layers.{i}.up"): i + 1 for i in range(20_000)}
    config = Config(rank_pattern={r"layers\.[7]\.up": 70, **plain, "up": 1, r".*\.[0-9]\.down": 2, "down": 3})
    assert [config.rank(f"model.layers.{i}.up") for i in range(20_000)] == [
        70 if i == 7 else i + 1 for i in range(20_000)
    ]
    assert [config.rank(name) for name in ("up", "a.up", "cup", "layers.3.down", "layers.33.down")] == [1, 1, 8, 2, 3]


@pytest.mark.parametrize("left_out", ["peft_type", "target_modules"])
def test_a_key_that_is_missing(tmp_path, left_out):
    case = CASES["linear"]
    config = read_config(case.adapter)
    del config[left_out]
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors"), config)
    with pytest.raises(ValueError, match=rf"\b{left_out}\b"):
        lora.peft.load(tmp_path, case.base, case.names)


@pytest.mark.parametrize("kind", ["BOFT", "XLORA", "lora2", 3])
def test_another_method_is_refused(edited, kind):
    text = message(edited, "linear", config={"peft_type": kind})
    assert "peft_type" in text and str(kind) in text


@pytest.mark.parametrize("config", [{"r": 4}, {"rank_pattern": {"fc": 2}}])
def test_another_rank_than_the_tensors(edited, config):
    text = message(edited, "linear", config=config)
    assert "fc" in text and "3" in text and str(config.get("r", 2)) in text


def test_patterns_in_the_order_of_the_file(edited):
    """PEFT sorts keys when it saves; a file whose keys are not sorted means what its order says."""
    alphas = {"layers.1.up": 11, "layers.1.down": 7, "down": 3}
    delta = edited("patterns", config={"alpha_pattern": alphas})
    assert float(delta["layers/1/down/kernel"].scale) == pytest.approx(7 / 3)
    assert float(delta["layers/2/down/kernel"].scale) == pytest.approx(3 / 3)


def test_an_option_without_its_tensors(edited):
    assert "fc.lora_magnitude_vector" in message(edited, "linear", config={"use_dora": True})


def test_a_bias_option_without_its_tensors(edited):
    assert "fc.lora_B.bias" in message(edited, "linear", config={"lora_bias": True})


def test_bias_all_without_a_bias(edited):
    assert "fc2.bias" in message(edited, "bias_all", {"fc2.bias": None})


def test_bias_lora_only_without_a_bias(edited):
    assert "fc2.base_layer.bias" in message(edited, "bias_lora_only", {"fc2.base_layer.bias": None})


def test_a_saved_module_without_a_tensor(edited):
    assert "classifier.2.bias" in message(edited, "modules_to_save", {"classifier.2.bias": None})


def test_magnitudes_without_the_option(edited):
    assert "fc.lora_magnitude_vector" in message(edited, "dora_linear", config={"use_dora": False})


def test_a_bias_on_the_second_factor_of_another_shape(edited):
    text = message(edited, "linear_no_bias", {"fc.lora_B.bias": np.ones(11, np.float32)}, {"lora_bias": True})
    assert "shape: base_model.model.fc.lora_B.bias (11,), expected (12,)" in text


def test_a_bias_on_the_second_factor_where_peft_has_none(edited):
    names = lora.peft.Names((lora.peft.Weight("fc/kernel", "fc.weight", lora.peft.LINEAR),))
    options = {"base": {"fc": {"kernel": jnp.ones((8, 12))}}, "names": names}
    text = message(edited, "dora_linear", {"fc.lora_B.bias": np.ones(12, np.float32)}, {"lora_bias": True}, **options)
    assert "fc.lora_B.bias" in text and "DoRA" in text


def test_a_bias_on_the_second_factor_that_peft_leaves_out(edited, tmp_path):
    """Of the in_proj_weight of an attention PEFT merges the product alone."""
    biases = {
        "attn.lora_B.bias": np.ones(24, np.float32),
        "attn.base_layer.out_proj.lora_B.bias": np.ones(8, np.float32),
    }
    text = message(edited, "multihead_attention", biases, {"lora_bias": True})
    assert "attn.lora_B.bias" in text and "in_proj_weight" in text and "out_proj" not in text
    case = CASES["multihead_attention"]
    delta = lora.peft.load(case.adapter, case.base, case.names)
    delta["attn/qkv/kernel"] = dataclasses.replace(delta["attn/qkv/kernel"], bias=jnp.ones(24))
    with pytest.raises(ValueError, match=r"'attn/qkv/kernel': PEFT adds no bias on B of attn\.in_proj_weight"):
        lora.peft.save(tmp_path / "out", delta, case.names)


@pytest.mark.parametrize("alpha", [0, 0.0, 1e-50, 1e39, float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_does_nothing(edited, field, alpha):
    value = alpha if field == "lora_alpha" else {"fc": alpha}
    assert f"{field} is" in message(edited, "linear", config={field: value})


@pytest.mark.parametrize("indices", [[5, 1], [5, 1, 12, 3], [5, 1, 14], [5, 1, 1]])
def test_token_indices_that_do_not_fit(edited, indices):
    text = message(edited, "trainable_tokens", config={"trainable_token_indices": {"embed": indices}})
    assert "embed" in text


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_init_that_changed_the_base_is_refused(edited, init):
    """The factors belong to a base without their initial product, which no file holds."""
    text = message(edited, "linear", config={"init_lora_weights": init})
    assert "init_lora_weights" in text and init in text


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_init_that_left_the_base_alone(edited, init):
    assert edited("linear", config={"init_lora_weights": init}).keys() == {"fc/kernel"}


@pytest.mark.parametrize(
    "config",
    [
        {"use_qalora": True},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"alora_invocation_tokens": [1, 2]},
        {"arrow_config": {"top_k": 2}},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1.0}},
        {"monteclora_config": {"n": 4}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_a_variant_that_is_another_function_is_refused(edited, config):
    assert next(iter(config)) in message(edited, "stacked", config=config)


def test_everything_wrong_with_tensors_and_config_at_once(edited):
    text = message(
        edited,
        "modules_to_save",
        {"fc1.lora_A.weight": None, "norm.bias": None, "fc3.lora_A.weight": A},
        {"use_dora": True},
    )
    for wrong in ("fc1.lora_A.weight", "norm.bias", "fc3", "fc1.lora_magnitude_vector"):
        assert wrong in text


def test_a_config_is_read_as_utf_8(tmp_path):
    case = CASES["linear"]
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors"), {})
    config = read_config(case.adapter) | {"base_model_name_or_path": "modèle"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    assert lora.peft.load(tmp_path, case.base, case.names).keys() == {"fc/kernel"}


# Saving.


def test_a_delta_of_a_leaf_without_a_name(tmp_path):
    case = CASES["linear"]
    delta = lora.peft.load(case.adapter, case.base, case.names)
    with pytest.raises(ValueError, match="other/kernel"):
        lora.peft.save(tmp_path / "out", {"other/kernel": delta["fc/kernel"]}, case.names)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_names_that_end_alike_keep_their_own_rank(tmp_path):
    """PEFT's patterns and targets match the ends of names."""
    names = lora.peft.Names(
        tuple(
            lora.peft.Weight(f"{name.replace('.', '/')}/kernel", f"{name}.weight", lora.peft.LINEAR)
            for name in ("fc", "inner.fc", "a.inner.fc")
        )
    )
    base = {f"{path}/kernel": jnp.ones((8, 12)) for path in ("fc", "inner/fc", "a/inner/fc")}
    spec = {
        "^fc/": lora.LoRA(2, alpha=3, axes=("in", "out"), init="gaussian"),
        "^inner/fc": lora.LoRA(3, alpha=5, axes=("in", "out"), init="gaussian"),
        "^a/": lora.LoRA(4, alpha=7, axes=("in", "out"), init="gaussian"),
    }
    delta = lora.init(jax.random.key(0), base, spec)
    lora.peft.save(tmp_path / "out", delta, names)
    again = lora.peft.load(tmp_path / "out", base, names)
    jax.tree.map(np.testing.assert_array_equal, again, delta)


def test_a_name_that_ends_as_another_is_adapted_alone(tmp_path):
    names = lora.peft.Names(
        (
            lora.peft.Weight("fc/kernel", "fc.weight", lora.peft.LINEAR),
            lora.peft.Weight("inner/fc/kernel", "inner.fc.weight", lora.peft.LINEAR),
        )
    )
    base = {"fc/kernel": jnp.ones((8, 12)), "inner/fc/kernel": jnp.ones((8, 12))}
    delta = lora.init(jax.random.key(0), base, {"^fc/": lora.LoRA(2, alpha=3, axes=("in", "out"))})
    lora.peft.save(tmp_path / "out", delta, names)
    assert targeted(read_config(tmp_path / "out"), {"fc", "inner.fc"}) == {"fc"}
    assert lora.peft.load(tmp_path / "out", base, names).keys() == {"fc/kernel"}


def test_a_target_that_does_not_exist(tmp_path):
    case = CASES["linear"]
    delta = lora.peft.load(case.adapter, case.base, case.names)
    with pytest.raises(ValueError, match=r"'onnx'.*vllm"):
        lora.peft.save(tmp_path / "out", delta, case.names, target="onnx")
    with pytest.raises(ValueError, match="lora-jax convert --target gguf-file makes the file"):
        lora.peft.save(tmp_path / "out", delta, case.names, target="gguf-file")


def test_the_base_model_is_named(tmp_path):
    case = CASES["linear"]
    delta = lora.peft.load(case.adapter, case.base, case.names)
    lora.peft.save(tmp_path / "out", delta, case.names, base_model="some/model")
    assert read_config(tmp_path / "out")["base_model_name_or_path"] == "some/model"


# Tensors that are none of the adapter's; directories that hold one.


def test_ignored_tensors(tmp_path):
    case = CASES["linear"]
    more = {"v_head.summary.weight": np.ones((1, 8), np.float32), f"{PREFIX}fc.ia3_l": np.ones((8, 1), np.float32)}
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors") | more, read_config(case.adapter))
    with pytest.raises(
        ValueError, match=r"'v_head\.summary\.weight' is not a key of PEFT's LoRA; ignore=\('v_head',\)"
    ):
        lora.peft.load(tmp_path, case.base, case.names)
    delta = lora.peft.load(tmp_path, case.base, case.names, ignore=("v_head", "ia3"))
    jax.tree.map(np.testing.assert_array_equal, delta, lora.peft.load(case.adapter, case.base, case.names))


def test_hundreds_of_tensors_of_something_else_are_counted(tmp_path):
    case = CASES["linear"]
    more = {f"other.{number}.weight": np.ones(1, np.float32) for number in range(500)}
    write_adapter(tmp_path, read(case.adapter / "adapter_model.safetensors") | more, read_config(case.adapter))
    with pytest.raises(ValueError, match=r"\(500 problems\)") as caught:
        lora.peft.load(tmp_path, case.base, case.names)
    lines = str(caught.value).splitlines()
    assert len(lines) == 13 and lines[-1] == "  … and 489 more"


def test_problems_of_one_leaf_are_counted_each(tmp_path):
    case = CASES["stacked_dora"]
    factors = read(case.adapter / "adapter_model.safetensors")
    cut = {name: value[..., :-1] if "lora_A" in name else value for name, value in factors.items()}
    write_adapter(tmp_path, cut, read_config(case.adapter))
    with pytest.raises(ValueError, match=r"the adapter does not fit \(6 problems\):") as caught:
        lora.peft.load(tmp_path, case.base, case.names)
    lines = str(caught.value).splitlines()[1:]
    assert sorted(line.split()[1].rstrip(":") for line in lines) == sorted(name for name in cut if "lora_A" in name)


def test_problems_of_a_delta_are_counted(tmp_path):
    case = CASES["stacked_dora"]
    delta = lora.peft.load(case.adapter, case.base, case.names)
    with pytest.raises(ValueError, match=r"cannot be written for vLLM \(\d+ problems\):\n  .*: vLLM has no DoRA"):
        lora.peft.save(tmp_path / "out", delta, case.names, target="vllm")


def test_an_adapter_in_a_directory_inside(tmp_path):
    case = CASES["linear"]
    shutil.copytree(case.adapter, tmp_path / "default")
    with pytest.warns(UserWarning, match="the adapter in default is read"):
        delta = lora.peft.load(tmp_path, case.base, case.names)
    assert delta.keys() == {"fc/kernel"}
    shutil.copytree(case.adapter, tmp_path / "other")
    with pytest.raises(ValueError, match=r"holds 2 adapters \(default, other\)"):
        lora.peft.load(tmp_path, case.base, case.names)


def test_factors_in_fp8(tmp_path):
    case = CASES["linear"]
    tensors = read(case.adapter / "adapter_model.safetensors")
    narrow = {name: value.astype(ml_dtypes.float8_e4m3fn) for name, value in tensors.items()}
    write_adapter(tmp_path, narrow, read_config(case.adapter))
    with pytest.raises(ValueError, match="FP8 is not supported yet"):
        lora.peft.load(tmp_path, case.base, case.names)
