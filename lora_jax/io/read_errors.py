"""The errors that readers may raise on a missing, damaged or malicious file, as one error that names the file."""

import contextlib
import gc
import logging
import os
import struct
import traceback
import zlib
from collections.abc import Generator, Iterable

_RAISED = (
    OSError,
    ValueError,  # JSON, encodings, NumPy, TensorStore, PyArrow
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,  # a RecursionError of nested JSON is one
    MemoryError,
    EOFError,
    SyntaxError,
    struct.error,
    zlib.error,
)
_LIBRARIES = {"jinja2", "orbax", "pyarrow", "pyo3_runtime", "safetensors", "safetensors_rust", "zstandard", "_zstd"}
_REASON_LENGTH = 400
_LINE_LENGTH = 1000
_PROBLEMS = 11
BREAK = "\n  "
"""Separates the problems of one message."""


@contextlib.contextmanager
def reading(
    path: str | os.PathLike, form: str = "", *, error: type[ValueError] = ValueError, template: str = ""
) -> Generator[None]:
    """Converts errors of the `with` block about a file's content to one error that names the file.

    An error that already names the file, or is an instance of a narrower `error`, keeps its message. Interrupts and
    errors that readers do not raise are not converted.

    Args:
      path: The file or directory to read.
      form: The file format, for the message.
      error: The class of the error to raise.
      template: Another message, with the fields `path` and `reason`.

    Raises:
      ValueError: The file cannot be read. The original error is its cause.

    Example:
      >>> import json
      >>> with reading("config.json", "JSON"):
      ...     json.loads("[" * 100_000)
      Traceback (most recent call last):
      ...
      ValueError: config.json: cannot be read as JSON (nested too deeply).
    """
    try:
        yield
    except BaseException as raised:
        if not is_read_error(raised) or (error is not ValueError and isinstance(raised, error)):
            raise
        message = str(raised)
        if isinstance(raised, ValueError) and str(path) in message:
            if error is ValueError and message == shorten(message):
                raise
            raise error(shorten(message)) from raised
        as_form = f" as {form}" if form and not isinstance(raised, OSError) else ""
        template = template or f"{{path}}: cannot be read{as_form} ({{reason}})."
        raise error(template.format(path=printable(str(path)), reason=describe_error(raised))) from raised


@contextlib.contextmanager
def silence_logs() -> Generator[None]:
    """Disables log messages of Orbax and asyncio about damaged files in the `with` block, which raises an error."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    disabled = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except BaseException as raised:
        error: BaseException | None = raised
        while error is not None:  # frames hold unfinished reads, which log when they are freed
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__
        gc.collect()
        logging.getLogger("asyncio").addFilter(_is_not_orbax)  # other reads of the same files may fail later
        raise
    finally:
        for logger, before in zip(loggers, disabled):
            logger.disabled = before


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record of asyncio is not about an error of an unfinished read of Orbax."""
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return not any("orbax" in frame.filename for frame in frames)


def is_read_error(raised: BaseException) -> bool:
    """Whether readers raise this kind of exception. A Rust panic is not an `Exception`, but counts."""
    library = type(raised).__module__.partition(".")[0]
    return isinstance(raised, _RAISED) or type(raised) is Exception or library in _LIBRARIES


def describe_error(raised: BaseException) -> str:
    """Returns the message of an exception, on one line of bounded length."""
    if isinstance(raised, RecursionError):
        return "nested too deeply"
    if isinstance(raised, MemoryError):
        return "out of memory"
    if isinstance(raised, OSError) and raised.strerror:
        return raised.strerror
    text = printable(str(raised)).partition(" [tensorstore_spec")[0].strip().rstrip(".")
    if not isinstance(raised, ValueError) and type(raised) is not Exception:
        text = f"{type(raised).__name__}: {text}" if text else type(raised).__name__
    text = " ".join(text.split()) or type(raised).__name__
    return text if len(text) <= _REASON_LENGTH else f"{text[:_REASON_LENGTH]} …"


def shorten(message: str) -> str:
    """Removes the middle of long lines of a message, which may quote a value of any length.

    Example:
      >>> message = shorten(f"x.json: bias is {'a' * 10_000!r}; expected 'none'.")
      >>> message[:24], message[-24:]
      ("x.json: bias is 'aaaaaaa", "aaaaa'; expected 'none'.")
    """
    head, tail = 2 * _LINE_LENGTH // 3, _LINE_LENGTH // 3
    lines = message.split("\n")
    return "\n".join(line if len(line) <= _LINE_LENGTH else f"{line[:head]} … {line[-tail:]}" for line in lines)


def list_problems(problems: Iterable[str]) -> str:
    """Returns the number of problems and the first of them, a line each.

    Args:
      problems: Messages of one line, or of several separated by :data:`BREAK`. Equal ones count once.

    Example:
      >>> print("b.json does not fit", list_problems(["no x", f"no y{BREAK}no z", "no x"]))
      b.json does not fit (3 problems):
        no x
        no y
        no z
    """
    lines = list(dict.fromkeys(BREAK.join(problems).split(BREAK)))
    more = [f"… and {len(lines) - _PROBLEMS} more"] if len(lines) > _PROBLEMS else []
    number = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return BREAK.join([f"({number}):", *lines[:_PROBLEMS], *more])


def printable(text: str) -> str:
    """Escapes lone surrogates, so that every UTF-8 stream accepts the text."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
