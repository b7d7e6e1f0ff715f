"""Adapters trained here from PEFT's own initial values follow the losses that PEFT recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lora
from tests.peft.cases import TRAINING, read


def mean_squares(y, target):
    return jnp.square(y - target).mean()


def cross_entropy(y, target):
    return -jnp.take_along_axis(jax.nn.log_softmax(y), target[:, None], axis=1).mean()


@pytest.mark.parametrize("name", TRAINING)
def test_the_loss_curve_of_peft(name, lenient):
    case = TRAINING[name]
    stored = read(case.directory / "training.safetensors")
    loss_of = cross_entropy if stored["target"].dtype == np.int64 else mean_squares
    target = jnp.asarray(stored["target"], jnp.int32 if stored["target"].dtype == np.int64 else jnp.float32)
    base, inputs = case.base, case.inputs
    adapted = lora.adapt(case.fn)
    # torch's AdamW: eps outside the root, decay by lr·weight_decay·p, of the value before the step.
    tx = optax.adamw(float(stored["lr"]), b1=0.9, b2=0.999, eps=1e-8, weight_decay=float(stored["weight_decay"]))

    @jax.jit
    def step(base, train, frozen, state, inputs, target):
        def loss(train):
            return loss_of(adapted(base, lora.join(train, frozen), *inputs), target)

        value, gradients = jax.value_and_grad(loss)(train)
        updates, state = tx.update(gradients, state, train)
        return optax.apply_updates(train, updates), state, value

    train, frozen = lora.partition(lora.peft.load(case.adapter, base, case.names))
    state, losses = tx.init(train), []
    for _ in stored["loss"]:
        train, state, value = step(base, train, frozen, state, inputs, target)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    np.testing.assert_allclose(losses, stored["loss"], rtol=1e-4)
