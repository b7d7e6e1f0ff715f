"""`lora_jax.testing.check_adapter` on an adapter that imports public names only, and on broken ones."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from contract.cases import NONLINEAR, RECIPES

import lora_jax as lora
from lora_jax.adapters import Factor, frozen, in_and_out, sizes, static, trained
from lora_jax.testing import check_adapter, weight_gradients


@lora.adapter("test.user.Bottleneck")
class BottleneckAdapter(lora.Adapter):
    """ΔW = scale · Σᵣₛ a[r, in] · middle[r, s] · b[s, out]."""

    a: jax.Array = trained("batch rank in")
    middle: jax.Array = frozen("batch rank rank")
    b: jax.Array = trained("batch rank out")
    scale: jax.Array = frozen("scalar")
    axes: tuple[str, ...] = static()

    additive = True

    def factored(self, weight):
        b = self.factor("b")
        b = Factor(b.array, tuple("rank'" if label == "rank" else label for label in b.labels))
        return self.form(self.factor("a"), self.factor("middle"), self.factor("scale"), b)


@dataclasses.dataclass(frozen=True)
class Bottleneck(lora.Recipe):
    rank: int
    axes: tuple[str, ...] | None = None
    cls: type = BottleneckAdapter

    def create(self, key, weight, axes):
        axes = in_and_out("Bottleneck", axes, weight.shape)
        batch, fan_in, out = (sizes(weight.shape, axes, role) for role in ("batch", "in", "out"))
        one, two = jax.random.split(key)
        return self.cls(
            a=jax.random.normal(one, (*batch, self.rank, *fan_in)) / math.prod(fan_in) ** 0.5,
            middle=jax.random.normal(two, (*batch, self.rank, self.rank)),
            b=jnp.zeros((*batch, self.rank, *out)),
            scale=jnp.float32(2.0),
            axes=axes,
        )


def test_an_adapter_of_a_user_s_own_file_passes():
    check_adapter(Bottleneck(2), axes=[("in", "out"), ("batch", "out", "in")])
    check_adapter(Bottleneck(3), axes=[("lookup", "out")])


@pytest.mark.parametrize("name", ["FrozenPair", "Picked", "Blocked", "OFT", "MiSS", "HiRA", "LoRAXS"])
def test_recipes_of_the_contract_s_layers_pass(name):
    check_adapter(RECIPES[name](), axes=[("in", "out")])


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_recipes_pass_with_every_layout(name):
    check_adapter(RECIPES[name]())


def test_roles_and_recipes_are_checked():
    with pytest.raises(ValueError, match=r"got the role 'inn', expected one of 'batch', 'in', 'out', 'lookup'"):
        check_adapter(Bottleneck(2), axes=[("inn", "out")])
    with pytest.raises(TypeError, match=r"takes a recipe, such as lora.LoRA\(8\); got BottleneckAdapter"):
        check_adapter(Bottleneck(2).create(jax.random.key(0), jnp.ones((4, 3)), ("in", "out")))


def broken(**methods):
    """A class like `BottleneckAdapter` with some methods replaced."""
    name = "Broken_" + "_".join(methods)
    fields = {"__annotations__": {}, "__module__": __name__, **methods}
    kind = "_".join(["test.user", *(method.__name__ for method in methods.values())])
    return lora.adapter(kind)(type(name, (BottleneckAdapter,), fields))


def trainable_everywhere(self):
    return jax.tree.map(lambda leaf: True, self)


def merge_without_scale(self, weight):
    change = jnp.einsum("...ri,...rs,...so->...io", self.a, self.middle, self.b)
    return (weight + change).astype(weight.dtype)


def merge_as_float32(self, weight):
    return weight.astype(jnp.float32) + jnp.einsum("...ri,...rs,...so->...io", self.a, self.middle, self.b) * self.scale


def pad_with_ones(self, rank):
    padded = super(BottleneckAdapter, self).pad_rank(rank)
    return dataclasses.replace(padded, a=padded.a.at[-1].set(1.0), b=padded.b.at[-1].set(1.0), middle=padded.middle + 1)


def pad_one_side_with_ones(self, rank):
    padded = super(BottleneckAdapter, self).pad_rank(rank)
    return dataclasses.replace(padded, a=padded.a.at[-1].set(1.0), middle=padded.middle.at[-1, -1].set(1.0))


def validate(self):
    if self.a.ndim < 2:
        raise ValueError("a has too few axes.")


def other_shape(self):
    return (self.a.shape[-1], self.b.shape[-1] + 1)


def forgets_the_weight(self, weight):
    return dataclasses.replace(self, b=self.b + 1)


def ignores_a(self, weight):
    form = BottleneckAdapter.factored(self, weight)
    return dataclasses.replace(form, factors=(Factor(jnp.ones_like(self.a), form.factors[0].labels), *form.factors[1:]))


BROKEN = {
    "a frozen leaf that trains": ({"trainable": trainable_everywhere}, r"trainable\(\) is True for middle.*frozen"),
    "a factored form unlike merge": ({"merge": merge_without_scale}, r"factored form: the factored form's outputs"),
    "a merge in another dtype": ({"merge": merge_as_float32}, r"merge\(\) of a bfloat16 weight is float32"),
    "padding that changes the product": ({"pad_rank": pad_with_ones}, r"padding: the weight merged with pad_rank"),
    "padding that has gradients": ({"pad_rank": pad_one_side_with_ones}, r"pad_rank\(\) adds entries to b that have"),
    "unflattening that validates": (
        {"__post_init__": validate},
        r"Broken___post_init__ validates its leaves when it is unflattened",
    ),
    "another shape": ({"shape": other_shape}, r"shape\(\) gives \(12, 9\)"),
    "an identity that changes": ({"identity_like": forgets_the_weight}, r"merged with identity_like\(\)"),
    "a leaf without a gradient": ({"factored": ignores_a}, r"a is trained, but has no gradient"),
}


@pytest.mark.parametrize("methods, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_fails(methods, message):
    with pytest.raises(AssertionError, match=message):
        check_adapter(Bottleneck(2, cls=broken(**methods)), axes=[("in", "out")])


@pytest.mark.parametrize(
    "recipe, axes, sizes",
    [
        (lora.LoRA(2), ("in", "out"), {"in": 5}),
        (lora.LoRA(2), ("in", "out"), {"in": 7, "out": 35}),
        (lora.LoRA(5), ("in", "out"), {"in": 5, "out": 12}),
        (lora.LoRA(8), ("out", "in"), {}),
        (lora.LoRA(5), ("batch", "in", "out"), {"batch": 5, "in": 5}),
        (lora.DoRA(2), ("lookup", "out"), {}),
        (lora.DoRA(2), ("in", "out"), {"in": 5, "out": 7}),
    ],
    ids=str,
)
def test_correct_adapters_pass_for_sizes_equal_to_ranks_and_for_lookups(recipe, axes, sizes):
    check_adapter(recipe, axes=[axes], sizes=sizes)


def test_an_embedding_s_gradient_counts_as_one_of_the_weight():
    gradient = jax.make_jaxpr(jax.grad(lambda w: (w[jnp.arange(5)] ** 2).sum()))(jnp.ones((12, 8)))
    assert weight_gradients(gradient, [((12, 8), ("lookup", "out"))]) == ["scatter-add -> (12, 8)"]


@dataclasses.dataclass(frozen=True)
class Changed(Bottleneck):
    """Changes the adapter that `Bottleneck` creates."""

    change: Callable = lambda node, key: node

    def create(self, key, weight, axes):
        return self.change(super().create(key, weight, axes), key)


@lora.adapter("test.user.Seeded")
class SeededAdapter(BottleneckAdapter):
    seed: int = static()


def seed_by_key(node, key):
    arrays = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
    return SeededAdapter(**arrays, seed=int(jax.random.randint(key, (), 0, 10**6)))


def another_rank_by_key(node, key):
    return node.pad_rank(3 + int(jax.random.randint(key, (), 0, 1000)))


def rename_rank(self, weight):
    return self.form(self.factor("a", rank="rnak"), self.factor("middle"), self.factor("scale"), self.factor("b"))


def list_of_factors(self, weight):
    return [self.factor("a"), self.factor("b")]


RECIPES_BROKEN = {
    "none": (Changed(2, change=lambda node, key: None), r"'w': Changed.*create\(\) returned None, expected an Adapter"),
    "a tuple": (Changed(2, change=lambda node, key: (node,)), r"create\(\) returned tuple, expected an Adapter"),
    "a structure by key": (Changed(2, change=seed_by_key), r"pytree: adapters of two keys have different structures"),
    "shapes by key": (Changed(2, change=another_rank_by_key), r"two keys give a different types: f32\[\d+,12\] and"),
    "a float": (
        Changed(2, change=lambda node, key: dataclasses.replace(node, scale=1.5)),
        r"scale is 1\.5: expected an array, such as jnp\.asarray\(1\.5\)",
    ),
    "a wrong label": (
        Bottleneck(2, cls=broken(factored=rename_rank)),
        r"Broken_factored\.factored\(\): only one factor has the label 'rnak'",
    ),
    "a list": (
        Bottleneck(2, cls=broken(factored=list_of_factors)),
        r"Broken_factored\.factored\(\) returned list; expected self\.form\(factor, …\) or None",
    ),
}


@pytest.mark.parametrize("recipe, message", RECIPES_BROKEN.values(), ids=RECIPES_BROKEN)
def test_a_broken_recipe_fails_by_name(recipe, message):
    with pytest.raises(AssertionError, match=message):
        check_adapter(recipe, axes=[("in", "out")])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"sizes": {"inn": 4}}, ValueError, r"sizes=\{'inn': 4\}: got the role 'inn', expected one of"),
        ({"sizes": {"in": 0}}, ValueError, r"the size of 'in' is 0; expected a positive integer"),
        ({"axes": []}, ValueError, r"axes=\[\]: expected the roles of one weight or more, such as \[\('in', 'out'\)\]"),
        ({"axes": ("in", "out")}, ValueError, r"axes=\('in', 'out'\): expected the roles of one weight or more"),
        ({"key": 0}, TypeError, r"check_adapter\(recipe, key=…\): expected a PRNG key.*got int"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        check_adapter(Bottleneck(2), **arguments)


def test_init_and_prepare_name_the_path_whose_recipe_returns_no_adapter():
    base, key, fn = {"w": jnp.ones((4, 3))}, jax.random.key(0), lambda base, x: x @ base["w"]
    spec = {"w": Changed(2, change=lambda node, key: None)}
    with pytest.raises(TypeError, match=r"'w': Changed.*: create\(\) returned None, expected an Adapter"):
        lora.init(key, base, spec, fn, jnp.ones((1, 4)))
    with pytest.raises(TypeError, match=r"'w': Changed.*: create\(\) returned None, expected an Adapter"):
        lora.prepare(key, base, spec, fn, [(jnp.ones((1, 4)),)])

    class Prepares(Bottleneck):
        def prepare(self, key, weight, axes):
            return self.create(key, weight, axes)

    with pytest.raises(TypeError, match=r"prepare\(\) returned BottleneckAdapter, expected the weight and an Adapter"):
        lora.prepare(key, base, {"w": Prepares(2)}, fn, [(jnp.ones((1, 4)),)])
