"""The contract of adapters, checked part by part."""

import contextlib
import dataclasses
import json
import numbers
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import checks, paths
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.factored import check_form
from lora_jax.adapters.protocol import BATCH, IN, KINDS, LOOKUP, OUT, Recipe, check_roles, is_inexact
from lora_jax.batching import route, stack, unstack
from lora_jax.checkpoint import load, save
from lora_jax.leaves import short
from lora_jax.merging import merge, unmerge
from lora_jax.optim import join, partition
from lora_jax.quantization import NF4, quantize
from lora_jax.report import explain
from lora_jax.sharding import delta_shardings
from lora_jax.testing.cases import Case, score, use_weight
from lora_jax.testing.jaxprs import sorted_sizes, weight_forms, weight_gradients
from lora_jax.transform.adapt import adapt

AXES = ((IN, OUT), (OUT, IN), (BATCH, IN, OUT))
SIZES = {BATCH: 3, IN: 12, OUT: 8, LOOKUP: 12}
TOLERANCE = 2e-5


def check_adapter(
    recipe: Recipe,
    *,
    axes: Sequence[tuple[str, ...]] = AXES,
    sizes: Mapping[str, int] | None = None,
    key: jax.Array | None = None,
) -> None:
    """Asserts that the adapters which a recipe creates fulfill the contract of :class:`lora_jax.Adapter`.

    For a weight of each of the `axes`, an adapter is created, its trained leaves are perturbed, and:

    - the fields, the shape of the weight and the roles are consistent, and training starts from the base's outputs;
    - it is a pytree whose unflattening accepts any leaves, the same for all keys;
    - only inexact leaves declared as trained are trained, frozen ones get no gradient, and each trained one has one;
    - the factored form, if there is one, agrees with :meth:`lora_jax.Adapter.merge` in outputs and gradients (float32,
      bfloat16 and NF4 weights, in loops over layers), and no gradient is as large as the weight, unless a leaf is. (A
      nonlinear adapter is compared with its function of the outputs of the base);
    - merging keeps shape and dtype and rounds once, or is refused by an adapter that declares itself nonlinear;
    - padding changes neither the weight nor a gradient, and `identity_like` does not change the weight;
    - an additive adapter's term does not depend on the weight and is proportional to its `scale`;
    - it is the same after saving and loading, and works with `jit`, `vmap`, stacks, routing and shardings.

    Args:
      recipe: What users write in a spec.
      axes: The roles of the axes of the weights to adapt, 'batch' first; give those that the recipe supports. A weight
        with a 'lookup' axis is indexed, others are multiplied with an input.
      sizes: The size of an axis by its role; by default 3, 12 and 8 for 'batch', 'in' and 'out'.
      key: A PRNG key for the weights and inputs.

    Raises:
      AssertionError: A part of the contract is violated; the message says which, for which axes and leaf.
      TypeError: `recipe` is not a recipe, or `key` not a PRNG key.
      ValueError: `axes` is empty or has an unknown role; `sizes` has one, or a size that is not a positive integer.

    Example:
      >>> import lora_jax as lora
      >>> check_adapter(lora.LoRA(2, alpha=4), axes=[("in", "out")])
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"check_adapter takes a recipe, such as lora.LoRA(8); got {type(recipe).__name__}.")
    key = jax.random.key(0) if key is None else key
    checks.key("check_adapter(recipe, key=…)", key)
    _check_axes_and_sizes(axes, sizes or {})
    for roles in axes:
        with _part(recipe, roles, "creating the adapter"):
            case = Case.create(recipe, tuple(roles), {**SIZES, **(sizes or {})}, key)
        for check in CHECKS:
            with _part(recipe, roles, check.__name__.removeprefix("_check_").replace("_", " ")):
                check(case)


def _check_axes_and_sizes(axes: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> None:
    """Raises `ValueError` unless there are axes and all roles are known."""
    if not axes or any(isinstance(roles, str) for roles in (axes, *axes)):
        raise ValueError(f"axes={axes!r}: expected the roles of one weight or more, such as [('in', 'out')].")
    for name, words in (("axes", [role for roles in axes for role in roles]), ("sizes", sizes)):
        check_roles(f"{name}={axes if name == 'axes' else sizes!r}", words)
    for role, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"sizes={sizes!r}: the size of {role!r} is {size!r}; expected a positive integer.")


@contextlib.contextmanager
def _part(recipe: Recipe, axes: Sequence[str], what: str) -> Iterator[None]:
    """Raises every error as an `AssertionError` that says which part of the contract is violated."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise AssertionError(f"{recipe}, axes {tuple(axes)}, {what}: {kind}{error}") from error


