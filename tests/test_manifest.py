"""`adapter.json` that was edited or damaged: the same adapter or one clear error, never another adapter."""

import copy
import json
import random

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lora

KEY = jax.random.key(0)
SPEC = {
    "plain": lora.LoRA(2, alpha=4, axes=("in", "out")),
    "blocks": lora.LoRA(2, blocks=(True, False), axes=("in", "out")),
    "layers": lora.DoRA(2, axes=("batch", "in", "out")),
    "kronecker": lora.LoKr(1, axes=("in", "out")),
    "gains": lora.IA3(axes=("in", "out")),
    "table": lora.Rows((1, 3), axes=("in", "out")),
    "shared": lora.VeRA(4, axes=("in", "out")),
    "bias": lora.Full(),
}


@pytest.fixture(scope="module")
def base():
    shapes = {"layers": (3, 6, 6), "bias": (6,), "kronecker": (6, 8)}
    paths = ["plain", "blocks", "layers", "kronecker", "gains", "table", "shared_1", "shared_2", "bias"]
    return {path: jax.random.normal(KEY, shapes.get(path, (6, 6))) for path in paths}


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "adapter"
    lora.save(directory, lora.init(KEY, base, SPEC), base=base)
    return directory


@pytest.fixture
def edited(saved):
    """Loads the adapter with another manifest."""
    text = (saved / "adapter.json").read_text()

    def load(content, base=None):
        (saved / "adapter.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return lora.load(saved, base)

    yield load
    (saved / "adapter.json").write_text(text)


VALUES = (None, True, False, 0, 1, -1, 7, 10**30, 1.5, float("nan"), "", "in", "LoRA", "float64", "x:a", [], [0, 0], {})


def mutated(tree, draw):
    """The tree with one of its values replaced, removed, repeated, moved or nested."""
    tree = copy.deepcopy(tree)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(tree)
    node, key = draw.choice(places)
    kind = draw.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(draw.choice(VALUES))] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == 3:
        node[key] = [node[key]]
    elif kind == 4 and isinstance(node[key], list):
        node[key].reverse()
    else:
        node[key] = copy.deepcopy(draw.choice(VALUES))
    return tree


def test_mutations(saved, edited, base):
    good = lora.load(saved)
    stored = json.loads((saved / "adapter.json").read_text())
    draw, same = random.Random(0), 0
    for number in range(200):
        changed = mutated(stored, draw)
        try:
            loaded = edited(changed, base if number % 2 else None)
        except ValueError as error:
            assert str(saved) in str(error) and "\n\n" not in str(error) and len(str(error)) < 1500
            continue
        same += 1
        assert jax.tree.structure(loaded) == jax.tree.structure(good), changed
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), loaded, good)))
    assert same < 100


def test_bytes_that_are_no_manifest(saved, edited):
    text = (saved / "adapter.json").read_text()
    draw = random.Random(1)
    for content in (
        "",
        "null",
        "3",
        "[]",
        '"adapter"',
        "[" * 100_000,
        "{" * 100_000,
        "9" * 5000,
        text[:-2],
        text + "}",
    ):
        with pytest.raises(ValueError, match=r"adapter\.json"):
            edited(content)
    for _ in range(20):
        index = draw.randrange(len(text))
        try:
            edited(text[:index] + chr(draw.randrange(32, 127)) + text[index + 1 :])
        except ValueError as error:
            assert "adapter.json" in str(error) or "disagree" in str(error)


