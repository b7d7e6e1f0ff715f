"""Adapters: what is trained beside, or in place of, a frozen weight. One file a family.

What a file with an adapter of your own imports: a class that extends :class:`Adapter` and is decorated by
:func:`adapter`, with fields declared by :func:`trained`, :func:`frozen` and :func:`static`, and a :class:`Recipe` that
creates it. :func:`lora_jax.testing.check_adapter` tests it.
"""

from lora_jax.adapters.factored import Factor, Factored, OnOutput
from lora_jax.adapters.layouts import BATCH, IN, LOOKUP, OUT
from lora_jax.adapters.protocol import Adapter, Recipe, adapter, frozen, static, trained
from lora_jax.adapters.roles import in_and_out, sizes
from lora_jax.renamed import module_getattr

__all__ = [
    "BATCH",
    "IN",
    "LOOKUP",
    "OUT",
    "Adapter",
    "Factor",
    "Factored",
    "OnOutput",
    "Recipe",
    "adapter",
    "frozen",
    "in_and_out",
    "sizes",
    "static",
    "trained",
]

__getattr__ = module_getattr(__name__)
