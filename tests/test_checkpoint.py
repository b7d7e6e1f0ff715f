"""save() and load(): what is on disk, what fits, what is refused."""

import gc
import json
import os
import re
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora
from lora_jax import manifest


@pytest.fixture
def base(getkey):
    return {
        "layers/0".replace("/", "_"): {"kernel": jax.random.normal(getkey(), (384, 384))},
        "table": jnp.ones((5, 4)),
        "head": {"bias": jnp.zeros(3, jnp.bfloat16)},
    }


SPEC = {
    "kernel": lora.LoRA(8, alpha=16, axes=("in", "out")),
    "table": lora.Rows((1, 3), axes=("in", "out")),
    "bias": lora.Full(dtype=jnp.bfloat16),
}


@pytest.fixture
def delta(base, getkey):
    return lora.init(getkey(), base, SPEC)


@pytest.fixture
def saved(tmp_path, base, delta):
    lora.save(tmp_path / "deep" / "adapter", delta, base=base)
    return tmp_path / "deep" / "adapter"


def test_round_trip(saved, base, delta):
    for loaded in (lora.load(saved), lora.load(str(saved), base)):
        chex.assert_trees_all_equal(loaded, delta)
        assert jax.tree.structure(loaded) == jax.tree.structure(delta)
        assert loaded["head/bias"].value.dtype == jnp.bfloat16


def test_names_of_any_characters(tmp_path, getkey):
    base = {"a.b/c d": {"ключ:é$[0]": jax.random.normal(getkey(), (4, 3))}}
    delta = lora.init(getkey(), base, {r"\$\[0\]$": lora.LoRA(1, axes=("in", "out"))})
    lora.save(tmp_path / "ein Adapter.v1:β", delta, base=base)
    chex.assert_trees_all_equal(lora.load(tmp_path / "ein Adapter.v1:β", base), delta)


def test_the_manifest_reads_well(saved):
    entry = json.loads((saved / "adapter.json").read_text())["adapters"]["layers_0/kernel"]
    assert {k: entry[k] for k in ("kind", "rank", "alpha", "scale", "weight_shape")} == {
        "kind": "LoRA",
        "rank": 8,
        "alpha": 16.0,
        "scale": 2.0,
        "weight_shape": [384, 384],
    }
    assert '"axes": ["in", "out"]' in (saved / "adapter.json").read_text()
    assert entry["structure"]["axes"] == ["in", "out"]
    assert entry["arrays"]["a"] == {"shape": [8, 384], "dtype": "float32"}


def test_nothing_else_is_left_behind(saved, delta, base):
    lora.save(saved, delta)  # replaced
    assert os.listdir(saved.parent) == ["adapter"]
    chex.assert_trees_all_equal(lora.load(saved, base), delta)


def test_a_failed_write_leaves_the_old_adapter(saved, delta, base, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(manifest, "to_json", fail)
    with pytest.raises(OSError, match="No space"):
        lora.save(saved, lora.init(jax.random.key(9), base, SPEC))
    assert os.listdir(saved.parent) == ["adapter"]
    chex.assert_trees_all_equal(lora.load(saved, base), delta)


def test_another_directory_is_not_replaced(tmp_path, delta):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"not an adapter directory \(it has no adapter\.json\); not replaced"):
        lora.save(tmp_path, delta)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_base_that_does_not_fit(saved, base):
    other = {"layers_0": {"kernel": jnp.ones((384, 10))}, "tables": jnp.ones((5, 4)), "head": base["head"]}
    with pytest.raises(ValueError) as error:
        lora.load(saved, other)
    text = str(error.value)
    assert "(2 paths)" in text
    assert "'layers_0/kernel': for shape (384, 384), but the base has (384, 10)" in text
    assert "'table': for shape (5, 4), but the base lacks it (nearest: 'tables'" in text


def test_a_base_of_other_values(saved, base):
    with pytest.raises(ValueError, match=r"'table'.*trained on other values"):
        lora.load(saved, base | {"table": base["table"] + 1})
    # A base without values can only be compared by shape.
    lora.load(saved, jax.eval_shape(lambda: base))


def test_nothing_to_save(tmp_path, delta):
    for nothing in ({}, None):
        with pytest.raises(ValueError, match="delta is empty"):
            lora.save(tmp_path / "x", nothing)
    with pytest.raises(TypeError, match=r"delta\['w'\]: expected an Adapter, got f32\[3\]"):
        lora.save(tmp_path / "x", {"w": jnp.ones(3)})
    for half in lora.partition(delta):
        with pytest.raises(ValueError, match=r"None: it is one half of partition\(\); give join\(train, frozen\)"):
            lora.save(tmp_path / "x", half)
    assert not (tmp_path / "x").exists()