def change(entry, **structure):
    entry["structure"].update(structure)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda a: change(a["plain"], axes=["in", "out", "out"]), r"'plain' \(LoRA\): b has the shape \(2, 6\)"),
        (lambda a: change(a["plain"], axes=["in"]), r"'plain' \(LoRA\): b has the shape"),
        (lambda a: change(a["plain"], axes=["in", "outer"]), "got the role 'outer'"),
        (lambda a: change(a["plain"], axes="in"), "axes='in'"),
        (lambda a: change(a["plain"], blocks=[0, 0]), r"'plain' .*blocks=\(0, 0\): expected tuple\[bool, ...\]"),
        (lambda a: change(a["plain"], blocks=[False]), "no block is adapted"),
        (lambda a: change(a["plain"], blocks=[True, True]), "a has the shape"),
        (lambda a: change(a["blocks"], blocks=[True, False, False]), r"weight_shape is \[6, 6\]; .* \(6, 9\)"),
        (lambda a: change(a["layers"], norm_over="up"), "norm_over='up': expected one of 'in', 'out'"),
        (lambda a: change(a["layers"], norm_gradient=0), "norm_gradient=0: expected bool"),
        (lambda a: change(a["kronecker"], split=[1, 0]), "split=.* does not name an in and an out axis"),
        (lambda a: change(a["gains"], rest=[-6]), "rest=.* has a negative number"),
        (lambda a: change(a["table"], count=7), r"weight_shape is \[6, 6\]; .* \(7, 6\)"),
        (lambda a: change(a["table"], count=True), "count=True: expected int"),
        (lambda a: change(a["plain"], axes=["out", "in"]), "has been edited"),
        (lambda a: a["plain"].update(rank=3), "rank is 3; the arrays give 2"),
        (lambda a: a["plain"].update(alpha=32), r"alpha is 32; the arrays give 4\.0"),
        (lambda a: a["plain"].update(kind="Full"), "has the fields"),
        (lambda a: a["plain"].update(kind=["LoRA"]), "has kind"),
        (lambda a: a["plain"].update(weight_shape=[6, -6]), "expected a list of sizes"),
        (lambda a: a["plain"]["arrays"]["a"].update(shape=[10**30, 6]), "expected a list of sizes"),
        (lambda a: a["plain"]["arrays"]["a"].update(dtype="float31"), "dtype 'float31', which is not a dtype"),
        (lambda a: a["shared_2"]["arrays"]["a"].update(same_as="plain:b"), "not an array of its shape and dtype"),
    ],
)
def test_a_structure_that_contradicts_its_arrays(saved, edited, base, edit, message):
    stored = json.loads((saved / "adapter.json").read_text())
    edit(stored["adapters"])
    for of_base in (None, base):
        with pytest.raises(ValueError, match=message):
            edited(stored, of_base)


def test_an_adapter_of_an_earlier_version(saved, edited, base):
    stored = json.loads((saved / "adapter.json").read_text())
    del stored["sha256"]
    for entry in stored["base"].values():
        entry.pop("sketch")
    assert edited(stored, base).keys() == base.keys()


def test_another_precision(tmp_path):
    fn, x = (lambda base, x: x @ base["w"]), jnp.ones((1, 64))
    base = {"w": jax.random.normal(KEY, (64, 32))}
    small = lora.quantize(base, {"w": lora.NF4()}, fn, x)
    delta = lora.init(KEY, small, {"w": lora.LoRA(2)}, fn, x)
    lora.save(tmp_path / "a", delta, base=small)
    lora.load(tmp_path / "a", small)
    lora.load(tmp_path / "a", lora.dequantize(small))
    message = r"trained on NF4\[64, 32\].*'w'.*has float32 there.*quantize the base by the same rules.*dequantize"
    for other in (base, {"w": base["w"].astype(jnp.bfloat16)}):
        with pytest.warns(lora.BasePrecisionWarning, match=message.replace("float32", other["w"].dtype.name)):
            lora.load(tmp_path / "a", other)
    with pytest.raises(ValueError, match=r"'w'.*trained on other values"):
        lora.load(tmp_path / "a", {"w": jax.random.normal(jax.random.key(1), (64, 32))})
    lora.save(tmp_path / "b", delta, base=base)
    for other in (small, {"w": base["w"].astype(jnp.bfloat16)}):
        with pytest.warns(lora.BasePrecisionWarning, match="trained on float32"):
            lora.load(tmp_path / "b", other)
    with pytest.raises(ValueError, match=r"'w'.*trained on other values"):
        lora.load(tmp_path / "b", {"w": base["w"] * 1.001})


def test_swapped_arguments(saved, base):
    delta = lora.load(saved)
    for call in (lambda: lora.save(delta, saved), lambda: lora.load(base, saved)):
        with pytest.raises(TypeError, match=r"lora\.(save|load)\(directory, .*expected a path as directory, got dict"):
            call()
    with pytest.raises(TypeError, match=r"delta is a dict from paths to adapters; got the path .*swapped"):
        lora.save(saved, str(saved))
    with pytest.raises(TypeError, match=r"delta\['plain'\]: expected an Adapter, got f32\[6,6\]"):
        lora.save(saved, base)
