"""A GGUF file in place of a directory in Hugging Face layout."""

import json
from pathlib import Path
from typing import Any

from experiments.errors import UserError
from experiments.pretrained.gguf.config import derive_config, is_copied
from experiments.pretrained.gguf.reader import Content, raise_problems, read
from experiments.pretrained.gguf.tensors import GgufTensors, tensor_problems
from experiments.pretrained.gguf.tokenizer import SPECIAL, build_tokenizer

_ENDS = ("eos", "eot", "eom")


class GgufFiles:
    """The model of a GGUF file; the contents of Hugging Face's files are derived from its fields.

    Args:
      path: The file.

    Raises:
      UserError: The file cannot be used; the error lists everything wrong with its fields and tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        self._content = read(path)
        self._config = _checked_config(self._content)
        self._texts: dict[str, str] = {}
        self._builders = {
            "config.json": lambda: _dump(self._require_config()),
            "generation_config.json": self._generation_config,
            "tokenizer.json": lambda: build_tokenizer(self._content).to_str(),
            "tokenizer_config.json": self._tokenizer_config,
        }

    @property
    def weights(self) -> list[Path]:
        """The files that hold the weights."""
        return list(self._content.files)

    def where(self, name: str) -> str:
        """Returns the location of a file's content, for error messages."""
        return str(self.path)

    def read(self, name: str) -> str | None:
        """Returns the content of the file of this name in Hugging Face layout; None if there is none."""
        if name not in self._builders:
            return None
        if name not in self._texts:
            self._texts[name] = self._builders[name]()
        return self._texts[name]

    @property
    def has_weights(self) -> bool:
        """Whether the file holds weights; some hold only a tokenizer."""
        return bool(self._content.tensors)

    def read_json(self, name: str) -> dict[str, Any]:
        """Returns the JSON object in the file of this name.

        Raises:
          UserError: Hugging Face layout has no such file in this place.
        """
        text = self.read(name)
        if text is None:
            raise UserError(f"{self.path}: holds nothing in place of {name}")
        return json.loads(text)

    def tensors(self) -> GgufTensors:
        """Returns the tensors, a context manager."""
        return GgufTensors(self._content, self._require_config())

    def codes(self) -> GgufTensors | None:
        """Returns the tensors if some are stored as codes."""
        tensors = self.tensors()
        return tensors if any(map(tensors.kind, tensors)) else None

    def _require_config(self) -> dict[str, Any]:
        if self._config is None:
            raise UserError(f"{self.path}: holds a tokenizer, but no model")
        return self._config

    def _generation_config(self) -> str:
        fields = self._content.fields
        numbers = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
        ends = list(dict.fromkeys(number for number in numbers if number is not None))
        return _dump({"eos_token_id": ends or None})

    def _tokenizer_config(self) -> str:
        fields = self._content.fields
        tokens = fields.get("tokenizer.ggml.tokens") or ()
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for theirs, name in SPECIAL.items():
            number = fields.get(f"tokenizer.ggml.{theirs}_token_id")
            if number is not None:
                config[f"{name}_token"] = tokens[number]
        template, others = fields.get("tokenizer.chat_template"), fields.get("tokenizer.chat_templates") or ()
        if template is not None and others:
            named = {"default": template} | {name: fields[f"tokenizer.chat_template.{name}"] for name in others}
            config["chat_template"] = [{"name": name, "template": source} for name, source in named.items()]
        elif template is not None:
            config["chat_template"] = template
        return _dump(config)


def _checked_config(content: Content) -> dict[str, Any] | None:
    """Returns the content of `config.json`, or raises a UserError that lists everything wrong with a file.

    A file without tensors, which holds only a tokenizer, has none.
    """
    config: dict[str, Any] = {}
    problems: list[str] = [*content.file_problems]
    if content.tensors or content.problems:
        config, wrong = derive_config(content)
        problems += [*wrong, *tensor_problems(content, config, sizes=not wrong)]
    raise_problems(content.path, problems)
    return {**config, "tie_word_embeddings": config["tie_word_embeddings"] or is_copied(content)} if config else None


def _dump(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
