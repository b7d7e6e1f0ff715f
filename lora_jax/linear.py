"""all_linear: the key of a spec that matches the weights of all linear layers."""

from collections.abc import Mapping, Sequence

from lora_jax import axes as axis_roles
from lora_jax import paths
from lora_jax.adapters.protocol import IN, OUT, Recipe
from lora_jax.quantization.rules import HEAD
from lora_jax.transform.interpreter import Use

_PRODUCTS = ("dot_general", "ragged_dot_general")


class AllLinear:
    """The weights of all linear layers, as PEFT's `target_modules="all-linear"`; used as `lora.all_linear`.

    `lora.all_linear(recipe)` is a spec. In a larger spec `lora.all_linear` is a key beside path patterns; the first
    match wins, so exceptions come before it.

    A linear layer is a weight that the traced function multiplies with an input: in unrolled or scanned layers, and
    experts. Embeddings (and heads that share their weight), convolutions, norms and biases are not. The output head
    is left out, as in PEFT, unless nothing else is linear; its path identifies it: `lm_head`, `unembed…`, or a top
    level `output`, `head`, `classifier`, `score` or `logits`. A pattern that names it adapts it.

    Args:
      recipe: For example `lora.LoRA(8)`.

    Returns:
      `{lora.all_linear: recipe}`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda p, ids: jnp.tanh(p["embed"][ids] @ p["up"] + p["bias"]) @ p["down"] @ p["head"]
      >>> base = dict(embed=jnp.ones((9, 4)), up=jnp.ones((4, 8)), bias=jnp.ones(8), down=jnp.ones((8, 4)),
      ...             head=jnp.ones((4, 2)))
      >>> list(lora.init(jax.random.key(0), base, lora.all_linear(lora.LoRA(2)), fn, jnp.arange(3)))
      ['down', 'up']
      >>> spec = {"head": lora.Full(), "down": None, lora.all_linear: lora.LoRA(2)}
      >>> list(lora.init(jax.random.key(0), base, spec, fn, jnp.arange(3)))
      ['head', 'up']
    """

    def __call__(self, recipe: Recipe) -> dict["AllLinear", Recipe]:
        if not isinstance(recipe, Recipe):
            raise TypeError(f"all_linear(recipe): a recipe, such as lora.LoRA(8); got {type(recipe).__name__}.")
        return {self: recipe}

    def __repr__(self) -> str:
        return "all_linear"


all_linear = AllLinear()


def linear_weights(uses: Mapping[str, Sequence[Use]], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """The paths that :data:`all_linear` matches.

    Args:
      uses: Per path, from :func:`lora_jax.axes.uses_of`.
      shapes: Of the weights.
    """
    linear = [path for path in shapes if _is_linear(uses[path], shapes[path])]
    return [path for path in linear if not paths.search(HEAD, path)] or linear


def _is_linear(uses: Sequence[Use], shape: Sequence[int]) -> bool:
    if not axis_roles.roles_by_use(uses, len(shape)) or not any(use.operation in _PRODUCTS for use in uses):
        return False
    roles = axis_roles.roles_by_use(uses, len(shape))
    return all({IN, OUT} <= set(of_use) for of_use in roles) and not any(
        use.operation == "conv_general_dilated" for use in uses
    )
