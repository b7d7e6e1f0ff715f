"""Exports a trained sentence classifier in PEFT's format: the encoder's adapter, and the head in a separate file.

transformers has no model with a linear layer on the mean over tokens. The exported adapter is therefore for the bare
encoder, as `AutoModel` opens it, and depends only on the published weights. The head is two tensors, and a README has a
few lines of PyTorch that combine them.
"""

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import lora_jax as lora
from experiments.models import bert, checkpoint, classifier, location
from experiments.studies.problem import HEAD, Problem
from lora_jax.io import replace_file

DIRECTORY, LOGITS = "peft", "test_logits.npy"
_PUBLISHED = {location.MINILM: "sentence-transformers/all-MiniLM-L6-v2"}  # names on the Hugging Face Hub
_README = """# LoRA on {title}

Written by lora_jax. The adapter is for the encoder as transformers opens it. `classifier.safetensors` contains the head
on the mean of the token vectors.{note}

```python
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

base, adapter = {base}, "."
tokenizer = AutoTokenizer.from_pretrained(base)
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
head = load_file(f"{{adapter}}/classifier.safetensors")
labels = {labels}


@torch.no_grad()
def logits(texts):
    batch = tokenizer(texts, padding=True, truncation=True, max_length={length}, return_tensors="pt")
    mask = batch["attention_mask"][..., None]
    sentences = (encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    return sentences @ head["weight"].T + head["bias"]


print(labels[logits(["a chess engine"]).argmax()])
```
"""


_QUANTIZED = """

It was trained with linear layers in NF4 (double quantization, blocks of 64); the code below uses float weights."""


def export(
    problem: Problem,
    delta: Mapping[str, Any],
    model: str,
    directory: Path,
    logits: np.ndarray,
    *,
    quantized: bool = False,
) -> None:
    """Writes `peft/`, and the logits for :mod:`experiments.checks.exported_quickstart`.

    Args:
      problem: The model and the task.
      delta: LoRA on the encoder, and the classifier.
      model: The base; see :func:`experiments.models.location.find`.
      directory: The directory of the run.
      logits: The logits of the test examples with the published weights.
      quantized: Whether the base was quantized in training, for the README.
    """
    checkpoint_directory = location.find(model)
    base = published_name(model)
    head = HEAD.removeprefix("^")
    encoder = {path: adapter for path, adapter in delta.items() if not path.startswith(head)}
    merged = lora.merge(problem.base, {path: delta[path] for path in delta.keys() - encoder.keys()})["classifier"]
    names = classifier.encoder_names(bert.BertConfig.from_json(checkpoint.read_config(checkpoint_directory)))
    output = directory / DIRECTORY
    lora.peft.save(output, encoder, names, base_model=base, task_type="FEATURE_EXTRACTION")
    tensors = {"weight": np.ascontiguousarray(np.asarray(merged["kernel"]).T), "bias": np.asarray(merged["bias"])}
    with replace_file(output / "classifier.safetensors") as file:
        save_file(tensors, file)
    labels = textwrap.fill(json.dumps(problem.names), 100, subsequent_indent="    ", break_long_words=False)
    text = _README.format(
        title=base,
        base=json.dumps(base),
        labels=labels,
        length=problem.lengths[-1],
        note=_QUANTIZED if quantized else "",
    )
    with replace_file(output / "README.md") as file:
        file.write_text(text, encoding="utf-8")
    np.save(directory / LOGITS, logits)


def published_name(model: str) -> str:
    """Returns the name of a base by which transformers finds it: on the Hugging Face Hub, or its directory."""
    return _PUBLISHED.get(model, str(Path(model).absolute()) if Path(model).is_dir() else model)
