"""Prints what coming_from/qwix.md shows of tunix; tunix_output.txt is its output.

It needs google-tunix; the tests do not run it.
"""

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.sharding import AxisType
from tunix.sft import peft_trainer


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(16, 32, rngs=rngs)
        self.hidden = nnx.Linear(32, 32, rngs=rngs)
        self.out = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, tokens):
        return self.out(nnx.gelu(self.hidden(self.embedding(tokens))))


def loss(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


tokens = np.tile(np.arange(8, dtype=np.int32), (4, 1))
provider = qwix.LoraProvider(module_path="hidden", rank=4, alpha=8)
net = qwix.apply_lora_to_model(Net(nnx.Rngs(0)), provider, jnp.asarray(tokens), rngs=nnx.Rngs(1))
data = [peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))] * 50

config = peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=50)
trainer = peft_trainer.PeftTrainer(net, optax.adam(1e-2), config)
trainer = trainer.with_loss_fn(loss).with_gen_model_input_fn(lambda batch: {"tokens": batch.input_tokens})

versions = (f"{name} {importlib.metadata.version(name)}" for name in ("google-tunix", "qwix", "flax", "jax"))
print(", ".join(versions))
print(f"loss {float(loss(net, jnp.asarray(tokens))):.2f}")
with jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1]):
    trainer.train(data)
print(f"loss {float(loss(net, jnp.asarray(tokens))):.2f} after {trainer.train_steps} steps")
