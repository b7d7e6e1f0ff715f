"""A program that renders one chat template, with bounded time and memory: templates come with downloads.

It reads a JSON object a line from the standard input and answers each with one on the standard output; see
:class:`experiments.input.rendering.Renderer`, which runs it. It imports nothing of the project, so that it starts fast.
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
    """`{% generation %} … {% endgeneration %}`: puts marks around what the block renders."""

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
    """A template with the functions and filters that transformers gives it.

    Args:
      source: In Jinja.
      today: The date that `strftime_now` gives, in ISO's format.
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
        """The text of one rendering, or the error that ends it.

        Args:
          values: Of the template's variables.
          marks: The first two stand around what `{% generation %}` blocks render; the values may hold the others.
          longest: Characters of the text.
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
        except Exception as error:  # a template is a program, and can raise anything
            return {"error": described(error)}

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes what HTML would read.
        text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        for mark in self._generation.marks if ensure_ascii else ():
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def described(error: Exception) -> str:
    """What is wrong, in words for a user."""
    if isinstance(error, RecursionError):
        return "it recurses without end, or something is nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return (str(error) or type(error).__name__)[:1000]


def answer(template: ChatTemplate, request: str, marks: list[str]) -> dict[str, Any]:
    """What is answered to a request for some renderings."""
    content = json.loads(request)
    return {"renderings": [template.render(values, marks, content["longest"]) for values in content["calls"]]}


def limited(seconds: float, compute: Callable[[], dict[str, Any]]) -> None:
    """Prints an answer, or the error that ends its computation.

    The kernel ends the process (SIGPROF) after some seconds of computing: no operation of Jinja or Python delays it.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        text = json.dumps(compute())
    except Exception as error:  # what the compilation of a template, or the reading of its messages, raises
        text = json.dumps({"error": described(error)})
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(text, flush=True)


def main(seconds: float, memory: int) -> None:
    """Answers requests until the input ends.

    Args:
      seconds: Of computing that a request may take.
      memory: Bytes that the process may map.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    # A parent that ignores or blocks the signal, as one does that has loaded a profiler, passes that on.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError):  # macOS has the name, but not the limit
        resource.setrlimit(resource.RLIMIT_AS, (memory if hard == resource.RLIM_INFINITY else min(memory, hard), hard))
    templates: list[ChatTemplate] = []

    def compiled() -> dict[str, Any]:
        first = json.loads(sys.stdin.readline())
        templates.append(ChatTemplate(first["source"], first["today"]))
        return {"has_generation": templates[0].has_generation}

    limited(seconds, compiled)
    for line in iter(sys.stdin.readline, ""):
        header = json.loads(line)
        for request in [sys.stdin.readline() for _ in range(header["count"])]:
            limited(seconds, functools.partial(answer, templates[0], request, header["marks"]))


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
