"""Arguments that are refused: numbers of recipes, weights that are no floats, the algebra of deltas."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from lora_jax import merging
from lora_jax.initializers import EVA, CorDA, LoftQ, LoRAGA, PiSSA

WITH_ALPHA = (lora.LoRA, lora.DoRA, lora.LoRAFA, lora.AdaLoRA, lora.LoHa, lora.LoKr)
NOT_NUMBERS = ("16", True, 2j, [16], np.bool_(True))
NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 1e39, 10**400, np.float64(1e300))


@pytest.mark.parametrize("recipe", WITH_ALPHA)
def test_alpha(recipe):
    for alpha in (0, 0.0, -0.0, 1e-50, np.float32(0), *NOT_FINITE):
        with pytest.raises(ValueError, match=rf"{recipe.__name__}\(alpha=.*(zero|not a finite float32)"):
            recipe(2, alpha)
    for alpha in NOT_NUMBERS:
        with pytest.raises(TypeError, match=rf"{recipe.__name__}\(alpha=.*expected a number, got"):
            recipe(2, alpha=alpha)
    for alpha in (None, 1, 16.0, np.float32(8), np.int64(8), -4, jnp.asarray(3.0)):
        recipe(2, alpha)


def test_a_scale_that_float32_rounds_to_zero():
    with pytest.raises(ValueError, match=r"LoRA\(alpha=2e-38\): the scale .* is rounded to zero"):
        lora.LoRA(64, alpha=2e-38)


def test_a_traced_alpha_is_read_later():
    def scale(alpha):
        return (
            lora.LoRA(2, alpha=alpha, axes=("in", "out"))
            .create(jax.random.key(0), jnp.ones((4, 4)), ("in", "out"))
            .scale
        )

    assert jax.jit(scale)(6.0) == 3.0


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda x: lora.LoRA(2, dropout=x), "dropout"),
        (lambda x: lora.VeRA(2, dropout=x), "dropout"),
        (lambda x: lora.VeRA(2, d=x), "d"),
        (lambda x: lora.Offset(scale=x), "scale"),
        (lambda x: EVA(rho=x), "rho"),
        (lambda x: LoRAGA(gamma=x), "gamma"),
        (lambda x: merging.scale({}, x), "factor"),
        (lambda x: lora.combine([{}], [x]), "weight"),
        (lambda x: lora.combine([{}], [1.0], method="ties", density=x), "density"),
    ],
)
def test_numbers(make, named):
    for value in NOT_FINITE:
        with pytest.raises(ValueError, match=rf"{named}=.*not a finite float32"):
            make(value)
    for value in NOT_NUMBERS:
        with pytest.raises(TypeError, match=rf"{named}=.*expected a number"):
            make(value)


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda x: lora.LoRA(x), "rank"),
        (lambda x: lora.DoRA(x), "rank"),
        (lambda x: lora.VeRA(x), "rank"),
        (lambda x: lora.LoHa(x), "rank"),
        (lambda x: lora.LoKr(x), "rank"),
        (lambda x: lora.LoKr(2, factor=x), "factor"),
        (lambda x: lora.LoRA(2, blocks=x), "blocks"),
        (lambda x: LoftQ(lora.NF4(), iterations=x), "iterations"),
        (lambda x: PiSSA(niter=x), "niter"),
        (lambda x: lora.truncate({}, x), "rank"),
        (lambda x: lora.combine([{}], [1.0], method="svd", rank=x), "rank"),
        (lambda x: lora.stack([{}], members=x), "members"),
        (lambda x: lora.stack([{}], rank=x), "rank"),
    ],
)
def test_positive_integers(make, named):
    for value in (0, -1, 1.5, 2.0, True, "2"):
        with pytest.raises(ValueError, match=rf"{named}={re.escape(repr(value))}.*positive integer"):
            make(value)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: lora.LoRA(2, dropout=-0.1), r"dropout=-0\.1.*at least 0 and below 1"),
        (lambda: lora.LoRA(2, blocks=("q", "k")), "True or False for each block"),
        (lambda: lora.LoRA(2, init=["pissa"]), r"init=\['pissa'\]: expected one of"),
        (lambda: lora.LoRA(2, dtype="float31"), "dtype='float31'.*floating-point dtype"),
        (lambda: lora.Full(dtype=jnp.int32), r"Full\(dtype=int32\): expected a floating-point dtype"),
        (lambda: lora.Rows([1], dtype=jnp.int32), r"Rows\(dtype=int32\)"),
        (lambda: lora.Rows([1.5]), r"Rows\(ids=1\.5\): expected an integer"),
        (lambda: lora.Rows([True]), r"Rows\(ids=True\): expected an integer"),
        (lambda: lora.VeRA(2, d=0), "do nothing and never train"),
        (lambda: lora.Offset(scale=0), "do nothing and never train"),
        (lambda: lora.VeRA(2, seed=0.5), "seed=0.5"),
        (lambda: lora.DoRA(2, norm_gradient=1), r"norm_gradient=1\): expected True or False"),
        (lambda: CorDA(keep_knowledge="no"), r"keep_knowledge='no'\): expected True or False"),
    ],
)
def test_other_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rows_say_how_one_is_written():
    with pytest.raises(TypeError, match=r"Rows\(ids=5\).*Rows\(\[5\]\)"):
        lora.Rows(5)
    assert lora.Rows(np.array([3, 1])).ids == lora.Rows(jnp.array([3, 1])).ids == (3, 1)


def test_axes_that_are_no_sequence():
    for axes in ("in", 2):
        with pytest.raises(ValueError, match=r"'w': axes=.*expected a role for each axis"):
            lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=axes)})


X = jnp.ones((2, 4))


def fn(base, x):
    return x @ base["w"].astype(jnp.float32)


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool"])
@pytest.mark.parametrize("recipe", [lora.LoRA(2), lora.DoRA(2), lora.Full(), lora.Offset(), lora.IA3(), lora.VeRA(2)])
def test_integer_weights(dtype, recipe):
    whole, base = {"w": jnp.ones((4, 4), dtype)}, {"w": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match=rf"'w': {type(recipe).__name__} adapts floats.*dtype {dtype}"):
        lora.init(jax.random.key(0), whole, {"w": recipe}, fn, X)
    delta = lora.init(jax.random.key(0), base, {"w": recipe}, fn, X)
    for use in (
        lambda: lora.adapt(fn)(whole, delta, X),
        lambda: lora.route(lora.adapt(fn))(whole, lora.stack([delta]), [0, 0], X[:, None]),
        lambda: lora.merge(whole, delta),
        lambda: lora.unmerge(whole, delta, whole),
        lambda: lora.switch_task(whole, delta, delta, whole),
    ):
        with pytest.raises(ValueError, match=rf"'w', which has the dtype {dtype}"):
            use()


def test_integer_tables_and_moved_weights():
    table = {"t": jnp.ones((5, 4), jnp.int32)}
    with pytest.raises(ValueError, match=r"'t': Rows adapts floats.*int32"):
        lora.init(jax.random.key(0), table, {"t": lora.Rows([1])}, lambda base, ids: base["t"][ids], jnp.array([0]))
    whole = {"w": jnp.ones((4, 4), jnp.int32)}
    with pytest.raises(ValueError, match=r"'w': LoRA adapts floats.*int32"):
        lora.prepare(jax.random.key(0), whole, {"w": lora.LoRA(2, init="pissa")}, fn, [(X,)])


def test_quantized_weights_have_integer_leaves():
    base = {"w": jax.random.normal(jax.random.key(0), (64, 64))}
    small = lora.quantize(base, {"w": lora.Int8(axes=("in", "out"))})
    delta = lora.init(jax.random.key(0), small, {"w": lora.LoRA(2)}, lambda base, x: x @ base["w"], jnp.ones((1, 64)))
    assert lora.merge(small, delta)["w"].dtype == jnp.float32


def test_slots_of_a_stack():
    base = {"w": jnp.ones((4, 4))}
    delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(2, axes=("in", "out"))})
    stacked = lora.stack([delta, delta])
    for slot in (1.0, True, "1", None):
        with pytest.raises(ValueError, match=rf"swap\(slot={slot!r}\): expected an integer"):
            lora.swap(stacked, slot, delta)
    for slot in (1, np.int32(1), jnp.int32(1)):
        assert set(lora.swap(stacked, slot, {})) == {"w"}
    for slot in (-1, 2):
        with pytest.raises(ValueError, match="2 members, 0 to 1"):
            lora.swap(stacked, slot, delta)
    assert (lora.swap(stacked, np.int64(1), {})["w"].a[1] == 0).all()
