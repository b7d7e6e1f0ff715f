"""Former names, which raise errors that state the new names."""

from collections.abc import Callable
from typing import Any, NoReturn


def module_getattr(module: str, **names: str) -> Callable[[str], Any]:
    """Creates a module's `__getattr__` for former names.

    Args:
      module: The module's `__name__`.
      **names: The new name of each former name.

    Example:
      >>> __getattr__ = module_getattr("package.module", find="get_initializer")
      >>> __getattr__("find")
      Traceback (most recent call last):
      AttributeError: package.module.find has been renamed to get_initializer.
    """

    def __getattr__(name: str) -> NoReturn:
        if name in names:
            raise AttributeError(f"{module}.{name} has been renamed to {names[name]}.")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


class RenamedMethod:
    """The former name of a method. Reading it raises an error, and so does defining it in a subclass.

    Example:
      >>> class Recipe:
      ...     make = RenamedMethod("create")
      ...
      ...     def __init_subclass__(cls):
      ...         RenamedMethod.check(cls)
      >>> Recipe().make
      Traceback (most recent call last):
      AttributeError: Recipe.make has been renamed to create.
    """

    def __init__(self, new: str):
        self._new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self._old = name

    def __get__(self, instance: Any, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__}.{self._old} has been renamed to {self._new}.")

    @staticmethod
    def check(cls: type) -> None:
        """Raises `TypeError` if a class defines a method under a former name of its bases."""
        for base in cls.__mro__[1:]:
            for name, method in vars(base).items():
                if isinstance(method, RenamedMethod) and name in vars(cls):
                    raise TypeError(f"{cls.__name__}.{name}: {base.__name__}.{name} has been renamed to {method._new}.")
