"""What a run records next to its adapters, so that other commands use them with the same base and the same texts."""

from pathlib import Path
from typing import Any

from experiments.configs.decoder import DecoderConfig
from experiments.configs.sft import Config
from experiments.errors import UserError, reading
from experiments.input.records import Conversation, Record
from experiments.reports.results import write_json
from experiments.studies.decoder.adapters import check_adapter, is_adapter
from experiments.studies.sft.report import ADAPTER, BEST
from lora_jax import peft

RUN = "run.json"
_PEFT_CONFIG = "adapter_config.json"
_TUPLES = ("data", "validation", "template_arguments")
_FIELDS = (
    *("model", "quantize", "dtype", "template", "control_tokens", "tokenize_together", "on_bad"),
    *("data_form", "validation_share", "train_examples", "seed", *_TUPLES),
)
_ADDED = ("double_quantization",)
"""Fields that records of earlier versions lack; these had the default."""
_SYSTEM = "system"


def write_run(directory: Path, config: DecoderConfig, record: Record) -> None:
    """Writes the record of an adapter.

    Args:
      directory: The directory of the adapter.
      config: The config of its run.
      record: A record of the run, whose system message is recorded.
    """
    messages = record.messages if isinstance(record, Conversation) else getattr(record, "prompt", "")
    contents = () if isinstance(messages, str) else messages
    system = next((message["content"] for message in contents if message["role"] == "system"), None)
    fields = {name: getattr(config, name) for name in (*_FIELDS, *_ADDED)}
    write_json(directory / RUN, fields | {_SYSTEM: system if isinstance(system, str) else None})


def find_adapter(directory: Path) -> Path:
    """Returns the directory of an adapter: the given one, or the best adapter of the run whose directory is given.

    Raises:
      UserError: The directory has no adapter.
    """
    for name in (BEST, ADAPTER):
        if not is_adapter(directory) and is_adapter(directory / name):
            return directory / name
    check_adapter(directory, "--adapter")
    return directory


def is_recorded(adapter: Path | None) -> bool:
    """Whether a run has recorded its data with an adapter."""
    return adapter is not None and (adapter / RUN).is_file()


def restore(adapter: Path | None, **changes: Any) -> tuple[Config, str | None]:
    """Returns the config that is recorded with an adapter, and the system message of its examples.

    Args:
      adapter: A directory that a run or PEFT wrote; None uses the default config.
      **changes: Fields of the config that replace the recorded ones, unless they are None.

    Raises:
      UserError: The record is damaged, or names no model.
    """
    fields, system = ({}, None) if adapter is None else _read(adapter)
    fields |= {name: value for name, value in changes.items() if value is not None}
    if adapter is not None and "model" not in fields:
        raise UserError(f"--adapter {adapter}: no base model is recorded with it; name the one it adapts with --model")
    return Config(**fields), system


def _read(adapter: Path) -> tuple[dict[str, Any], str | None]:
    path = adapter / RUN
    try:
        if path.is_file():
            content = peft.read_json(path)
            with reading(path, "the record of a run"):
                fields = {name: content[name] for name in _FIELDS}
                fields |= {name: content[name] for name in _ADDED if name in content}
                return fields | {name: tuple(fields[name]) for name in _TUPLES}, content[_SYSTEM]
        content = peft.read_json(adapter / _PEFT_CONFIG) if (adapter / _PEFT_CONFIG).is_file() else {}
    except ValueError as error:
        raise UserError(str(error)) from None
    model = content.get("base_model_name_or_path")
    return ({"model": model} if isinstance(model, str) and model else {}), None
