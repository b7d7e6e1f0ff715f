"""The variants of a training step that the step benchmark compares.

A variant is a function of a `Problem` that returns `Parts`: a loss of (train, rest, batch) and the two trees. It is
called again for every compilation, so that no trace is reused. All variants with adapters on every linear layer have
the same factors and the same loss.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen

import lora_jax as lora
from experiments.benchmarks import gpt2_step_model as model

FIRST = "layers/0/attn/qkv"
Factors = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The input of every variant."""

    shape: model.Shape
    rank: int
    alpha: float
    base: model.Params
    factors: Factors
    """Random factors by layer, rank-major: a [rank, in], b [rank, out]."""
    tokens: jax.Array
    """[batch, length + 1]"""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Parts:
    """A loss and its arguments; it is differentiated with respect to `train`."""

    loss: Callable[[Any, Any, jax.Array], jax.Array]
    train: Any
    rest: Any


def make_problem(shape: model.Shape, *, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> Problem:
    """Returns a problem with random parameters, factors and tokens."""
    base_key, factor_key, token_key = jax.random.split(jax.random.key(seed), 3)
    factors = {}
    for path, (n_in, n_out) in shape.linears().items():
        factor_key, a_key, b_key = jax.random.split(factor_key, 3)
        a = 0.02 * jax.random.normal(a_key, (rank, n_in))
        factors[path] = (a, 0.02 * jax.random.normal(b_key, (rank, n_out)))
    tokens = jax.random.randint(token_key, (shape.batch, shape.length + 1), 0, shape.vocabulary)
    return Problem(shape, rank, alpha, model.make_params(base_key, shape), factors, tokens)


def language_loss(logits: Callable[[jax.Array], jax.Array], batch: jax.Array) -> jax.Array:
    return model.cross_entropy(logits(batch[:, :-1]), batch[:, 1:])


def by_hand(problem: Problem, factors: Factors, layer: Callable[..., jax.Array]) -> Parts:
    """Returns the model with `layer(params, x, a, b)` instead of each linear layer that has factors."""

    def loss(train: Factors, base: model.Params, batch: jax.Array) -> jax.Array:
        def linear(path: str, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            if path not in train:
                return model.dense(path, params, x)
            return layer(params, x, *train[path])

        predict = functools.partial(model.logits, base, shape=problem.shape, linear=linear)
        return language_loss(predict, batch)

    return Parts(loss, factors, problem.base)


def library(problem: Problem, layers: list[str] | None = None, recipe: Callable[..., lora.LoRA] = lora.LoRA) -> Parts:
    """lora_jax on the plain model, with adapters on `layers` (all by default)."""
    logits = functools.partial(model.logits, shape=problem.shape)
    pattern = "|".join(problem.factors if layers is None else layers)
    spec = {f"^({pattern})/kernel$": recipe(rank=problem.rank, alpha=problem.alpha)}
    delta = lora.init(jax.random.key(0), problem.base, spec, logits, problem.tokens[:, :-1])
    for path, adapter in delta.items():
        a, b = problem.factors[path.removesuffix("/kernel")]
        delta[path] = dataclasses.replace(cast(Any, adapter), a=a, b=b)
    train, frozen = lora.partition(delta)
    adapted = lora.adapt(logits)

    def loss(train: Any, rest: Any, batch: jax.Array) -> jax.Array:
        base, frozen = rest
        return language_loss(functools.partial(adapted, base, lora.join(train, frozen)), batch)

    return Parts(loss, train, (problem.base, frozen))


def flattened(scale: float, params: dict[str, jax.Array], x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """A linear layer with rank-major factors, whose products have shape [tokens, features]."""
    y = x @ params["kernel"] + params["bias"]
    update = (x.reshape(-1, x.shape[-1]) @ a.T) @ b
    return y + scale * update.reshape(y.shape)


def flat_by_hand(problem: Problem) -> Parts:
    """The fastest known form, written by hand, on every linear layer."""
    return by_hand(problem, problem.factors, functools.partial(flattened, problem.scale))


def bound(problem: Problem) -> Parts:
    """Forward and activation gradients only: one adapter, on the first linear layer."""
    first = {FIRST: problem.factors[FIRST]}
    return by_hand(problem, first, functools.partial(flattened, problem.scale))


def hand_written(problem: Problem) -> Parts:
    """The usual form: x·W + s·(x·A)·B on [batch, sequence, features], with A stored as (in, rank)."""

    def layer(params, x, a, b):
        return x @ params["kernel"] + params["bias"] + problem.scale * ((x @ a) @ b)

    return by_hand(problem, {path: (a.T, b) for path, (a, b) in problem.factors.items()}, layer)


def formed(problem: Problem) -> Parts:
    """The step computes W + s·A·B."""

    def layer(params, x, a, b):
        return x @ (params["kernel"] + problem.scale * (a @ b)) + params["bias"]

    return by_hand(problem, {path: (a.T, b) for path, (a, b) in problem.factors.items()}, layer)


def full(problem: Problem) -> Parts:
    """Full fine-tuning of the merged weights."""
    params = jax.tree.map(jnp.copy, problem.base)
    for path, (a, b) in problem.factors.items():
        _, layer, part, name = path.split("/")
        holder = params["layers"][layer][part][name]
        holder["kernel"] = holder["kernel"] + problem.scale * (a.T @ b)

    def loss(train: model.Params, rest: None, batch: jax.Array) -> jax.Array:
        del rest
        return language_loss(functools.partial(model.logits, train, shape=problem.shape), batch)

    return Parts(loss, params, None)


class LinenGPT2(linen.Module):
    """The same model with `flax.linen.Dense` layers, which qwix can intercept."""

    shape: model.Shape

    @linen.compact
    def __call__(self, rest: model.Params, tokens: jax.Array) -> jax.Array:
        sizes = self.shape.linears()

        def linear(path: str, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
            del params  # Linen has its own.
            return linen.Dense(sizes[path][1], name=path.replace("/", "_"))(x)

        return model.logits(rest, tokens, self.shape, linear)


def qwix(problem: Problem) -> Parts:
    """qwix's LoRA on the same model in Linen."""
    import qwix as qwix_lora  # optional: the benchmarks group installs it

    rule = qwix_lora.LoraRule(module_path="layers_.*", rank=problem.rank, alpha=problem.alpha)
    wrapped: Any = qwix_lora.apply_lora_to_model(LinenGPT2(problem.shape), qwix_lora.LoraProvider([rule]))
    rest = dict(problem.base, layers={})
    train, frozen = {}, {}
    for i, block in problem.base["layers"].items():
        rest["layers"][i] = {"norm1": block["norm1"], "norm2": block["norm2"], "attn": {}, "mlp": {}}
    for path, (a, b) in problem.factors.items():
        _, layer, part, name = path.split("/")
        rest["layers"][layer][part][name] = {}
        flat = path.replace("/", "_")
        frozen[flat] = problem.base["layers"][layer][part][name]
        train[flat] = {"kernel_lora_a": a.T, "kernel_lora_b": b}

    def loss(train: Any, rest: Any, batch: jax.Array) -> jax.Array:
        frozen, rest = rest
        params = {name: {**frozen[name], **train[name]} for name in frozen}
        return language_loss(functools.partial(wrapped.apply, {"params": params}, rest), batch)

    return Parts(loss, train, (frozen, rest))


def available() -> dict[str, Callable[[Problem], Parts]]:
    """Returns the variants that can run on this machine, by their names in the table."""
    variants: dict[str, Callable[[Problem], Parts]] = {
        "lora_jax": library,
        "bound": bound,
        "flattened by hand": flat_by_hand,
        "hand-written": hand_written,
        "W+AB formed": formed,
        "full fine-tuning": full,
        "DoRA": functools.partial(library, recipe=lora.DoRA),
    }
    if importlib.util.find_spec("qwix") is not None:
        variants["qwix"] = qwix
    return variants
