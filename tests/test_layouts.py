"""Layouts: what is derived from an adapter's declaration, and what is an error at its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax.adapters import Factor, layouts, terms
from lora_jax.adapters.lowrank import LoRAAdapter
from lora_jax.adapters.protocol import KINDS, Adapter, adapter, frozen, static, trained


@adapter("test.layouts.Chain", sizes=("middle",))
class ChainAdapter(Adapter):
    """ΔW = scale · a·R·b with a matrix between the factors."""

    a: jax.Array = trained("batch rank in")
    r: jax.Array = trained("batch rank rank")
    b: jax.Array = trained("batch rank out")
    scale: jax.Array = frozen("batch", leading=True)
    sketch: jax.Array = frozen("middle")
    axes: tuple[str, ...] = static()

    additive = True

    def factored(self, weight):
        del weight
        b = Factor(self.b * self.scale, tuple(x.replace("rank", "rank'") for x in self.labels("b")))
        return self.form(self.factor("a"), self.factor("r"), b)


def chain(getkey, rank, lead=(3,), axes=("batch", "out", "in")):
    shapes = {"a": (*lead, rank, 8), "r": (*lead, rank, rank), "b": (*lead, rank, 12)}
    arrays = {name: jax.random.normal(getkey(), shape) for name, shape in shapes.items()}
    return ChainAdapter(**arrays, scale=jnp.float32(0.5), sketch=jnp.ones(4), axes=axes)


def test_shape_rank_labels_and_forms_are_derived(getkey):
    node = chain(getkey, 2)
    assert node.shape() == (3, 12, 8) and node.rank == 2
    assert node.labels("r") == ("0", "rank", "rank'") and node.labels("sketch") == ("middle",)
    assert node.form().labels == (("0",), ("1",), ("2",))
    weight = jax.random.normal(getkey(), (3, 12, 8))
    change = 0.5 * np.einsum("lri,lrs,lso->loi", *(np.asarray(x, np.float64) for x in (node.a, node.r, node.b)))
    np.testing.assert_allclose(node.merge(weight), weight + change, rtol=1e-4, atol=1e-4)


def test_padding_enlarges_every_rank_axis_and_the_identity_is_zero(getkey):
    node, weight = chain(getkey, 2), jax.random.normal(getkey(), (3, 12, 8))
    padded = node.pad_rank(5)
    assert (padded.a.shape, padded.r.shape, padded.b.shape) == ((3, 5, 8), (3, 5, 5), (3, 5, 12)) and padded.rank == 5
    np.testing.assert_allclose(padded.merge(weight), node.merge(weight), rtol=1e-6, atol=1e-6)
    identity = node.identity_like(None)
    np.testing.assert_array_equal(identity.merge(weight), weight)
    assert float(identity.scale) == 0.5 and jax.tree.structure(identity) == jax.tree.structure(node)
    with pytest.raises(ValueError, match=r"size 2 cannot be padded to 1"):
        node.pad_rank(1)
    with pytest.raises(TypeError, match=r"FullAdapter has no rank"):
        lora.Full().create(getkey(), weight, ()).pad_rank(3)


def test_a_chain_with_a_middle_matrix_has_its_rank_not_the_square(getkey):
    node = chain(getkey, 4)
    pair = terms.as_low_rank(node)
    assert isinstance(pair, LoRAAdapter) and pair.rank == 4
    weight = jnp.zeros((3, 12, 8))
    np.testing.assert_allclose(pair.merge(weight), node.merge(weight), rtol=1e-4, atol=1e-4)
    assert lora.combine([{"w": node}], [1.0])["w"].rank == 4
    assert lora.truncate({"w": node}, 2)["w"].rank == 2
    np.testing.assert_allclose(lora.merging.norm(node), np.linalg.norm(node.merge(weight)), rtol=1e-5)
    values = lora.analysis.decompose({"w": node})["w"].values
    assert values.shape == (3, 4)
    np.testing.assert_allclose(values[0], np.linalg.svd(node.merge(weight)[0], compute_uv=False)[:4], rtol=1e-4)


def test_arrays_of_a_stack_have_the_shape_of_their_members_weight(getkey):
    one, two = (lora.LoRA(2).create(getkey(), jnp.ones((3, 12, 8)), ("batch", "out", "in")) for _ in range(2))
    assert jax.tree.map(lambda *leaves: jnp.stack(leaves), one, two).shape() == (3, 12, 8)


@pytest.mark.parametrize(
    "layout, nearest", [("bacth rank in", "batch"), ("batch rnak in", "rank"), ("batch rank inn", "in")]
)
def test_an_unknown_word_is_an_error_at_the_definition(layout, nearest):
    with pytest.raises(ValueError, match=rf"Typo\.a: the layout '{layout}' has the unknown word.*'{nearest}'.*sizes="):

        @adapter("test.layouts.Typo")
        class Typo(Adapter):
            a: jax.Array = trained(layout)
            axes: tuple[str, ...] = static()

    assert "test.layouts.Typo" not in KINDS


def test_a_role_occurs_once_in_a_layout():
    with pytest.raises(ValueError, match=r"'batch in in' has 'in' 2 times; only sizes may repeat"):

        @adapter("test.layouts.Twice")
        class Twice(Adapter):
            a: jax.Array = trained("batch in in")
            axes: tuple[str, ...] = static()


def test_a_kind_that_exists_is_an_error_at_the_definition():
    with pytest.raises(ValueError, match=r"adapter\('LoRA'\) on .*Mine: lora_jax.adapters.lowrank.LoRAAdapter has"):

        @adapter("LoRA")
        class Mine(Adapter):
            a: jax.Array = trained("weight")
            axes: tuple[str, ...] = static()

    assert KINDS["LoRA"] is LoRAAdapter


def test_the_same_definition_executed_again_replaces_the_class():
    source = """
