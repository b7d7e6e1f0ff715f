"""What is fuzzed: for every reader the valid files that it reads, and how it is called."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow
import pyarrow.parquet

import lora_jax as lora
from experiments.input import sources
from experiments.input.encoding import load_encoder
from experiments.models import checkpoint, families, location
from experiments.models.options import Options
from experiments.training.checkpoints import Checkpoints
from experiments.training.record import read as read_metrics
from lora_jax.__main__ import main

BASE = {"up": {"kernel": np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)}, "norm": np.ones(6, np.float32)}
NAMES = lora.peft.Names(
    (
        lora.peft.Weight("up/kernel", "model.up_proj.weight", lora.peft.LINEAR),
        lora.peft.Weight("norm", "model.norm.weight", lora.peft.SAME),
    )
)
CHAT = (
    "{% for message in messages %}<{{ message.role }}>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}</s>{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
      write: Writes valid files into an empty directory.
      read: Reads them; what it returns is compared.
      weight: How often it is chosen.
      checked: Whether damage must be detected: another value than that of the valid files is a finding.
      skipped: Endings of the names of files that are not changed.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    weight: int
    checked: bool = False
    skipped: tuple[str, ...] = ()


def _delta(value: float = 1.0) -> dict[str, Any]:
    spec = {"up": lora.LoRA(2, alpha=4, axes=("in", "out")), "norm": lora.Full()}
    delta = lora.init(jax.random.key(0), BASE, spec)
    return jax.tree.map(lambda leaf: leaf + value if leaf.dtype == jnp.float32 else leaf, delta)


def _numbers(delta: Any) -> dict[str, list[float]]:
    """The arrays of each path."""
    return {path: [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(node)] for path, node in delta.items()}


def _adapter(directory: Path) -> None:
    lora.save(directory / "adapter", _delta(), base=BASE)


def _peft(directory: Path) -> None:
    lora.peft.save(directory / "adapter", _delta(), NAMES, base=BASE)


def _checkpoint(directory: Path) -> None:
    """A base with two shards, and an adapter for it."""
    _peft(directory)
    base = directory / "base"
    base.mkdir()
    tensors = [("model.up_proj.weight", BASE["up"]["kernel"].T), ("model.norm.weight", BASE["norm"])]
    lora.peft.write_model(base, tensors, shard_bytes=100)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def _command(*args: str) -> Callable[[Path], Any]:
    """A command line, whose errors are one sentence and status 2."""

    def read(directory: Path) -> Any:
        shutil.rmtree(directory / "out", ignore_errors=True)
        output, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
            status = main([arg.format(directory) for arg in args])
        if status not in (0, 1, 2) or "Traceback" in error.getvalue():
            raise AssertionError(f"status {status}: {error.getvalue()}")
        if status == 2:
            raise ValueError(error.getvalue().rpartition("error: ")[2])
        return None

    return read


def _model(directory: Path) -> None:
    for file in location.find("tiny-llama").iterdir():
        if file.is_file() and file.suffix in (".json", ".safetensors"):
            shutil.copyfile(file, directory / file.name)


def _read_model(directory: Path) -> Any:
    config = checkpoint.read_config(directory)
    family = families.get_family(config)
    shape = family.shape(config)
    model = family.load(directory, Options())
    del model
    return str(shape)


def _read_shape(directory: Path) -> Any:
    config = checkpoint.read_config(directory)
    return str(families.get_family(config).shape(config))


def _tokenizer(directory: Path) -> None:
    shutil.copyfile(location.find("tiny-llama") / "tokenizer.json", directory / "tokenizer.json")
    config = {"bos_token": "<s>", "eos_token": "</s>", "model_max_length": 1e30}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT)


def _read_tokenizer(directory: Path) -> Any:
    data = directory / "data.jsonl"
    data.write_text(json.dumps({"messages": MESSAGES}))
    records = sources.splits(str(data))[0]
    data.unlink()
    encoder = load_encoder(directory, None)
    encoder.encode([records[0]], [records.location(0)])
    encoder.encode_prompt(records[0], records.location(0))


MESSAGES = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well."}]
RECORDS: dict[str, list[Any]] = {
    "chat": [{"messages": MESSAGES}] * 3,
    "sharegpt": [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 3,
    "alpaca": [{"instruction": "a", "input": "", "output": "b"}] * 3,
    "completion": [{"prompt": "a", "completion": "b"}] * 3,
    "text": [{"text": "a text"}] * 3,
}


def _data(form: str, ending: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        records, file = RECORDS[form], directory / f"data{ending}"
        table, lines = pyarrow.Table.from_pylist(records), "".join(json.dumps(record) + "\n" for record in records)
        if ending == ".parquet":
            pyarrow.parquet.write_table(table, file)
        elif ending == ".arrow":
            with pyarrow.OSFile(str(file), "wb") as stream, pyarrow.ipc.new_stream(stream, table.schema) as writer:
                writer.write_table(table)
        elif ending in (".gz", ".zst"):
            file = directory / f"data.jsonl{ending}"
            with pyarrow.output_stream(str(file), compression={".gz": "gzip", ".zst": "zstd"}[ending]) as stream:
                stream.write(lines.encode())
        elif ending == ".csv":
            rows = [records[0], *(record.values() for record in records)]
            file.write_text("".join(",".join(f'"{field}"' for field in row) + "\r\n" for row in rows))
        else:
            file.write_text(json.dumps(records, indent=1) if ending == ".json" else lines)

    return write


def _read_data(directory: Path) -> Any:
    (file,) = directory.iterdir()
    records = sources.splits(str(file))[0]
    return [repr(records[i]) for i in range(min(len(records), 10))]


TX = optax.sgd(1e-2, momentum=0.9)


def _state(value: float = 1.0) -> lora.TrainState:
    return lora.TrainState.create(jax.tree.map(jnp.asarray, BASE), _delta(value), TX, jax.random.key(1))


def _run(directory: Path) -> None:
    with Checkpoints(directory / "checkpoints", settings={"lr": 0.1}) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, _state(step), {"losses": [1.0] * step}, score=0.5)


def _read_run(directory: Path) -> Any:
    with Checkpoints(directory / "checkpoints", settings={"lr": 0.1}, say=lambda line: None) as checkpoints:
        state, _ = checkpoints.restore(_state(0))
    return _numbers(state.delta)["norm"] in ([[[v + 1.0] * 6] for v in (0, 1, 2)])


def _metrics(directory: Path) -> None:
    (directory / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n')


def _saved_state(directory: Path) -> None:
    lora.save_state(directory / "state", _state())


def _restored_state(directory: Path) -> Any:
    state = lora.restore_state(directory / "state", jax.tree.map(jnp.asarray, BASE), TX)
    return {"delta": _numbers(state.delta), "rest": [np.asarray(x).tolist() for x in jax.tree.leaves(state.opt_state)]}


@cache
def readers() -> dict[str, Reader]:
    """All readers; those of functions that a version lacks are left out."""
    readers = {
        "load": Reader(_adapter, lambda d: _numbers(lora.load(d / "adapter")), 6, checked=True),
        "load with base": Reader(_adapter, lambda d: _numbers(lora.load(d / "adapter", BASE)), 6, checked=True),
        "peft.load": Reader(_peft, lambda d: len(lora.peft.load(d / "adapter", BASE, NAMES)), 10),
        "inspect": Reader(_peft, _command("inspect", "{}/adapter"), 4),
        "inspect, native": Reader(_adapter, _command("inspect", "{}/adapter"), 2),
        "inspect with base": Reader(_checkpoint, _command("inspect", "{}/adapter", "--base", "{}/base"), 4),
        "merge": Reader(_checkpoint, _command("merge", "{}/base", "{}/adapter", "{}/out"), 6),
        "convert": Reader(_peft, _command("convert", "{}/adapter", "{}/out", "--target", "peft"), 4),
        "diff": Reader(_peft, _command("diff", "{}/adapter", "{}/adapter"), 2),
        "model": Reader(_model, _read_model, 2, skipped=("tokenizer.json",)),
        "config.json": Reader(_model, _read_shape, 8, skipped=("tokenizer.json", ".safetensors")),
        "tokenizer": Reader(_tokenizer, _read_tokenizer, 12),
        "checkpoints": Reader(_run, _read_run, 1, checked=True),
        "metrics.jsonl": Reader(_metrics, lambda d: len(read_metrics(d / "metrics.jsonl")), 2),
    }
    if hasattr(lora, "restore_state"):
        readers["restore_state"] = Reader(_saved_state, _restored_state, 4, checked=True)
    for form in RECORDS:
        for ending in (".jsonl", ".parquet"):
            readers[f"data: {form}{ending}"] = Reader(_data(form, ending), _read_data, 2)
    for ending in (".json", ".csv", ".arrow", ".gz", ".zst"):
        readers[f"data: completion{ending}"] = Reader(_data("completion", ending), _read_data, 2)
    return readers
