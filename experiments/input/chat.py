"""A checkpoint's own chat template, and the text that it renders of a conversation."""

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

TODAY = datetime(2024, 7, 26)
"""The date that a template is given, the day that Llama 3's fall back to. With the true one, tokens would depend on the
day that a run begins or resumes."""

_PROBE = "probe of a content part"
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Call:
    """What a template renders.

    Attributes:
      messages: In turn.
      tools: That the assistant may call.
      arguments: Variables that templates read, such as `enable_thinking`.
      prompt: End with what comes before an answer of the assistant's.
    """

    messages: Messages
    tools: Sequence[Tool] | None = None
    arguments: Mapping[str, Any] | None = None
    prompt: bool = False


class Template:
    """A chat template.

    It is rendered with the functions that transformers' `apply_chat_template` gives it, in a process of its own with
    bounded time, memory and output.

    Args:
      source: In Jinja.
      special_tokens: `bos_token` and so on, as the template may name them.
      where: The file it is from, for errors.
      today: The date that `strftime_now` gives.
      arguments: Variables of every rendering, such as `enable_thinking`.
      control: The tokenizer's control tokens.
      literal: Whether text of a message that spells one of them is text, not the token.
      seconds: Of computing that the renderings of one record may take.
      with_tools: The template of conversations with tools, if that is another one.

    Raises:
      UserError: It is no Jinja template.
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
        # What is no record's: it may hold control tokens.
        self._own = {"documents": None, **self.special_tokens, **self.arguments}
        self._own_texts = [source, *strings(self._own)]
        self._parts: dict[str, bool] = {}

    @property
    def marks_generation(self) -> bool:
        """Whether `{% generation %}` blocks say what the assistant says."""
        return self._renderer.has_generation

    @property
    def identity(self) -> list[Any]:
        """All that decides what is rendered, as JSON's data."""
        other = self.with_tools and self.with_tools.identity
        return [self.source, self.special_tokens, self.today.isoformat(), self.arguments, other]

    def render(self, messages: Messages, location: str, *, prompt: bool = False) -> str:
        """Messages as the text that the checkpoint was trained on.

        Args:
          messages: In turn.
          location: Where they stand, for errors.
          prompt: End with what comes before an answer of the assistant's.

        Raises:
          UserError: The template refuses them, or exceeds a limit.
        """
        return self.require(self.renderings([Call(messages, prompt=prompt)], location)[0], location).text

    def renderings(self, calls: Sequence[Call], location: str) -> list[Marked | RenderingError]:
        """What the template renders of each call of one record, as :meth:`renderings_of` does."""
        return self.renderings_of([(calls, location)])[0]

    def renderings_of(self, groups: Sequence[tuple[Sequence[Call], str]]) -> list[list[Marked | RenderingError]]:
        """What the template renders of each call, or why it refuses it. Many records at a time take less time.

        Args:
          groups: The calls of each record, and where that stands, for errors.

        Raises:
          UserError: A record cannot be given to a template.
        """
        results = self._rendered(groups, _plain)
        refused = [
            number
            for number, (calls, _) in enumerate(groups)
            if any(isinstance(one, RenderingError) for one in results[number])
            and any(_as_openai(message) != _plain(message) for call in calls for message in call.messages)
        ]
        for number, again in zip(refused, self._rendered([groups[number] for number in refused], _as_openai)):
            pairs = zip(results[number], again)
            results[number] = [
                two if isinstance(one, RenderingError) and isinstance(two, Marked) else one for one, two in pairs
            ]
        return results

    def _rendered(
        self, groups: Sequence[tuple[Sequence[Call], str]], prepare: Callable[[Message], Message]
    ) -> list[list[Marked | RenderingError]]:
        values, texts = [], list(self._own_texts)
        for calls, location in groups:
            with _nesting(location):
                values.append([self._values(call, location, prepare) for call in calls])
                texts.extend(strings(values[-1]))
        marks = Marks.absent_from(texts)
        if self._literal:
            for number, (_, location) in enumerate(groups):
                with _nesting(location):
                    values[number] = self.control.marked(values[number], marks)
        rendered = self._renderer.render([[{**self._own, **one} for one in group] for group in values], marks)
        return [[_unmarked(one, marks) for one in group] for group in rendered]

    def require(self, rendering: Marked | RenderingError, location: str) -> Marked:
        """A rendering.

        Raises:
          UserError: The template has refused it.
        """
        if isinstance(rendering, RenderingError):
            raise UserError(f"{location}: the chat template of {self.where} refuses the messages ({rendering})")
        return rendering

    def _values(self, call: Call, location: str, prepare: Callable[[Message], Message]) -> dict[str, Any]:
        """What the template is given of a record."""
        messages = [self._joined(prepare(message), location) for message in call.messages]
        tools = None if call.tools is None else list(call.tools)
        arguments = call.arguments or {}
        return {**arguments, "messages": messages, "tools": tools, "add_generation_prompt": call.prompt}

    def _joined(self, message: Message, location: str) -> Message:
        """A message whose content parts are joined, where the template takes text."""
        content = message.get("content")
        if isinstance(content, list | tuple) and not self._takes_parts(message.get("role", "user")):
            return {**message, "content": "".join(texts_of(content, location))}
        return message

    def _takes_parts(self, role: str) -> bool:
        """Whether the template renders a message of this role whose content is a list of parts."""
        if role not in self._parts:
            user = {"role": "user", "content": "?"}
            probe = {"role": role, "content": [{"type": "text", "text": _PROBE}]}
            orders = {"user": [probe], "system": [probe, user], "developer": [probe, user]}
            messages = orders.get(role, [user, probe])
            values = {**self._own, "tools": None, "messages": messages, "add_generation_prompt": False}
            ((text,),) = self._renderer.render([[values]], Marks.absent_from([*self._own_texts, *strings(values)]))
            # A template that does not know of parts prints the list, or nothing.
            self._parts[role] = (
                isinstance(text, str) and _PROBE in text and not any(quoted in text for quoted in ("'type'", '"type"'))
            )
        return self._parts[role]


