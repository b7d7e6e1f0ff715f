"""adapt(): a function of parameters becomes a function of base and delta."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.adapters.fingerprints import check_base
from lora_jax.functions import check_function, mark_adapted
from lora_jax.transform import signatures
from lora_jax.transform.call import Arguments, Call, check_delta
from lora_jax.transform.evaluation import Evaluation, Leaves
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.programs import Reader, programs_of


def adapt(fn: Callable, *, flatten: bool = True) -> Callable:
    r"""Makes a function of parameters a function of frozen parameters and adapters.

    Where a weight is multiplied with an input, :math:`x W + s\,(x A^\top) B` is computed; the merged
    weight and its gradient are never formed. The function is traced, not rewritten: Linen, NNX,
    Equinox, Haiku and plain functions are all the same to it. :func:`lora_jax.explain` tells how each
    weight is treated.

    Args:
      fn: `fn(base, *args, **kwargs)`, anything that `jax.jit` can trace. Array leaves of its arguments
        are traced; everything else (strings, flags, callables) is closed over, and outputs that are no
        arrays pass through. As under `jax.jit`, it is traced once for each kind of arguments, and what it closes over
        is read then. A closure variable, a default or a global that it names is noticed when it is bound to another
        object; a mutation inside an object is not.
      flatten: Whether the low-rank products see all token axes of their input as one, which is faster.
        False where a later token axis is sharded (sequence parallelism): flattening would gather it. On meshes with
        explicit axes types tell so, and such axes are left apart.

    Returns:
      `adapted(base, delta, <fn's parameters after its first>, *, dropout_key=None)`. Static and donated arguments are
      those of fn, by name and by position one later. It composes with `jit`, `grad`, `vmap` (over adapters too),
      `scan`, `remat`, `shard_map`; outside of them it compiles itself. `dropout_key` turns the adapters' dropout on: a
      mask depends on the key, the path and the index of the use within fn, not on `jit` or `jax.checkpoint` around it.
      Frozen leaves of the delta have no gradient.

    Warns:
      WrongBaseWarning: (from `adapted`, outside of `jit`) The delta is from :func:`lora_jax.prepare`, and the base is
        not the one that it returned.

    Raises:
      TypeError: fn is not callable, a module, or a result of `adapt`.
      ValueError: fn has a parameter `dropout_key`; (from `adapted`) the delta names a path that the base lacks, fits
        another shape, or adapts a weight that the function never uses.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora
      >>> fn = lambda base, x: jnp.tanh(x @ base["w"])
      >>> base, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
      >>> delta = lora.init(jax.random.key(0), base, {"w": lora.LoRA(rank=2)}, fn, x)
      >>> adapted = lora.adapt(fn)
      >>> bool((adapted(base, delta, x) == fn(base, x)).all())
      True

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §4.1
    """
    check_function("adapt", fn)
    if "dropout_key" in signatures.of(fn).parameters:
        raise ValueError("The function has an argument dropout_key, a name that adapted() takes for the adapters.")
    signature = signatures.replaced(fn, ("base", "delta"), skip=1, options=("dropout_key",))
    name = getattr(fn, "__name__", "adapted")
    programs, read = programs_of(fn, flatten), Reader(fn)

    def adapted(*args, dropout_key: jax.Array | None = None, **kwargs) -> Any:
        (base, delta), args, kwargs = signatures.divided(name, signature, 2, args, kwargs)
        leaves = Leaves((base, delta, args, kwargs, dropout_key))
        key = leaves.key
        evaluation = None if key is None else programs.get(read(), key)
        if evaluation is None:
            arguments = Arguments.of(base, args, kwargs)
            check_delta(delta, arguments)
            call = Call.trace(fn, arguments.varying_with(delta))
            for path in delta:
                if not call.uses_path(path):
                    raise ValueError(f"The delta adapts {path!r}, which the function never uses.")
            lasts = key is not None and not call.program.holds_tracers
            compiles = lasts and leaves.are_together()
            # A number or a variable that changes from call to call costs a trace each time, but no compilation.
            varies = lasts and any(other.kind == key.kind for other in programs.all_keys())
            options = {"compiles": compiles and not varies, "later": compiles}
            evaluation = Evaluation(call, Interpreter(flatten=flatten), leaves.structure, name, **options)
            if lasts:
                # Read again: while it was traced, the function may have bound variables itself.
                programs.put(read(), key, evaluation)
        check_base(delta, base, warn=True)
        return evaluation(leaves)

    return mark_adapted(signatures.describe(adapted, fn, signature))
