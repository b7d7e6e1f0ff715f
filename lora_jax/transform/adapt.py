"""adapt(): turns a function of parameters into a function of base and delta."""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax.adapters.fingerprints import check_base
from lora_jax.functions import check_function, mark_adapted
from lora_jax.transform import signatures
from lora_jax.transform.call import Arguments, Call, check_delta
from lora_jax.transform.evaluation import Evaluation, Leaves
from lora_jax.transform.interpreter import Interpreter
from lora_jax.transform.programs import ClosureReader, get_programs


def adapt(fn: Callable, *, flatten: bool = True) -> Callable:
    r"""Turns a function of parameters into a function of frozen parameters and adapters.

    A product of a weight with an input is computed as :math:`x W + s\,(x A^\top) B`, without forming the merged weight
    or its gradient. The function is traced, not rewritten, so Linen, NNX, Equinox, Haiku and plain functions are
    treated alike. :func:`lora_jax.explain` reports how each weight is used.

    Args:
      fn: `fn(base, *args, **kwargs)`, any function that `jax.jit` can trace. Array leaves of its arguments
        are traced; everything else (strings, flags, callables) is closed over, and outputs that are not arrays pass
        through. As with `jax.jit`, the function is traced once per argument structure, shapes and dtypes, and values
        that it closes over are read at that time. It is traced again if a closure variable, a default argument or a
        global that it names is bound to another object, but not if such an object is mutated.
      flatten: Whether the low-rank products flatten all token axes of their input into one, which is faster.
        Pass False if a token axis other than the first is sharded (sequence parallelism), since flattening would
        gather it. On meshes with explicit axes, sharded token axes are never flattened.

    Returns:
      `adapted(base, delta, <fn's parameters after its first>, *, dropout_key=None)`. Static and donated arguments are
      the same as for fn, by name or by position plus one. It composes with `jit`, `grad`, `vmap` (also over adapters),
      `scan`, `remat` and `shard_map`; outside of them it is compiled on its own. `dropout_key` enables the adapters'
      dropout: a mask depends on the key, the path and the index of the use within fn, not on `jit` or
      `jax.checkpoint` around it. Frozen leaves of the delta receive no gradient.

    Warns:
      WrongBaseWarning: (from `adapted`, outside `jit`) The delta was created by :func:`lora_jax.prepare`, and the base
        is not the one that `prepare` returned.

    Raises:
      TypeError: fn is not callable, or it is a module or a result of `adapt`.
      ValueError: fn has a parameter `dropout_key`; (from `adapted`) the delta has a path that is not in the base, an
        adapter for another shape, or an adapter of a weight that the function never uses.

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
    if "dropout_key" in signatures.get_signature(fn).parameters:
        raise ValueError(
            "The function has a parameter dropout_key; adapted() reserves this name for the adapters' dropout."
        )
    signature = signatures.replace_leading(fn, ("base", "delta"), skip=1, options=("dropout_key",))
    name = getattr(fn, "__name__", "adapted")
    programs, read_closure = get_programs(fn, flatten), ClosureReader(fn)

    def adapted(*args, dropout_key: jax.Array | None = None, **kwargs) -> Any:
        (base, delta), args, kwargs = signatures.split_leading(name, signature, 2, args, kwargs)
        leaves = Leaves((base, delta, args, kwargs, dropout_key))
        key = leaves.key
        evaluation = None if key is None else programs.get(read_closure(), key)
        if evaluation is None:
            arguments = Arguments.create(base, args, kwargs)
            check_delta(delta, arguments)
            call = Call.trace(fn, arguments.varying_with(delta))
            for path in delta:
                if not call.uses_path(path):
                    raise ValueError(f"The delta adapts {path!r}, which the function never uses.")
            cacheable = key is not None and not call.program.holds_tracers
            compilable = cacheable and leaves.on_same_devices()
            # A static argument or a closure variable that changes at every call costs a trace, but no compilation.
            varies = cacheable and any(other.arrays == key.arrays for other in programs.all_keys())
            options = {"compile_first": compilable and not varies, "compile_later": compilable}
            evaluation = Evaluation(call, Interpreter(flatten=flatten), leaves.structure, name, **options)
            if cacheable:
                # Read the closure again: tracing may have rebound variables.
                programs.put(read_closure(), key, evaluation)
        check_base(delta, base, warn=True)
        return evaluation(leaves)

    return mark_adapted(signatures.copy_metadata(adapted, fn, signature))
