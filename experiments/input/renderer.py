"""A program that renders one chat template with bounded time and memory, because templates are downloaded code.

It reads one JSON object per line from standard input and answers each with one on standard output; see
:class:`experiments.input.rendering.Renderer`, which runs it. It does not import the project, so that it starts fast.
"""

import contextlib
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: puts marks around the rendered text of the block."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.used, self.marks = False, ["", ""]

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        self.used = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        begin, end = self.marks[:2]
        return f"{begin}{caller()}{end}"


class ChatTemplate:
    """A template with the functions and filters of transformers.

    Args:
      source: Jinja source.
      today: The date that `strftime_now` formats, in ISO format.
    """

    def __init__(self, source: str, today: str):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        functions = {"raise_exception": _raise, "strftime_now": datetime.fromisoformat(today).strftime}
        environment.filters["tojson"] = self._to_json
        self._template = environment.from_string(source, globals=functions)
        generation = environment.extensions[Generation.identifier]
        assert isinstance(generation, Generation)
        self._generation, self.has_generation = generation, generation.used

    def render(self, values: dict[str, Any], marks: list[str], longest: int) -> dict[str, str]:
        """Renders the template.

        Args:
          values: The template's variables.
          marks: The first two enclose the text of `{% generation %}` blocks; the values may contain the others.
          longest: Maximum number of characters of the text.

        Returns:
          The `text`, or an `error`.
        """
        self._generation.marks = marks
        try:
            parts, length = [], 0
            for part in self._template.generate(**values):
                parts.append(part)
                length += len(part)
                if length > longest:
                    return {"error": f"it renders more than {longest:,} characters"}
            return {"text": "".join(parts)}
        except Exception as error:  # a template is a program and can raise any exception
            return {"error": describe(error)}

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's filter escapes for HTML.
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        for mark in self._generation.marks if ensure_ascii else ():
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def describe(error: Exception) -> str:
    """Returns an error message for users."""
    if isinstance(error, RecursionError):
        return "the recursion is endless, or values are nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return (str(error) or type(error).__name__)[:1000]


def answer(template: ChatTemplate, request: str, marks: list[str]) -> dict[str, Any]:
    """Answers a request for renderings."""
    content = json.loads(request)
    return {"renderings": [template.render(values, marks, content["longest"]) for values in content["calls"]]}


def print_answer(seconds: float, compute: Callable[[], dict[str, Any]]) -> None:
    """Prints an answer, or the error that computing it raises.

    The kernel ends the process with SIGPROF when it exceeds its CPU time; no operation of Jinja or Python delays that.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        text = json.dumps(compute())
    except Exception as error:  # from compiling a template or parsing its messages
        text = json.dumps({"error": describe(error)})
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(text, flush=True)


def main(seconds: float, memory: int) -> None:
    """Answers requests until the input ends.

    Args:
      seconds: Maximum CPU time of a request.
      memory: Maximum bytes of address space.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # A child inherits an ignored or blocked signal from a parent that uses a profiler.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError):  # macOS defines but does not support the limit
        resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    templates: list[ChatTemplate] = []

    def compile_template() -> dict[str, Any]:
        first = json.loads(sys.stdin.readline())
        templates.append(ChatTemplate(first["source"], first["today"]))
        return {"has_generation": templates[0].has_generation}

    print_answer(seconds, compile_template)
    for line in iter(sys.stdin.readline, ""):
        header = json.loads(line)
        for request in [sys.stdin.readline() for _ in range(header["count"])]:
            print_answer(seconds, functools.partial(answer, templates[0], request, header["marks"]))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
