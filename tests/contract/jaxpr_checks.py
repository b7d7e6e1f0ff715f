"""What must not be in a jaxpr: a contraction with the shape of a weight, a captured base."""

import math

import numpy as np

CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "lora_ragged_product", "scatter-add")


def equations(jaxpr):
    """All equations at any depth."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in inner.eqns:
        yield equation
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                if hasattr(item, "eqns") or hasattr(item, "jaxpr"):
                    yield from equations(item)


def forms(shape, axes):
    """The shapes in which the gradient of a weight may show: any order of axes, groups flattened, one layer."""
    groups = {role: [n for n, r in zip(shape, axes) if r == role] for role in ("batch", "in", "out")}
    into, out = math.prod(groups["in"]), math.prod(groups["out"])
    lists = [shape, [*groups["batch"], into, out], [into, out], [*groups["in"], *groups["out"]]]
    return {tuple(sorted(n for n in form if n != 1)) for form in lists}


def weight_gradients(jaxpr, shapes_and_axes):
    """The contractions whose result has the shape of a weight."""
    unwanted = set().union(*(forms(shape, axes) for shape, axes in shapes_and_axes))
    return [
        f"{equation.primitive.name} -> {out.aval.shape}"
        for equation in equations(jaxpr)
        if equation.primitive.name in CONTRACTIONS
        for out in equation.outvars
        if tuple(sorted(n for n in out.aval.shape if n != 1)) in unwanted
    ]


def constants(closed):
    """The constants of a closed jaxpr, at any depth."""
    found = list(closed.consts)
    for equation in equations(closed):
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                found.extend(getattr(item, "consts", ()))
    return [np.asarray(const) for const in found if hasattr(const, "shape") and const.dtype.kind == "f"]
