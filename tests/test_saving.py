"""save(): whose files it replaces, and what processes that are killed or work at the same time leave."""

import ast
import dataclasses
import os
import pathlib
import subprocess
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lora
from lora_jax.io import files

SCRIPT = pathlib.Path(__file__).with_name("saving_processes.py")


def adapter(value):
    delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, {"w": lora.LoRA(2, axes=("in", "out"))})
    node = delta["w"]
    return {"w": dataclasses.replace(node, a=node.a * 0 + value, b=node.b * 0 + value, scale=node.scale * 0 + value)}


@pytest.fixture
def saved(tmp_path):
    lora.save(tmp_path / "run", adapter(1))
    return tmp_path / "run"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_other_files_stay(saved):
    (saved / "metrics.jsonl").write_text("{}\n")
    (saved / "checkpoints").mkdir()
    (saved / "arrays-of-mine").mkdir()
    for value in (2, 3):
        lora.save(saved, adapter(value))
        chex.assert_trees_all_equal(lora.load(saved), adapter(value))
    assert [name for name in names(saved) if not name.startswith("arrays-") or name == "arrays-of-mine"] == [
        "adapter.json",
        "arrays-of-mine",
        "checkpoints",
        "metrics.jsonl",
    ]
    assert len(names(saved)) == 5 and (saved / "metrics.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize("content", ['{"format": "another program"}', "not JSON", "[]"])
def test_an_adapter_json_of_another_program(tmp_path, content):
    (tmp_path / "adapter.json").write_text(content)
    with pytest.raises(FileExistsError, match=r"adapter\.json was not written by lora_jax; not replaced"):
        lora.save(tmp_path, adapter(1))
    assert (tmp_path / "adapter.json").read_text() == content


def test_arrays_of_another_program(tmp_path):
    (tmp_path / "arrays").mkdir()
    (tmp_path / "arrays" / "mine.npy").write_text("")
    with pytest.raises(FileExistsError, match="contains arrays and is not an adapter directory"):
        lora.save(tmp_path, adapter(1))
    assert names(tmp_path / "arrays") == ["mine.npy"]


def test_links_are_not_followed(saved, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("mine")
    manifest = saved / "adapter.json"
    manifest.rename(outside / "adapter.json")
    manifest.symlink_to(outside / "adapter.json")
    with pytest.raises(FileExistsError, match="was not written by lora_jax"):
        lora.save(saved, adapter(2))
    manifest.unlink()
    (outside / "adapter.json").rename(manifest)
    (saved / "arrays").rename(outside / "arrays")
    (saved / "arrays").symlink_to(outside / "arrays")
    lora.save(saved, adapter(2))
    assert (outside / "arrays" / "_METADATA").exists() and (outside / "precious.txt").exists()


def test_a_link_to_the_directory_stays(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved)
    lora.save(tmp_path / "link", adapter(2))
    assert (tmp_path / "link").is_symlink()
    chex.assert_trees_all_equal(lora.load(saved), adapter(2))


@pytest.mark.parametrize("where", [".", ".."])
def test_the_working_directory(saved, monkeypatch, where):
    (saved / "inside").mkdir()
    monkeypatch.chdir(saved if where == "." else saved / "inside")
    lora.save(where, adapter(2))
    assert os.getcwd().startswith(str(saved)) and os.path.samefile(where, saved)
    chex.assert_trees_all_equal(lora.load(where), adapter(2))


def test_what_is_no_directory_for_an_adapter(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for where, message in {
        "/": "is not an adapter directory",
        tmp_path / "file": "is not a directory",
        tmp_path / "nowhere": "broken or circular link",
        tmp_path / "circle": "broken or circular link",
    }.items():
        with pytest.raises(FileExistsError, match=message) as error:
            lora.save(where, adapter(1))
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(NotADirectoryError, match="file"):
        lora.save(tmp_path / "file" / "inside", adapter(1))
    assert names(tmp_path) == ["circle", "file", "nowhere"]


def test_an_adapter_of_the_first_format(saved):
    """Before arrays were named in the manifest, they were in `arrays`."""
    text = (saved / "adapter.json").read_text()
    assert '"arrays": "arrays"' in text
    (saved / "adapter.json").write_text(text.replace(',\n  "arrays": "arrays"', ""))
    chex.assert_trees_all_equal(lora.load(saved), adapter(1))
    lora.save(saved, adapter(2))
    chex.assert_trees_all_equal(lora.load(saved), adapter(2))


def test_threads(tmp_path):
    errors = []

    def work(number):
        try:
            for turn in range(3):
                lora.save(tmp_path / str(number), adapter(turn))
                chex.assert_trees_all_equal(lora.load(tmp_path / str(number)), adapter(turn))
                lora.save(tmp_path / "shared", adapter(turn))
                node = lora.load(tmp_path / "shared")["w"]
                assert len({float(x) for leaf in (node.a, node.b, node.scale) for x in np.ravel(leaf)}) == 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


NAMES = lora.peft.Names((lora.peft.Weight("w", "up.weight", lora.peft.LINEAR),))


@pytest.mark.parametrize("atomic", [True, False])
def test_a_peft_adapter_is_replaced_and_other_files_stay(tmp_path, monkeypatch, atomic):
    if not atomic:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    base, out = {"w": jnp.ones((4, 3))}, tmp_path / "adapter"
    for value in (1, 2, 3):
        lora.peft.save(out, adapter(value), NAMES)
        (out / "README.md").write_text("mine")
        if value == 2:
            (out / "runs").mkdir()  # directories cannot be linked: files are replaced one by one
    loaded = lora.peft.load(out, base, NAMES)["w"]
    np.testing.assert_array_equal(loaded.a, adapter(3)["w"].a)
    assert names(tmp_path) == ["adapter"]
    assert names(out) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "runs"]


def test_an_adapter_that_peft_wrote_stays(tmp_path):
    lora.peft.save(tmp_path, adapter(1), NAMES)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})
    before = file.read_bytes()
    with pytest.raises(FileExistsError, match=r"lora_jax did not write \(adapter_config\.json\)"):
        lora.peft.save(tmp_path, adapter(2), NAMES)
    assert file.read_bytes() == before and len(names(tmp_path)) == 2


def test_directories_are_exchanged(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if files.exchange(tmp_path / "one", tmp_path / "other"):
        assert names(tmp_path / "one") == ["other"] and names(tmp_path / "other") == ["one"]
    else:
        assert names(tmp_path / "one") == ["one"] and names(tmp_path / "other") == ["other"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.exchange(tmp_path / "one", tmp_path / "nowhere")


def processes(*args):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return ast.literal_eval(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mode", [("operations",), ("random", "8")])
def test_kills(mode):
    """After each of them an adapter loads, the old or the new one, and the next save removes what is left."""
    loaded = processes(*mode)
    assert set(loaded) <= {"old", "new"} and sum(loaded.values()) > 8
    assert mode[0] == "random" or set(loaded) == {"old", "new"}


def test_processes_together():
    assert processes("together", "5") == {"failed": 0, "left": 3}