import lora_jax as lora
@lora.adapter("test.layouts.Cell")
class CellAdapter(lora.Adapter):
    value: object = lora.adapters.trained("weight")
    axes: tuple = lora.adapters.static()
"""
    scope = {"__name__": "a_notebook"}
    exec(source, scope)
    first = scope["CellAdapter"]
    exec(source, scope)
    assert KINDS.pop("test.layouts.Cell") is scope["CellAdapter"] is not first


def test_a_shape_that_layouts_do_not_determine_is_asked_for():
    @adapter("test.layouts.Open")
    class OpenAdapter(Adapter):
        b: jax.Array = trained("rank out")
        axes: tuple[str, ...] = static()

    with pytest.raises(TypeError, match=r"OpenAdapter do not determine the weight's shape: define shape\(\)"):
        OpenAdapter(b=jnp.ones((2, 3)), axes=("in", "out")).shape()
    del KINDS["test.layouts.Open"]


def test_families_derive_instead_of_repeating():
    """No family defines what its layouts state, but for kinds whose identity depends on the weight or is not zero."""
    classes = [cls for cls in KINDS.values() if cls.__module__.startswith("lora_jax.")]
    assert len(classes) > 10
    for cls in classes:
        assert not {"shape", "rank", "pad_rank", "labels"} & set(vars(cls)), cls
        assert "identity_like" not in vars(cls) or not cls.additive, cls
        assert all(field.metadata["layout"] for field in dataclasses.fields(cls) if "trained" in field.metadata), cls


def test_former_names_state_the_new_ones():
    with pytest.raises(AttributeError, match=r"LoRAAdapter.layout has been renamed to labels"):
        _ = LoRAAdapter.layout
    assert layouts.WORDS[:3] == ("batch", "in", "out")


def define(layout, kind="test.layouts.Defined", *, sizes=(), bases=(Adapter,), without=(), **fields):
    """Defines an adapter class with one array of this layout and other static fields."""
    annotations = {
        "a": jax.Array,
        "axes": tuple[str, ...],
        **{name: annotation for name, (annotation, _) in fields.items()},
    }
    values = {"a": trained(layout), "axes": static(), **{name: value for name, (_, value) in fields.items()}}
    annotations = {name: value for name, value in annotations.items() if name not in without}
    namespace = {"__annotations__": annotations, "__module__": __name__}
    namespace |= {name: value for name, value in values.items() if name not in without and value is not None}
    return adapter(kind, sizes=sizes)(type("Defined", bases, namespace))


SPLIT = (tuple[int, ...], static())
NOT_LAYOUTS = {
    "a field that holds no role": (
        ("rank axes", {}),
        r"Defined\.a: .* unknown word 'axes'.*static fields that hold a role",
    ),
    "its opposite": (("rank ~axes", {}), r"unknown word '~axes'"),
    "a number's field": (("rank count", {"count": (int, static())}), r"unknown word 'count'"),
    "other choices": (("rank how", {"how": (str, static(choices=("fast", "slow")))}), r"unknown word 'how'"),
    "parts without split": (("rank slow-in", {}), r"'slow-in', but Defined has no static field `split`"),
    "a scalar with axes": (("scalar in", {}), r"'scalar in' has other words beside 'scalar'"),
    "a weight with axes": (("weight in", {}), r"'weight in' has other words beside 'weight'"),
    "three ranks": (("rank rank rank", {}), r"has 'rank' 3 times; .*the rank may be there twice"),
    "a size that is a word": (("batch in", {"sizes": ("in",)}), r"sizes=\('in',\)\): 'in' has a meaning in layouts"),
    "a size with a space": (("in", {"sizes": ("two words",)}), r"'two words' is not an identifier"),
    "a size that is a field": (
        ("in", {"sizes": ("side",), "side": (str, static(choices=("in", "out")))}),
        r"'side' has a meaning in layouts",
    ),
    "a size that no layout has": (
        ("middle in", {"sizes": ("middle", "extra")}),
        r"sizes=…\): no layout of Defined has the size 'extra'",
    ),
    "batch axes after others": (("rank batch in", {}), r"'rank batch in' has 'batch' after another word"),
    "a static field's layout": (("in", {"count": (int, static("inn"))}), r"Defined\.count: .* unknown word 'inn'"),
}


@pytest.mark.parametrize("definition, message", NOT_LAYOUTS.values(), ids=NOT_LAYOUTS)
def test_a_layout_whose_words_do_not_fit_is_an_error_at_the_definition(definition, message):
    layout, options = definition
    with pytest.raises(ValueError, match=message):
        define(layout, **options)
    assert "test.layouts.Defined" not in KINDS


def test_a_layout_is_a_string():
    with pytest.raises(TypeError, match=r"Defined\.a: a layout is a string of words.*got 3"):
        define(3)


def test_words_that_fit_are_accepted():
    for layout, options in (
        ("rank ~side", {"side": (str, static(choices=("in", "out")))}),
        ("rank side", {"side": ("str", static())}),
        ("slow-in rank rank", {"split": SPLIT}),
        ("own own own", {"sizes": ("own",)}),
    ):
        define(layout, **options)
        del KINDS["test.layouts.Defined"]


NOT_ADAPTERS = {
    "an undeclared field": (
        {"alpha": (float, None)},
        r"Defined\.alpha: declare the field by trained\(layout\), frozen",
    ),
    "a plain default": ({"alpha": (float, 1.0)}, r"Defined\.alpha: declare the field by trained"),
    "no axes": ({"without": ("axes",)}, r"Defined has no field for the roles .* axes: tuple\[str, \.\.\.\] = static"),
    "another class": ({"bases": (object,)}, r"expected a subclass of lora_jax\.Adapter"),
    "sizes as a string": ({"sizes": "foo"}, r"sizes='foo'\): expected a tuple of words"),
    "an empty kind": ({"kind": ""}, r"adapter\(''\): expected a name for checkpoints"),
    "a number": ({"kind": 3}, r"adapter\(3\): expected a name for checkpoints"),
}


@pytest.mark.parametrize("options, message", NOT_ADAPTERS.values(), ids=NOT_ADAPTERS)
def test_a_class_that_is_not_an_adapter_is_an_error_at_the_definition(options, message):
    with pytest.raises(TypeError, match=message):
        define("rank in", **options)
    assert not {"", 3, "test.layouts.Defined"} & set(KINDS)


def test_an_inherited_field_must_be_declared():
    base = dataclasses.make_dataclass("Base", [("alpha", float)], frozen=True)
    with pytest.raises(TypeError, match=r"Defined\.alpha: declare the field"):
        define("rank in", bases=(base, Adapter))


def test_the_decorator_needs_a_kind():
    with pytest.raises(TypeError, match=r'adapter\(Bare\): write @adapter\("kind"\)'):

        @adapter
        class Bare(Adapter):
            axes: tuple[str, ...] = static()
