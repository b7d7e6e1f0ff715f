"""Paths of leaves."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from lora_jax import paths


def test_every_kind_of_key():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Node:
        inner: object

    tree = {"a": [Node((1.0, 2.0))], 3: {"b": 4.0}}
    assert set(paths.flatten({"x": tree["a"], "y": {"3": tree[3]}}).paths) == {"x/0/inner/0", "x/0/inner/1", "y/3/b"}
    model = eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0))
    assert "layers/1/weight" in paths.flatten(model).paths


def test_map_and_back():
    tree = {"a": jnp.ones(2), "b": [jnp.zeros(1)]}
    mapped = paths.flatten(tree).map(lambda path, leaf: path)
    assert mapped == {"a": "a", "b": ["b/0"]}


def test_nearest():
    assert paths.nearest("x", []) == "there are none"
    assert "'layers/0/kernel'" in paths.nearest(r"layer/\d+/kernal$", ["layers/0/kernel", "head/bias"], limit=1)


def test_twins():
    with pytest.raises(ValueError, match="same path: '1'"):
        paths.flatten(_Twins())


@jax.tree_util.register_pytree_with_keys_class
class _Twins:
    def tree_flatten_with_keys(self):
        key = jax.tree_util.DictKey("1")
        return ((key, 1.0), (key, 2.0)), None

    def tree_flatten(self):
        return (1.0, 2.0), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls()