def texts_of(content: Any, location: str) -> list[str]:
    """The texts of a message's content: text, a list of parts, or nothing.

    Raises:
      UserError: A part is not text.
    """
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    texts = [part if isinstance(part, str) else part.get("text") for part in content]
    if wrong := [part for part, text in zip(content, texts) if not isinstance(text, str)]:
        kind = wrong[0].get("type", "unknown")
        raise UserError(f"{location}: a content part of type {kind}; the text of messages alone can be learned here")
    return texts


@contextlib.contextmanager
def _nesting(location: str) -> Generator[None]:
    try:
        yield
    except RecursionError:
        raise UserError(f"{location}: the record is nested too deeply for a chat template") from None


def _unmarked(text: str | RenderingError, marks: Marks) -> Marked | RenderingError:
    try:
        return text if isinstance(text, RenderingError) else Marked.from_text(text, marks)
    except ValueError as error:
        return RenderingError(str(error))


def _plain(message: Message) -> Message:
    """A message as transformers gives it to templates: without nulls, its reasoning under the name that they read, and
    the arguments of calls as objects."""
    plain = {name: value for name, value in message.items() if value is not None and name != "weight"}
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return _with_calls(plain, _object)


def _as_openai(message: Message) -> Message:
    """A message in OpenAI's form, which some templates expect: content null beside calls, whose arguments are text."""
    calls = {"content": message.get("content")} if message.get("tool_calls") else {}
    return _with_calls({**_plain(message), **calls}, _text)


def _with_calls(message: Message, arguments: Callable[[Any], Any]) -> Message:
    def changed(call: Any) -> Any:
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping):
            return {**call, "function": changed(call["function"])}
        if isinstance(call, Mapping) and "arguments" in call:
            return {**call, "arguments": arguments(call["arguments"])}
        return call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [changed(call) for call in calls]} if isinstance(calls, list | tuple) else message


def _object(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


def _text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