def require(condition: Any, message: str) -> None:
    """Raises `AssertionError` unless a condition holds, in optimized Python too."""
    if not condition:
        raise AssertionError(message)


def assert_close(actual: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> None:
    a, b = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    require(a.shape == b.shape, f"{what}: the shape is {a.shape}, expected {b.shape}.")
    error = np.abs(a - b).max(initial=0) / max(1e-3, np.abs(b).max(initial=0))
    require(error <= tolerance, f"{what}: the relative error is {error:.2g}, at most {tolerance:.2g} is expected.")


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of an adapter, or of a delta with one, by the names of its fields."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path).rpartition(".")[2]: leaf for path, leaf in leaves}


def _check_declaration(case: Case) -> None:
    node, plain = case.node, tuple(IN if role == LOOKUP else role for role in case.axes)
    cls = type(node)
    require(KINDS.get(getattr(cls, "kind", "")) is cls, f"{cls.__name__} is not decorated with adapter(kind).")
    check_adapters(case.delta)
    if (form := node.factored(case.base["w"])) is not None:
        check_form(form, cls.__name__)
    has_function = form is not None and form.on_output is not None
    require(node.nonlinear == has_function, f"nonlinear is {node.nonlinear}; it says whether the form has on_output.")
    require(node.shape() == case.weight.shape, f"shape() is {node.shape()}; the weight's is {case.weight.shape}.")
    require(node.axes in ((), plain), f"axes is {node.axes}; expected {plain}, with lookups as 'in'.")
    require(jax.tree.leaves(partition(case.delta)[0]), "no leaf is trained.")
    json.dumps(node.describe())


def _check_start(case: Case) -> None:
    assert_close(case.outputs(case.fresh), case.fn({"w": case.original}, case.x), "outputs of a new adapter")
    if not case.node.nonlinear:
        assert_close(case.fresh["w"].merge(case.weight), case.original, "the weight merged with a new adapter")


def _check_pytree(case: Case) -> None:
    structure = jax.tree.structure(case.node)
    hash(structure)
    other = jax.tree.structure(case.again["w"])
    require(structure == other, f"adapters of two keys have different structures: {structure} and {other}.")
    for name, leaf in leaves_by_name(case.again).items():
        expected = leaves_by_name(case.fresh)[name]
        types = (leaf.shape, leaf.dtype), (expected.shape, expected.dtype)
        require(types[0] == types[1], f"two keys give {name} different types: {short(leaf)} and {short(expected)}.")
    jax.eval_shape(lambda node: node, case.node)


def _check_trained_leaves(case: Case) -> None:
    fields = dataclasses.fields(case.node)  # pyrefly: ignore[bad-argument-type]
    declared = {field.name: field.metadata["trained"] for field in fields if "trained" in field.metadata}
    mask = case.node.trainable()
    for name, trains in declared.items():
        marks = zip(jax.tree.leaves(getattr(mask, name)), jax.tree.leaves(getattr(case.node, name)))
        for mark, leaf in marks:
            how = "trained" if trains else "frozen"
            require(mark == (trains and is_inexact(leaf)), f"trainable() is {mark} for {name}, declared as {how}.")
    rejoined = jax.tree.structure(join(*partition(case.delta)))
    require(rejoined == jax.tree.structure(case.delta), "join(*partition(delta)) has another structure.")
    for merged in (False, True):
        gradients, how = case.gradient(case.delta, merged=merged)["w"], "merge" if merged else "adapted"
        for name, trains in declared.items():
            for gradient in jax.tree.leaves(getattr(gradients, name)):
                require(np.isfinite(gradient).all(), f"the gradient of {name} in {how} is not finite.")
                if trains:
                    require(np.any(gradient), f"{name} is trained, but has no gradient in {how}.")
                else:
                    require(not np.any(gradient), f"{name} is frozen, but has a gradient in {how}.")


def _check_factored_form(case: Case) -> None:
    assert_close(case.outputs(case.delta), case.merged_outputs(case.delta), "the factored form's outputs")
    ours, theirs = (leaves_by_name(case.gradient(case.delta, merged=merged)) for merged in (False, True))
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], f"the factored form's gradient of {name}", 1e-4)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), case.base)
    out = case.outputs(case.delta, narrow)
    require(out.dtype == jnp.bfloat16, f"outputs with a bfloat16 weight are {out.dtype}.")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    assert_close(out, case.merged_outputs(case.delta, wide), "outputs with a bfloat16 weight", 5e-2)
    if explain(case.fn, case.base, case.delta, case.x).factored and not _has_leaf_like_weight(case):
        train, frozen = partition(case.delta)
        gradient = jax.grad(lambda train: score(adapt(case.fn)(case.base, join(train, frozen), case.x)))
        contractions = weight_gradients(jax.make_jaxpr(gradient)(train), [(case.weight.shape, case.axes)])
        require(not contractions, f"the gradient forms arrays as large as the weight: {', '.join(contractions)}.")


