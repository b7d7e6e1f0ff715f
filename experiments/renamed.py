"""Former names of the experiments, as in `lora_jax.renamed`, without imports that take seconds."""

import dis
import sys
from typing import Any, NoReturn

NAMES = {
    "experiments.ahead": "experiments.aot",
    "experiments.configs.analysis": "experiments.configs.subspaces",
    "experiments.studies.analysis": "experiments.studies.subspaces",
    "experiments.input.tokenised": "experiments.input.tokenized",
    "experiments.models.cache.Sight": "AttentionContext",
    "experiments.models.rope.turn": "apply_rope",
    "experiments.studies.language_model.config": "experiments.configs.language_model",
    "experiments.studies.methods": "experiments.studies.joint",
    "experiments.studies.sft.config": "experiments.configs.sft",
    "experiments.training.chunked_loss": "experiments.models.chunked_loss",
}
"""The new name of each former module, class or function."""


class FormerModules:
    """An entry of `sys.meta_path` that states the new name of a former module."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name in NAMES:
            raise ModuleNotFoundError(f"{name} has been renamed to {NAMES[name]}.")


def raise_missing(module: str, name: str) -> NoReturn:
    """Raises the error for an attribute that a module lacks; `partial(raise_missing, __name__)` is a `__getattr__`."""
    new = NAMES.get(f"{module}.{name}")
    if new is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    message = f"{module}.{name} has been renamed to {new}."
    caller = sys._getframe(1)
    imported = dis.opname[caller.f_code.co_code[caller.f_lasti]] == "IMPORT_FROM"
    raise ImportError(message) if imported else AttributeError(message)
