"""What must not be in a jaxpr: a contraction with the shape of a weight, a dense trained weight, a captured base."""

import math

import numpy as np

from lora_jax.testing.jaxprs import CONTRACTIONS, bodies, equations, weight_gradients
from lora_jax.transform import jaxprs

__all__ = ["CONTRACTIONS", "constants", "dense_dependents", "equations", "weight_gradients"]


def constants(closed):
    """The constants of a closed jaxpr, at any depth."""
    consts = list(closed.consts)
    for equation in equations(closed):
        for value in equation.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                consts.extend(getattr(item, "consts", ()))
    return [np.asarray(const) for const in consts if hasattr(const, "shape") and const.dtype.kind == "f"]


def dense_dependents(closed, sizes):
    """The arrays of one of the sizes (numbers of elements), at any depth, that depend on an input of a closed jaxpr.

    Dependence is followed through every primitive, and into and out of calls, branches and loops. Sizes see an array
    transposed or flattened, too.

    Returns:
      Per array, the primitive that forms it and its shape: `"add -> (9, 7)"`.
    """
    dense = {}

    def walk(jaxpr, marks):
        """Which outputs depend on the marked inputs."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        dependent = {variable for variable, mark in zip(jaxpr.invars, marks, strict=True) if mark}

        def marked(atoms):
            return [not jaxprs.is_literal(atom) and atom in dependent for atom in atoms]

        for equation in jaxpr.eqns:
            for out, mark in zip(equation.outvars, through(equation, marked(equation.invars)), strict=True):
                if mark:
                    dependent.add(out)
                    if math.prod(getattr(out.aval, "shape", ())) in sizes:
                        dense[out] = f"{equation.primitive.name} -> {out.aval.shape}"
        return marked(jaxpr.outvars)

    def through(equation, marks):
        params = equation.params
        if equation.primitive.name == "cond":
            index, *operands = marks
            return either([index] * len(equation.outvars), *(walk(branch, operands) for branch in params["branches"]))
        if equation.primitive.name == "scan":
            consts, carries = jaxprs.scan_counts(equation)
            return loop(params["jaxpr"], marks[:consts], marks[consts : consts + carries], marks[consts + carries :])
        if equation.primitive.name == "while":
            condition, body = params["cond_nconsts"], params["body_nconsts"]
            carries = loop(params["body_jaxpr"], marks[condition : condition + body], marks[condition + body :], [])
            stops = walk(params["cond_jaxpr"], marks[:condition] + carries)
            return either(carries, stops * len(carries))
        inner = list(bodies(equation))
        if len(inner) == 1 and len(getattr(inner[0], "jaxpr", inner[0]).invars) == len(marks):
            return walk(inner[0], marks)
        for body in inner:  # its inputs are not the equation's: any may be the marked one
            walk(body, [any(marks)] * len(getattr(body, "jaxpr", body).invars))
        return [any(marks)] * len(equation.outvars)

    def loop(body, consts, carries, rest):
        while True:
            outputs = walk(body, [*consts, *carries, *rest])
            after = either(carries, outputs[: len(carries)])
            if after == carries:
                return carries + outputs[len(carries) :]
            carries = after

    def either(*marks):
        return [any(column) for column in zip(*marks, strict=True)]

    walk(closed, [True] * len(closed.in_avals))
    return list(dense.values())