def _has_leaf_like_weight(case: Case) -> bool:
    """Whether the shape of a leaf, and so of its gradient, may be that of the weight (a rank equal to a size is)."""
    forms = weight_forms(case.weight.shape, case.axes)
    leaves = jax.tree.leaves(case.node)
    return any(leaf.size == case.weight.size or sorted_sizes(leaf.shape) in forms for leaf in leaves)


def _check_quantized_weight(case: Case) -> None:
    if LOOKUP not in case.axes:
        base = quantize({"w": case.weight}, {"w": NF4(block=4, axes=case.axes)})
        delta = dict(case.delta)
        if getattr(case.node, "fingerprint", None) is not None:
            delta["w"] = dataclasses.replace(case.node, fingerprint=None)  # pyrefly: ignore
        assert_close(case.outputs(delta, base), case.merged_outputs(delta, base), "outputs with an NF4 weight")


def _check_loop_over_layers(case: Case) -> None:
    if case.axes[0] != BATCH:
        return
    inner = use_weight(case.axes[1:], case.weight.shape[1:], jax.random.key(0))[0]

    def layer(total, weight_and_x):
        weight, x = weight_and_x
        return total + inner({"w": weight}, x).sum(), None

    def scanned(base, x):
        return jax.lax.scan(
            lambda total, part: (total + inner({"w": part[0]}, part[1]).sum(), None), 0.0, (base["w"], x)
        )[0]

    total = dataclasses.replace(case, fn=scanned).outputs(case.delta)
    assert_close(total, case.merged_outputs(case.delta).sum(), "outputs of a scan over layers", 1e-4)


def _check_merge(case: Case) -> None:
    if case.node.nonlinear:
        try:
            case.node.merge(case.weight)
        except ValueError:
            return
        require(False, "merge() of a nonlinear adapter returns a weight.")
    exact = case.node.merge(case.weight.astype(jnp.bfloat16).astype(jnp.float32))
    for dtype in (jnp.float32, jnp.bfloat16):
        merged = case.node.merge(case.weight.astype(dtype))
        require(merged.dtype == dtype, f"merge() of a {jnp.dtype(dtype)} weight is {merged.dtype}.")
        shape = case.weight.shape
        require(merged.shape == shape, f"merge() has the shape {merged.shape}, the weight {shape}.")
    assert_close(merged, exact, "merge() of a bfloat16 weight, computed in float32 and rounded once", 2**-8)


def _check_identity(case: Case) -> None:
    identity = case.node.identity_like(case.weight)
    require(jax.tree.structure(identity) == jax.tree.structure(case.node), "identity_like() has another structure.")
    for name, leaf in leaves_by_name(identity).items():
        expected = leaves_by_name(case.node)[name]
        require((leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), f"identity_like() changes {name}'s type.")
    assert_close(case.effect(identity), case.effect(None), f"{_effect(case)} identity_like()")


