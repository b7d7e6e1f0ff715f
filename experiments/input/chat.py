"""Chat templates and the text that they render for conversations."""

import contextlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from experiments.errors import UserError
from experiments.input.control import ControlTokens, Marked, Marks, strings
from experiments.input.records import Message, Tool
from experiments.input.rendering import SECONDS, Renderer, RenderingError

Messages = Sequence[Message]
Rendering = Marked | RenderingError

TODAY = datetime(2024, 7, 26)
"""The date for templates, Llama 3's default. With the current date, the tokens would depend on the day on which a run
starts or resumes."""

_PROBE = "probe of a content part"
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Call:
    """The input of one rendering.

    Attributes:
      messages: The conversation.
      tools: The functions that the assistant may call.
      arguments: Variables that the template reads, such as `enable_thinking`.
      prompt: Whether to append the text that precedes an answer (`add_generation_prompt`).
    """

    messages: Messages
    tools: Sequence[Tool] | None = None
    arguments: Mapping[str, Any] | None = None
    prompt: bool = False


class Template:
    """A chat template.

    It is rendered with the functions of transformers' `apply_chat_template`, in a separate process with bounded time,
    memory and output.

    Args:
      source: Jinja source.
      special_tokens: Variables such as `bos_token`.
      where: The template's file, for error messages.
      today: The date that `strftime_now` formats.
      arguments: Variables of every rendering, such as `enable_thinking`.
      control: The tokenizer's control tokens.
      literal: Whether the spelling of a control token in a message is text instead of the token.
      seconds: Maximum CPU time for rendering one record.
      with_tools: The template for conversations with tools, if it differs.

    Raises:
      UserError: The source is not valid Jinja.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        where: str,
        today: datetime = TODAY,
        *,
        arguments: Mapping[str, Any] | None = None,
        control: ControlTokens | None = None,
        literal: bool = True,
        seconds: float = SECONDS,
        with_tools: "Template | None" = None,
    ):
        self.source, self.special_tokens, self.where, self.today = source, dict(special_tokens), where, today
        self.arguments, self.with_tools = dict(arguments or {}), with_tools
        self.control, self._literal = control or ControlTokens(()), literal
        self._renderer = Renderer(source, where, today, seconds)
        # Variables that do not come from a record: they may contain control tokens.
        self._variables = {"documents": None, **self.special_tokens, **self.arguments}
        self._trusted_texts = [source, *strings(self._variables)]
        self._parts: dict[str, bool] = {}

    @property
    def marks_generation(self) -> bool:
        """Whether `{% generation %}` blocks mark the assistant's text."""
        return self._renderer.has_generation

    @property
    def identity(self) -> list[Any]:
        """Everything that determines the rendered text, as JSON data."""
        other = self.with_tools and self.with_tools.identity
        return [self.source, self.special_tokens, self.today.isoformat(), self.arguments, other]

    def render(self, messages: Messages, location: str, *, prompt: bool = False) -> str:
        """Renders a conversation.

        Args:
          messages: The conversation.
          location: Its location, for error messages.
          prompt: Whether to append the text that precedes an answer.

        Raises:
          UserError: The template raises an error or exceeds a limit.
        """
        return self.require(self.renderings([Call(messages, prompt=prompt)], location)[0], location).text

    def renderings(self, calls: Sequence[Call], location: str) -> list[Rendering]:
        """Renders each call of one record; see :meth:`renderings_of`."""
        return self.renderings_of([(calls, location)])[0]

    def renderings_of(self, groups: Sequence[tuple[Sequence[Call], str]]) -> list[list[Rendering]]:
        """Renders the calls of records. It is faster for many records at once.

        Args:
          groups: The calls of each record, and the record's location for error messages.

        Returns:
          The text or the error of each call.

        Raises:
          UserError: A record is nested too deeply, or has content that is not text.
        """
        results = self._render(groups, _plain)
        failed = [
            number
            for number, (calls, _) in enumerate(groups)
            if any(isinstance(result, RenderingError) for result in results[number])
            and any(_as_openai(message) != _plain(message) for call in calls for message in call.messages)
        ]
        retries = self._render([groups[number] for number in failed], _as_openai)
        for number, retried in zip(failed, retries):
            results[number] = [
                second if isinstance(first, RenderingError) and isinstance(second, Marked) else first
                for first, second in zip(results[number], retried)
            ]
        return results

    def _render(
        self, groups: Sequence[tuple[Sequence[Call], str]], prepare: Callable[[Message], Message]
    ) -> list[list[Rendering]]:
        values, texts = [], list(self._trusted_texts)
        for calls, location in groups:
            with _nesting_errors(location):
                values.append([self._values(call, location, prepare) for call in calls])
                texts.extend(strings(values[-1]))
        marks = Marks.absent_from(texts)
        if self._literal:
            for number, (_, location) in enumerate(groups):
                with _nesting_errors(location):
                    values[number] = self.control.mark(values[number], marks)
        variables = [[self._variables | call for call in group] for group in values]
        return [[_read_marks(text, marks) for text in group] for group in self._renderer.render(variables, marks)]

    def require(self, rendering: Rendering, location: str) -> Marked:
        """Returns the text of a rendering.

        Raises:
          UserError: The rendering is an error.
        """
        if isinstance(rendering, RenderingError):
            raise UserError(f"{location}: the chat template of {self.where} does not accept the messages ({rendering})")
        return rendering

    def _values(self, call: Call, location: str, prepare: Callable[[Message], Message]) -> dict[str, Any]:
        """Returns the template's variables for a call."""
        messages = [self._join_parts(prepare(message), location) for message in call.messages]
        tools = None if call.tools is None else list(call.tools)
        arguments = call.arguments or {}
        return {**arguments, "messages": messages, "tools": tools, "add_generation_prompt": call.prompt}

    def _join_parts(self, message: Message, location: str) -> Message:
        """Joins the content parts of a message if the template expects text."""
        content = message.get("content")
        if isinstance(content, list | tuple) and not self._takes_parts(message.get("role", "user")):
            return {**message, "content": "".join(texts_of(content, location))}
        return message

    def _takes_parts(self, role: str) -> bool:
        """Whether the template renders a message of this role if its content is a list of parts."""
        if role not in self._parts:
            user = {"role": "user", "content": "?"}
            probe = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
            orders = {"user": [probe], "system": [probe, user], "developer": [probe, user]}
            messages = orders.get(role, [user, probe])
            values = {**self._variables, "tools": None, "messages": messages, "add_generation_prompt": False}
            ((text,),) = self._renderer.render([[values]], Marks.absent_from([*self._trusted_texts, *strings(values)]))
            # A template without support for parts prints the list, or nothing.
            self._parts[role] = (
                isinstance(text, str) and _PROBE in text and not any(quoted in text for quoted in ("'type'", '"type"'))
            )
        return self._parts[role]


