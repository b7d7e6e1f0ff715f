"""Former names, which raise errors that state the new names, and submodules that are imported when they are used."""

import dis
import importlib
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

MODULES = {
    "lora_jax.adapters.conversion": "lora_jax.adapters.terms",
    "lora_jax.array_store": "lora_jax.io.arrays",
    "lora_jax.capturing": "lora_jax.calibration; its function capture is collect_stats",
    "lora_jax.commands.wording": "lora_jax.commands.formatting",
    "lora_jax.files": "lora_jax.io.files",
    "lora_jax.locks": "lora_jax.io.locks",
    "lora_jax.peft.biases": "lora_jax.commands.biases",
    "lora_jax.peft.exported": "lora_jax.peft.export",
    "lora_jax.peft.factors": "lora_jax.peft.factor_layout",
    "lora_jax.peft.fitting": "lora_jax.commands.fitting",
    "lora_jax.peft.layout": "lora_jax.commands.layout",
    "lora_jax.peft.whole": "lora_jax.peft.modules_to_save",
    "lora_jax.plain": "lora_jax.conversion",
    "lora_jax.quantize": "lora_jax.quantization; lora_jax.quantize is a function",
    "lora_jax.reading": "lora_jax.io.read_errors",
    "lora_jax.regions": "lora_jax.transform.regions",
    "lora_jax.termination": "lora_jax.io.signals",
    "lora_jax.transform.deferred": "lora_jax.transform.lazy_dequantized; its class Deferred is LazyDequantized",
    "lora_jax.transform.keyed": "lora_jax.transform.dropout_keys",
}
"""The new name of each former module; after a semicolon, a remark."""


class FormerModules:
    """An entry of `sys.meta_path` that states the new name of a former module.

    Example:
      >>> import lora_jax.plain
      Traceback (most recent call last):
      ModuleNotFoundError: lora_jax.plain has been renamed to lora_jax.conversion.
    """

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        if name in MODULES:
            # Without `name=`: `from package import module` ignores an error that names the module.
            raise ModuleNotFoundError(f"{name} has been renamed to {MODULES[name]}.")


sys.meta_path.append(FormerModules)  # the last entry: it is asked for modules that no other entry finds


def module_getattr(module: str, submodules: Collection[str] = (), /, **names: str) -> Callable[[str], Any]:
    """Creates a module's `__getattr__` for former names, former submodules, and submodules that are imported when used.

    Args:
      module: The module's `__name__`.
      submodules: The names of submodules that the module does not import.
      **names: The new name of each former name.

    Example:
      >>> __getattr__ = module_getattr("package.module", find="get_initializer")
      >>> __getattr__("find")
      Traceback (most recent call last):
      AttributeError: package.module.find has been renamed to get_initializer.
    """

    def __getattr__(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f"{module}.{name}")
        new = names.get(name) or MODULES.get(f"{module}.{name}")
        if new is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} has been renamed to {new}."
        caller = sys._getframe(1)
        if dis.opname[caller.f_code.co_code[caller.f_lasti]] == "IMPORT_FROM":
            # `from module import name` replaces an AttributeError by "cannot import name".
            raise ImportError(message, name=module)
        raise AttributeError(message)

    return __getattr__


class _FormerMember:
    def __init__(self, old: str, new: str):
        self.old = old
        self.new = new

    def __get__(self, instance: Any, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__}.{self.old} has been renamed to {self.new}.")


def former_members(**names: str) -> Callable[[type[T]], type[T]]:
    """Decorates a class whose attributes have former names. Reading one of these raises an error.

    Args:
      **names: The new name of each former name.

    Example:
      >>> @former_members(make="create")
      ... class Recipe:
      ...     def __init_subclass__(cls):
      ...         check_members(cls)
      >>> Recipe().make
      Traceback (most recent call last):
      AttributeError: Recipe.make has been renamed to create.
    """

    def decorate(cls: type[T]) -> type[T]:
        for old, new in names.items():
            setattr(cls, old, _FormerMember(old, new))
        return cls

    return decorate


def check_members(cls: type) -> None:
    """Raises `TypeError` if a class defines an attribute under a former name of its bases."""
    for base in cls.__mro__[1:]:
        for name, member in vars(base).items():
            if isinstance(member, _FormerMember) and name in vars(cls):
                raise TypeError(f"{cls.__name__}.{name}: {base.__name__}.{name} has been renamed to {member.new}.")