def edit(saved, change):
    manifest = json.loads((saved / "adapter.json").read_text())
    change(manifest)
    (saved / "adapter.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(version=9), "version 9; this release reads 1"),
        (lambda m: m.update(format="other"), "not the manifest"),
        (lambda m: m["adapters"]["table"].update(kind="Foo"), "kind 'Foo', which no adapter class"),
        (lambda m: m["adapters"]["table"]["structure"].pop("count"), "has the fields"),
        (lambda m: m["adapters"]["table"]["arrays"]["rows"].update(shape=[2, 5]), "disagree on 'table:rows'"),
        (lambda m: m["adapters"].pop("table"), "disagree on 'table:ids'"),
        (lambda m: m["base"].pop("table"), "'adapters' and 'base' have different paths, such as 'table'"),
        (
            lambda m: m["base"]["table"].update(shape=[5, 5]),
            "'table' has one shape in 'adapters'",
        ),
    ],
)
def test_a_manifest_that_contradicts(saved, change, message):
    edit(saved, change)
    with pytest.raises(ValueError, match=message):
        lora.load(saved)


LOAD = """
import sys, lora_jax
try:
    lora_jax.load(sys.argv[1])
except ValueError as error:
    print(error)
"""


def test_damaged_arrays(saved):
    for file in (saved / "arrays").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    # In a process of its own: where one read fails, Orbax leaves others unfinished that complain when collected.
    done = subprocess.run([sys.executable, "-c", LOAD, str(saved)], capture_output=True, text=True, check=True)
    assert re.search("arrays (cannot be read|is damaged)", done.stdout), done


def test_damaged_manifests(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="not an adapter directory"):
        lora.load(tmp_path / "nowhere")
    (saved / "adapter.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter\.json is damaged"):
        lora.load(saved)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, r"adapter\.json is damaged: nested too deeply"),
        ('{"format": "lora_jax adapter", "version": 1}', "'adapters' is missing"),
        ('{"format": "lora_jax adapter", "version": 1, "adapters": {}, "base": {}, "arrays": "../x"}', r"'\.\./x'"),
        ('{"format": "lora_jax adapter", "version": 1, "adapters": {}, "base": {}, "arrays": 3}', "'arrays' is 3"),
        ('{"format": "lora_jax adapter", "version": ' + "9" * 5000 + "}", "is damaged"),
        ('{"format": "lora_jax adapter", "version": "' + "a" * 10_000 + '"}', "has format version 'aaa"),
    ],
)
def test_manifests_of_other_content(saved, text, message):
    (saved / "adapter.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        lora.load(saved)
    assert len(str(error.value)) < 800


@pytest.mark.parametrize("size", [-1, 2**31, 1.5, "4", None])
def test_shapes_that_are_none(saved, size):
    edit(saved, lambda manifest: manifest["adapters"]["table"]["arrays"]["rows"].update(shape=[2, size]))
    with pytest.raises(ValueError, match=r"adapter\.json"):
        lora.load(saved)


def test_nothing_is_printed_beside_the_error(saved, capfd):
    """Also where many damaged adapters are read in one process."""
    files = [saved / "arrays" / "manifest.ocdbt", *(saved / "arrays" / "d").iterdir()]
    for file in files:
        content = file.read_bytes()
        first, last = (bytes([byte ^ 1]) for byte in (content[0], content[-1]))
        for damaged in (b"", content[: len(content) // 2], first + content[1:], content[:-1] + last):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="arrays is damaged or not an Orbax checkpoint"):
                lora.load(saved)
        file.write_bytes(content)
    gc.collect()
    assert capfd.readouterr() == ("", "")
    lora.load(saved)


def test_long_names_lose_their_middle(saved):
    edit(saved, lambda manifest: manifest["adapters"].update({"w" * 10_000: {"kind": "none"}}))
    with pytest.raises(ValueError, match=r"adapter\.json: 'www.* … .*has kind 'none'") as error:
        lora.load(saved)
    assert len(str(error.value)) < 1200


def test_arrays_that_are_missing(saved):
    (saved / "arrays" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"arrays is damaged or not an Orbax checkpoint: manifest\.ocdbt is missing"):
        lora.load(saved)
