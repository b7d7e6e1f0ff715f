"""Adapters of models whose tensors have other names in checkpoint files than in the running model.

`fixtures/transformers/make_adapters.py` says what the fixtures are.
"""

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.__main__ import main
from lora_jax.peft import renames
from tests.peft.test_ties import FIXTURES


def bare(name):
    """RoBERTa as its bare model saves it."""
    return name.removeprefix("roberta.")


def older(name):
    """LLaVA as releases before 5.24 have it."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


@pytest.fixture(params=[("roberta", bare), ("llava", str), ("llava", older)], ids=lambda x: f"{x[0]}-{x[1].__name__}")
def pair(request, tmp_path):
    """A base whose files have other names, and an adapter."""
    name, renamed = request.param
    shutil.copytree(FIXTURES / "models" / name, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    tensors = {renamed(key): value for key, value in tensors.items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "base", FIXTURES / "adapters" / name


def test_a_converted_adapter_keeps_its_names(pair, tmp_path):
    base, adapter = pair
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--target", "peft", "--base", str(base)]) == 0
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


def test_a_merged_checkpoint_keeps_its_names(pair, tmp_path):
    base, adapter = pair
    assert main(["merge", str(base), str(adapter), str(tmp_path / "out")]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    factors = [name for name in load_file(adapter / "adapter_model.safetensors") if name.endswith("lora_A.weight")]
    changed = [name for name in before if not np.array_equal(before[name], after[name])]
    assert len([name for name in changed if "classifier" not in name]) == len(factors)


def test_names_that_transformers_changes():
    expected = {
        "vit.encoder.layer.3.attention.attention.query.weight": "vit.layers.3.attention.q_proj.weight",
        "vit.encoder.layer.3.attention.output.dense.bias": "vit.layers.3.attention.o_proj.bias",
        "vit.encoder.layer.3.output.dense.weight": "vit.layers.3.mlp.fc2.weight",
        "visual.blocks.0.attn.qkv.weight": "model.visual.blocks.0.attn.qkv.weight",
        "model.layers.0.block_sparse_moe.gate.weight": "model.layers.0.mlp.gate.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }
    for name, new in expected.items():
        assert new in list(renames.model_names(name))
