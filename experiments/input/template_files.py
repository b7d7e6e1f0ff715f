"""Loads chat templates from a checkpoint's files or from a user's setting."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.errors import UserError, reading
from experiments.input.chat import Template
from experiments.input.control import ControlTokens
from experiments.pretrained.files import ModelFiles, open_files

CONFIG, _MAP = "tokenizer_config.json", "special_tokens_map.json"
_ALONE, _IN_JSON, _OTHERS = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def load_template(
    model: Path,
    *,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    control: ControlTokens | None = None,
    literal: bool = True,
) -> Template | None:
    """Loads the chat template of a checkpoint in Hugging Face layout, or of a GGUF file.

    It is in `chat_template.jinja`, `chat_template.json` or `tokenizer_config.json`.

    Args:
      model: The checkpoint.
      template: A template to use instead of the default: a file, Jinja source, or the name of one of the checkpoint's.
      arguments: Variables of every rendering.
      control: The tokenizer's control tokens.
      literal: Whether the spelling of a control token in a message is text instead of the token.

    Returns:
      The template; None if the checkpoint has none. If it has several, the one named `default`, with the one named
      `tool_use` for conversations with tools.

    Raises:
      UserError: A file cannot be read, a template is not valid Jinja, or none of several templates is the default.
    """
    where, named = _templates(open_files(model))
    tokens = special_tokens(model)
    default = "default"
    if template is not None and template in named:
        default = template
    elif template is not None:
        where, named = _from_setting(template, named)
    if not named:
        return None
    if default not in named:
        raise UserError(f"{where}: expected a chat template named {default}, got {', '.join(named)}")

    for name in arguments or ():
        if not any(re.search(rf"\b{re.escape(name)}\b", source) for source in named.values()):
            raise UserError(f"--template-arguments: the chat template of {where} does not use the variable {name}")

    def build(name: str, other: Template | None = None) -> Template:
        options: Any = {"arguments": arguments, "control": control, "literal": literal, "with_tools": other}
        return Template(named[name], tokens, where, **options)

    return build(default, build("tool_use") if "tool_use" in named and template is None else None)


def special_tokens(model: Path) -> dict[str, str]:
    """Reads a checkpoint's special tokens, such as `bos_token`.

    Raises:
      UserError: A file cannot be read, or a token is not text.
    """
    files = open_files(model)
    config = _read_object(files, CONFIG)
    special = {**_read_object(files, _MAP), **config}
    texts = {}
    for name in (f"{name}_token" for name in _SPECIAL):
        token = special.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(text, str):
            where, value = files.where(CONFIG if name in config else _MAP), json.dumps(token)[:100]
            raise UserError(f"{where}: {name} is {value}, expected a string or an object with content")
        if text is not None:
            texts[name] = text
    return texts


def _templates(files: ModelFiles) -> tuple[str, dict[str, str]]:
    """Returns the location of the templates, and the templates by name."""
    if (alone := files.read(_ALONE)) is not None:
        others = {path.stem: _read(path) for path in sorted((files.path / _OTHERS).glob("*.jinja"))}
        return files.where(_ALONE), {**others, "default": alone}
    name = CONFIG if files.read(_IN_JSON) is None else _IN_JSON
    where, content = files.where(name), _read_object(files, name).get("chat_template")
    if content is None:
        return where, {}
    if isinstance(content, str):
        return where, {"default": content}
    entries = content if isinstance(content, list) else [content]
    named = {}
    for entry in entries:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        if isinstance(name, str) and isinstance(text, str):
            named[name] = text
    if len(named) < len(entries):
        raise UserError(
            f"{where}: chat_template is {json.dumps(content)[:100]}, expected a string, or a list of objects with "
            "name and template"
        )
    return where, named


def _from_setting(template: str, named: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    path = Path(template)
    if "{" in template:
        return "--template", {"default": template}
    if not path.is_file():
        why = "is a directory, not a file" if path.is_dir() else "no such file"
        names = f"; the checkpoint has the templates {', '.join(named)}" if named else ""
        raise UserError(f"--template {template}: {why}{names}")
    return str(path), {"default": _read(path)}


def _read(path: Path) -> str:
    with reading(path, "UTF-8 text"):
        return path.read_text("utf-8")


def _read_object(files: ModelFiles, name: str) -> dict[str, Any]:
    text, where = files.read(name), files.where(name)
    if text is None:
        return {}
    with reading(where, "JSON"):
        content = json.loads(text)
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected a JSON object")
    return content
