"""The layers of PEFT and loralib, stored as fixtures: same outputs and gradients here.

``fixtures/adapters/make_layers.py`` says what the files hold and how they were made.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import lora_jax as lora

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "adapters"
STRIDE, PADDING, DILATION = (2, 1), ((1, 1), (2, 2)), (1, 2)


def convolve(x, kernel, layout, dilation):
    return jax.lax.conv_general_dilated(x, kernel, STRIDE, PADDING, rhs_dilation=dilation, dimension_numbers=layout)


def linen(module):
    return lambda base, x: module.apply({"params": base}, x)


@dataclasses.dataclass(frozen=True)
class Case:
    """How one use of a weight in JAX maps onto the torch layer in `file`.

    `weight`, `a`, `b`, `x` and `y` bring a torch array into this library's orientation, and `to_a`, `to_b`
    gradients back into torch's.
    """

    file: str
    fn: object
    name: str = "kernel"
    weight: object = lambda w: w
    a: object = lambda a: a
    b: object = lambda b: b.T
    x: object = lambda x: x
    y: object = lambda y: y
    blocks: object = 1


def dense(base, x):
    return x @ base["kernel"] + base["bias"][None, None]


def torch_dense(base, x):
    return x @ base["kernel"].T + base["bias"][None, None]


def lookup(base, x):
    return jnp.take(base["kernel"], x, axis=0)


def conv_case(file, dilation):
    """Flax's layout: channels last, kernel (*k, in, out)."""
    module = nn.Conv(5, (3, 2), strides=STRIDE, padding=PADDING, kernel_dilation=dilation)

    def channels_last(x):
        return x.transpose(0, 2, 3, 1)

    return Case(
        file,
        linen(module),
        weight=lambda w: w.transpose(2, 3, 1, 0),
        a=lambda a: a.transpose(0, 2, 3, 1),
        b=lambda b: b[:, :, 0, 0].T,
        x=channels_last,
        y=channels_last,
    )


def torch_conv_case(file, dilation):
    """torch's layout: channels first, kernel (out, in, *k)."""

    def fn(base, x):
        return convolve(x, base["kernel"], ("NCHW", "OIHW", "NCHW"), dilation) + base["bias"][None, :, None, None]

    return Case(file, fn, b=lambda b: b[:, :, 0, 0].T)


def merged_linear_factors(enabled=2):
    """(enabled·r, in) and (enabled·out/n, r), one block after the other."""
    return {
        "a": lambda a: a.reshape(enabled, -1, a.shape[-1]),
        "b": lambda b: b.reshape(enabled, -1, b.shape[-1]).swapaxes(1, 2),
        "blocks": (True, False, True),
    }


CASES = {
    "peft Linear, x @ w.T": Case("peft_linear", torch_dense),
    "peft Linear, nn.Dense": Case("peft_linear", linen(nn.Dense(5)), weight=np.transpose),
    "peft Conv1D": Case("peft_conv1d_hf", dense),
    "peft Embedding, take": Case("peft_embedding", lookup),
    "peft Embedding, nn.Embed": Case("peft_embedding", linen(nn.Embed(11, 6)), name="embedding"),
    "peft Conv2d, nn.Conv": conv_case("peft_conv2d", (1, 1)),
    "peft Conv2d, torch layout": torch_conv_case("peft_conv2d", (1, 1)),
    "peft Conv2d dilated, nn.Conv": conv_case("peft_conv2d_dilated", DILATION),
    "peft Conv2d dilated, torch layout": torch_conv_case("peft_conv2d_dilated", DILATION),
    "loralib Linear, x @ w.T": Case("loralib_linear", torch_dense),
    "loralib Linear, nn.Dense": Case("loralib_linear", linen(nn.Dense(5)), weight=np.transpose),
    "loralib Embedding, nn.Embed": Case("loralib_embedding", linen(nn.Embed(11, 6)), name="embedding"),
    "loralib MergedLinear, x @ w.T": Case("loralib_merged_linear", torch_dense, **merged_linear_factors()),
    "loralib MergedLinear, nn.Dense": Case(
        "loralib_merged_linear", linen(nn.Dense(12)), weight=np.transpose, **merged_linear_factors()
    ),
}


@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_of_the_reference(case, merged, getkey):
    with np.load(FIXTURES / f"{case.file}.npz") as file:
        stored = dict(file)
    integer = stored["x"].dtype == np.int64
    x = jnp.asarray(case.x(stored["x"]), dtype=jnp.int32 if integer else jnp.float32)
    base = {case.name: jnp.asarray(case.weight(stored["weight"]))}
    if "bias" in stored:
        base["bias"] = jnp.asarray(stored["bias"])
    rank, alpha = int(stored["r"]), float(stored["alpha"])
    assert alpha != rank

    spec = {rf"{case.name}$": lora.LoRA(rank=rank, alpha=alpha, blocks=case.blocks)}
    delta = lora.init(getkey(), base, spec, case.fn, x)
    (path,) = delta
    adapter = delta[path]
    np.testing.assert_allclose(adapter.scale, stored["scale"], rtol=1e-6)
    a, b = case.a(stored["lora_a"]), case.b(stored["lora_b"])
    assert (adapter.a.shape, adapter.b.shape) == (a.shape, b.shape)
    delta = {path: dataclasses.replace(adapter, a=jnp.asarray(a), b=jnp.asarray(b))}
    cotangent = jnp.asarray(case.y(stored["cotangent"]))

    def loss(train, x):
        whole = lora.join(train, frozen)
        y = case.fn(lora.merge(base, whole), x) if merged else lora.adapt(case.fn)(base, whole, x)
        return jnp.sum(y * cotangent), y

    train, frozen = lora.partition(delta)
    argnums = 0 if integer else (0, 1)
    (_, y), gradients = jax.value_and_grad(loss, argnums, has_aux=True)(train, x)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(y, case.y(stored["y"]), **close)
    grad_delta = gradients if integer else gradients[0]
    np.testing.assert_allclose(grad_delta[path].a, case.a(stored["grad_a"]), **close)
    np.testing.assert_allclose(grad_delta[path].b, case.b(stored["grad_b"]), **close)
    if not integer:
        np.testing.assert_allclose(gradients[1], case.x(stored["grad_x"]), **close)
