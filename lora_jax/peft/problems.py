"""Problems of one adapter, collected so that one error reports all of them."""

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def collect_problems(problems: list[str]) -> Iterator[None]:
    """Appends the message of a `ValueError` of the `with` block to a list.

    Example:
      >>> problems = []
      >>> with collect_problems(problems):
      ...     raise ValueError("a.b: no such weight")
      >>> problems
      ['a.b: no such weight']
    """
    try:
        yield
    except ValueError as error:
        problems.append(str(error))
