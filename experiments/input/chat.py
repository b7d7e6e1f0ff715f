"""A checkpoint's own chat template, and which part of what it renders the assistant said.

A template is Jinja source that comes with a checkpoint; it is rendered in a sandbox and with the functions that
`transformers.PreTrainedTokenizerBase.apply_chat_template` gives it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from experiments.errors import UserError

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]

TODAY = datetime(2024, 7, 26)
"""What a template that asks for the date is told, the day that Llama 3's fall back to. With the true one, tokens would
depend on the day that a run begins or resumes."""

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_BEGIN, _END = "\ufdd0", "\ufdd1"  # Unicode keeps these for a program's own use: no text holds them


class Template:
    """A chat template.

    Args:
      source: In Jinja.
      special_tokens: `bos_token` and so on, as the template may name them.
      where: The file it is from, for errors.
      today: The date that `strftime_now` gives.

    Raises:
      UserError: It is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str, today: datetime = TODAY):
        self.source, self.special_tokens, self.where, self.today = source, dict(special_tokens), where, today
        self.marks_generation = _BLOCK.search(source) is not None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        functions = {"raise_exception": _raise, "strftime_now": today.strftime}
        try:
            self._template = environment.from_string(source, globals=functions)
        except jinja2.TemplateError as error:
            raise UserError(f"{where}: the chat template is not valid Jinja ({error})") from None

    def render(self, messages: Messages, place: str, *, prompt: bool = False) -> str:
        """Messages as the text that the checkpoint was trained on.

        Args:
          messages: In turn.
          place: Where they stand, for errors.
          prompt: End with what comes before an answer of the assistant's.

        Raises:
          UserError: The template refuses them.
        """
        return self._marked(messages, place, prompt).replace(_BEGIN, "").replace(_END, "")

    def render_spans(self, messages: Messages, place: str) -> tuple[str, list[Span]]:
        """Messages as text, and the spans of characters that are the assistant's to say.

        They are what the template's `{% generation %}` blocks rendered. A template without these is rendered up to each
        turn of the assistant's, with the prompt for it and with the turn itself: what the second has more is the span.

        Args:
          messages: In turn.
          place: Where they stand, for errors.

        Returns:
          The text, and (begin, end) pairs of positions in it, ascending.

        Raises:
          UserError: The template refuses the messages, none is the assistant's, or the template has no blocks and
            renders a turn differently once others follow, so that there is no telling what is a turn's.
        """
        if self.marks_generation:
            text, spans = _unmarked(self._marked(messages, place, False), f"{place}: {self.where}")
        else:
            text, spans = self._rendered_by_turns(messages, place)
        if not spans:
            raise UserError(f"{place}: none of the {len(messages)} messages is the assistant's: nothing to learn")
        return text, spans

    def _rendered_by_turns(self, messages: Messages, place: str) -> tuple[str, list[Span]]:
        text, spans = self.render(messages, place), []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            given = self.render(messages[:turn], place, prompt=True)
            whole = text if turn == len(messages) - 1 else self.render(messages[: turn + 1], place)
            if not whole.startswith(given) or not text.startswith(whole):
                raise UserError(
                    f"{place}, message {turn + 1}: the chat template of {self.where} renders the conversation "
                    "differently up to here and as a whole, so that there is no telling what the assistant says in it; "
                    "a template that marks it with {% generation %} blocks can be learnt from"
                )
            spans.append((len(given), len(whole)))
        return text, spans

    def _marked(self, messages: Messages, place: str, prompt: bool) -> str:
        values = {"tools": None, "documents": None, **self.special_tokens}
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=prompt, **values)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f"{place}: the chat template of {self.where} refuses the messages ({error})") from None


def load_template(directory: Path) -> Template | None:
    """The chat template of a directory in Hugging Face layout: `chat_template.jinja`, or in `tokenizer_config.json`.

    Returns:
      The template, of several the one named `default`; None where the checkpoint has none.

    Raises:
      UserError: A file cannot be read, the template is no Jinja, or of several none is the default.
    """
    file, config_file = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    config = _read_json(config_file)
    where, found = str(config_file), config.get("chat_template")
    if file.exists():
        where, found = str(file), _read(file)
    if isinstance(found, list):
        named = {one["name"]: one["template"] for one in found}
        if "default" not in named:
            raise UserError(f"{where}: chat templates {', '.join(named)}, none of them is named default")
        found = named["default"]
    if found is None:
        return None
    special = {**_read_json(directory / "special_tokens_map.json"), **config}
    tokens = {f"{name}_token": special.get(f"{name}_token") for name in _SPECIAL}
    texts = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return Template(found, {name: text for name, text in texts.items() if text is not None}, where)


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`: puts marks around what the block renders."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_BEGIN}{caller()}{_END}"


def _unmarked(marked: str, where: str) -> tuple[str, list[Span]]:
    parts, spans, begin, length = [], [], None, 0
    for part in re.split(f"([{_BEGIN}{_END}])", marked):
        if part == _BEGIN and begin is None:
            begin = length
        elif part == _END and begin is not None:
            spans, begin = [*spans, (begin, length)] if length > begin else spans, None
        elif part in (_BEGIN, _END):
            raise UserError(f"{where}: a {{% generation %}} block stands in another one")
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would read.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(_read(path))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object")
    return found