def _effect(case: Case) -> str:
    return "the outputs with" if case.node.nonlinear else "the weight merged with"


def _check_padding(case: Case) -> None:
    node = case.node
    if node.rank is None:
        return
    padded = node.pad_rank(node.rank + 2)
    require(padded.rank == node.rank + 2, f"pad_rank({node.rank + 2}) has the rank {padded.rank}.")
    require(jax.tree.structure(padded) == jax.tree.structure(node), "pad_rank() changes the structure.")
    assert_close(case.effect(padded), case.effect(node), f"{_effect(case)} pad_rank()")
    before, after = leaves_by_name(case.gradient(case.delta)), leaves_by_name(case.gradient({"w": padded}))
    for name, gradient in before.items():
        present = after[name][tuple(slice(size) for size in gradient.shape)]
        assert_close(present, gradient, f"the gradient of {name} after pad_rank()")
        rest = np.abs(after[name]).sum() - np.abs(present).sum()
        require(rest <= 1e-5 * np.abs(present).sum(), f"pad_rank() adds entries to {name} that have gradients.")


def _check_additivity(case: Case) -> None:
    node = case.node
    if not node.additive:
        return
    term = node.merge(jnp.zeros_like(case.weight))
    assert_close(
        node.merge(case.weight) - case.weight, term, "the term of an additive adapter, on another weight", 1e-4
    )
    require(hasattr(node, "scale"), "an additive adapter has a field `scale`, which multiplies its term.")
    twice = dataclasses.replace(node, scale=2 * node.scale)  # pyrefly: ignore
    assert_close(twice.merge(jnp.zeros_like(case.weight)), 2 * term, "the term with twice the scale")
    if getattr(node, "fingerprint", None) is None:
        restored = unmerge(merge(case.base, case.delta), case.delta)["w"]
        assert_close(restored, case.weight, "the weight after merge and unmerge", 1e-4)


def _check_saving(case: Case) -> None:
    with tempfile.TemporaryDirectory() as directory:
        save(f"{directory}/adapter", case.delta, base=case.base)
        loaded = load(f"{directory}/adapter", case.base)
    require(jax.tree.structure(loaded) == jax.tree.structure(case.delta), "a loaded adapter has another structure.")
    for name, leaf in leaves_by_name(loaded).items():
        np.testing.assert_array_equal(leaf, leaves_by_name(case.delta)[name], f"{name} after saving and loading")


def _check_transformations(case: Case) -> None:
    deltas = [case.delta, case.other]
    traces = []

    @jax.jit
    def run(delta):
        traces.append(delta)
        return adapt(case.fn)(case.base, delta, case.x)

    expected = jnp.stack([run(delta) for delta in deltas])
    require(len(traces) == 1, "jit compiles anew for another adapter of the same recipe.")
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *deltas)
    assert_close(jax.vmap(lambda delta: adapt(case.fn)(case.base, delta, case.x))(both), expected, "outputs of vmap")
    stacked = stack(deltas, base=case.base)
    for member, delta in zip(unstack(stacked, deltas), deltas):
        for name, leaf in leaves_by_name(member).items():
            np.testing.assert_array_equal(leaf, leaves_by_name(delta)[name], f"{name} after stack() and unstack()")
    routed = route(adapt(case.fn))(case.base, stacked, [0, 1], jnp.stack([case.x, case.x]))
    assert_close(routed, expected, "outputs of route()", 1e-4)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(None,) * (len(case.axes) - 1), "model"))
    jax.device_put(case.delta, delta_shardings(paths.flatten(case.base).map(lambda path, leaf: sharding), case.delta))


CHECKS = (
    _check_declaration,
    _check_start,
    _check_pytree,
    _check_trained_leaves,
    _check_factored_form,
    _check_quantized_weight,
    _check_loop_over_layers,
    _check_merge,
    _check_identity,
    _check_padding,
    _check_additivity,
    _check_saving,
    _check_transformations,
)
