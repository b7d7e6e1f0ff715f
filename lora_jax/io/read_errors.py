"""The one place that knows what a reader may raise on a missing, damaged or malicious file."""

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
_LENGTH = 400
_LINE = 1000
_SHOWN = 11  # problems
BREAK = "\n  "  # between the problems of one message


@contextlib.contextmanager
def reading(
    path: str | os.PathLike, form: str = "", *, error: type[ValueError] = ValueError, template: str = ""
) -> Generator[None]:
    """Turns whatever the `with` block raises because of a file's content into one error that names the file.

    An error that names the file already, and any instance of a narrower `error`, keeps its message. Interrupts and
    errors that no reader raises pass unchanged.

    Args:
      path: The file or directory that is read.
      form: The file format, for the message.
      error: What is raised.
      template: The message in other words, with the fields `path` and `reason`.

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
        if not raised_by_reader(raised) or (error is not ValueError and isinstance(raised, error)):
            raise
        message = str(raised)
        if isinstance(raised, ValueError) and str(path) in message:
            if error is ValueError and message == clipped(message):
                raise
            raise error(clipped(message)) from raised
        as_form = f" as {form}" if form and not isinstance(raised, OSError) else ""
        template = template or f"{{path}}: cannot be read{as_form} ({{reason}})."
        raise error(template.format(path=printable(str(path)), reason=reason(raised))) from raised


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Keeps what Orbax and asyncio log about damaged files out of the `with` block's output: its error says that."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    disabled = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    except BaseException as raised:
        error: BaseException | None = raised
        while error is not None:  # frames hold unfinished reads, which complain when they are freed
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__
        gc.collect()
        logging.getLogger("asyncio").addFilter(_is_not_orbax)  # other reads of the same files may fail later
        raise
    finally:
        for logger, before in zip(loggers, disabled):
            logger.disabled = before


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Whether a log record of asyncio is not about an error that one of Orbax's unfinished reads raised."""
    error = record.exc_info[1] if record.exc_info else None
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return not any("orbax" in frame.filename for frame in frames)


def raised_by_reader(raised: BaseException) -> bool:
    """Whether an exception is one that readers raise; a Rust panic is no `Exception`."""
    library = type(raised).__module__.partition(".")[0]
    return isinstance(raised, _RAISED) or type(raised) is Exception or library in _LIBRARIES


def reason(raised: BaseException) -> str:
    """What an exception says, on one line of bounded length."""
    if isinstance(raised, RecursionError):
        return "nested too deeply"
    if isinstance(raised, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(raised, OSError) and raised.strerror:
        return raised.strerror
    text = printable(str(raised)).partition(" [tensorstore_spec")[0].strip().rstrip(".")
    if not isinstance(raised, ValueError) and type(raised) is not Exception:
        text = f"{type(raised).__name__}: {text}" if text else type(raised).__name__
    text = " ".join(text.split()) or type(raised).__name__
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]} …"


def clipped(message: str) -> str:
    """A message whose long lines have lost their middle: a value of any length may be quoted in it.

    Example:
      >>> message = clipped(f"x.json: bias is {'a' * 10_000!r}; expected 'none'.")
      >>> message[:24], message[-24:]
      ("x.json: bias is 'aaaaaaa", "aaaaa'; expected 'none'.")
    """
    head, tail = 2 * _LINE // 3, _LINE // 3
    lines = message.split("\n")
    return "\n".join(line if len(line) <= _LINE else f"{line[:head]} … {line[-tail:]}" for line in lines)


def counted(problems: Iterable[str]) -> str:
    """How many problems there are, and the first of them, a line each.

    Args:
      problems: Of one line each, or of several that :data:`BREAK` separates. Equal ones count once.

    Example:
      >>> print("b.json does not fit", counted(["no x", f"no y{BREAK}no z", "no x"]))
      b.json does not fit (3 problems):
        no x
        no y
        no z
    """
    lines = list(dict.fromkeys(BREAK.join(problems).split(BREAK)))
    more = [f"… and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    number = f"{len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return BREAK.join([f"({number}):", *lines[:_SHOWN], *more])


def printable(text: str) -> str:
    """A text that every UTF-8 stream accepts: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