def texts_of(content: Any, location: str) -> list[str]:
    """Returns the texts of a message's content, which is text, a list of parts, or None.

    Raises:
      UserError: A part is not text.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if unsupported := [part for part, text in zip(content, texts) if not isinstance(text, str)]:
        kind = unsupported[0].get("type", "unknown")
        raise UserError(f"{location}: a content part of type {kind}; only text is supported")
    return texts


@contextlib.contextmanager
def _nesting_errors(location: str) -> Generator[None]:
    try:
        yield
    except RecursionError:
        raise UserError(f"{location}: the record is nested too deeply for a chat template") from None


def _read_marks(text: str | RenderingError, marks: Marks) -> Rendering:
    try:
        return text if isinstance(text, RenderingError) else Marked.from_text(text, marks)
    except ValueError as error:
        return RenderingError(str(error))


def _plain(message: Message) -> Message:
    """Returns a message in the form that transformers passes to templates: without nulls, with its reasoning under all
    names that templates read, and with the arguments of calls as objects."""
    plain = {name: value for name, value in message.items() if value is not None and name != "weight"}
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return _with_calls(plain, _object)


def _as_openai(message: Message) -> Message:
    """Returns a message in OpenAI's form, which some templates expect: arguments are text, content may be null."""
    calls = {"content": message.get("content")} if message.get("tool_calls") else {}
    return _with_calls({**_plain(message), **calls}, _text)


def _with_calls(message: Message, arguments: Callable[[Any], Any]) -> Message:
    def convert(call: Any) -> Any:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            return {**call, "function": convert(call["function"])}
        if isinstance(call, Mapping) and "arguments" in call:
            return {**call, "arguments": arguments(call["arguments"])}
        return call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [convert(call) for call in calls]} if isinstance(calls, list | tuple) else message


def _object(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
