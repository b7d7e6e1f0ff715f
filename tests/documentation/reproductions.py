"""What leads to each message of the page on troubleshooting, by the heading that it has there."""

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

import lora_jax as lora
from experiments import run as studies
from lora_jax.__main__ import main as lora_jax_main
from lora_jax.peft import LINEAR, Names, Weight

KEY, X = jax.random.key(0), jnp.ones((2, 64))
BASE = {"hidden": {"kernel": jnp.ones((64, 8))}, "unused": {"kernel": jnp.ones((8, 8))}}
NAMES = Names((Weight("hidden/kernel", "hidden.weight", LINEAR),))
TX = optax.adam(1e-3)


def fn(params, x):
    return jnp.tanh(x @ params["hidden"]["kernel"])


def delta(recipe=None, fn=fn, spec=None):
    spec = spec or {"hidden/kernel": recipe or lora.LoRA(2)}
    return lora.init(KEY, BASE, spec, fn, X)


def loss(base, delta, batch, key):
    return jnp.mean(lora.adapt(fn)(base, delta, batch) ** 2)


def state(recipe=None, tx=TX):
    return lora.TrainState.create(BASE, delta(recipe), tx, KEY)


def saved(folder: Path) -> Path:
    lora.save(folder / "adapter", delta())
    return folder / "adapter"


def prepared():
    return lora.prepare(KEY, BASE, {"hidden/kernel": lora.LoRA(2, init="pissa", alpha=2)}, fn, [(X,)])


def donated():
    first, step = state(), lora.train_step(loss, TX)
    step(first, X)
    return step(first, X)


def changing_module():
    apply_fn, base = lora.nnx.functional(nnx.BatchNorm(64, rngs=nnx.Rngs(0)))
    return apply_fn(base, X)


def other_adapter(folder: Path):
    lora.peft.save(folder / "peft", delta(), NAMES)
    base = {"hidden": {"kernel": jnp.ones((64, 9))}}
    return lora.peft.load(folder / "peft", base, NAMES)


def without_dropout_key():
    return lora.train_step(loss, TX)(state(lora.LoRA(2, dropout=0.1)), X)


def printed(main: Callable, *words: str) -> str:
    """What a command prints where it is wrong."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
        status = main(list(words))
    assert status == 2, status
    return output.getvalue()


def malformed(folder: Path, text: str) -> str:
    """The message of a study that reads a file with this text."""
    (folder / "chat.jsonl").write_text(text)
    return printed(studies.main, "sft", "--data", str(folder / "chat.jsonl"), "--out", str(folder / "run"))


def occupied(folder: Path) -> str:
    lora.peft.save(folder / "peft", delta(), NAMES)
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    return printed(lora_jax_main, "convert", str(folder / "peft"), str(folder / "mine"), "--target", "vllm")


REPRODUCTIONS: dict[str, Callable[[Path], object]] = {
    "A pattern matches nothing": lambda _: delta(spec={"hiden/kernel": lora.LoRA(2)}),
    "A pattern is shadowed": lambda _: delta(spec={"kernel": lora.LoRA(2), "hidden": lora.LoRA(4)}),
    "all-linear in quotes": lambda _: delta(spec={"all-linear": lora.LoRA(2)}),
    "A recipe in place of a spec": lambda _: lora.init(KEY, BASE, lora.LoRA(2), fn, X),  # pyrefly: ignore
    "The rank is too large": lambda _: delta(lora.LoRA(16)),
    "The function never uses a weight": lambda _: delta(spec={"kernel": lora.LoRA(2)}),
    "No axis is contracted": lambda _: lora.init(
        KEY, {"bias": jnp.ones(64)}, {"bias": lora.LoRA(1)}, lambda params, x: x + params["bias"], X
    ),
    "A seed in place of a key": lambda _: lora.init(0, BASE, {"hidden": lora.LoRA(2)}, fn, X),  # pyrefly: ignore
    "A Linen module in place of a function": lambda _: lora.adapt(linen.Dense(2)),
    "An NNX module in place of a function": lambda _: lora.init(
        KEY, BASE, {"hidden": lora.LoRA(2)}, nnx.Linear(64, 8, rngs=nnx.Rngs(0)), X
    ),
    "An adapted function in place of the function": lambda _: lora.explain(lora.adapt(fn), BASE, delta(), X),
    "Base and delta are exchanged": lambda _: lora.adapt(fn)(delta(), BASE, X),
    "One half of a delta": lambda _: lora.merge(BASE, lora.partition(delta())[0]),
    "A stack in place of a delta": lambda _: lora.merge(BASE, lora.stack([delta()] * 3)),
    "An adapter for another base": lambda _: lora.adapt(fn)({"hidden": {"kernel": jnp.ones((64, 9))}}, delta(), X),
    "A saved adapter does not fit": lambda folder: lora.load(saved(folder), {"hidden": {"kernel": jnp.ones((32, 8))}}),
    "PiSSA and init": lambda _: delta(lora.LoRA(2, init="pissa")),
    "The published base with an adapter of prepare": lambda _: lora.merge(BASE, prepared()[1]),
    "A PEFT adapter does not fit": other_adapter,
    "A reader cannot represent an adapter": lambda folder: lora.peft.save(
        folder / "vllm", delta(lora.DoRA(2)), NAMES, target="vllm"
    ),
    "The state was donated": lambda _: donated(),
    "An optimizer that a step cannot call": lambda _: state(tx=optax.lbfgs()),
    "Dropout without a key": lambda _: without_dropout_key(),
    "A module changes its variables": lambda _: changing_module(),
    "Unmerging what was replaced": lambda _: lora.unmerge(BASE, delta(lora.Full())),
    "Merging a bottleneck": lambda _: lora.merge(BASE, delta(lora.Bottleneck(2))),
    "An unknown study": lambda _: printed(studies.main, "stf"),
    "A malformed record": lambda folder: malformed(folder, '{"messages": [{"role": "user", "content": "Hi"}]}\n'),
    "An output exists": occupied,
}


def message(heading: str, folder: Path) -> str:
    """Returns what a user sees: 'ValueError: …', 'UserWarning: …', or what a command prints."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = REPRODUCTIONS[heading](folder)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if isinstance(result, str):
        return result
    (warning,) = caught
    return f"{warning.category.__name__}: {warning.message}"
