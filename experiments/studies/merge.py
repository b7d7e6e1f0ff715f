"""Merges an adapter into its base, as a checkpoint in Hugging Face layout."""

import dataclasses
from pathlib import Path

import jax

import lora_jax as lora
from experiments.configs.merge import Config
from experiments.errors import UserError
from experiments.models import checkpoint
from experiments.studies.sft import recorded
from experiments.studies.sft.assistant import Assistant
from experiments.training import processes

_DTYPES = ("dtype", "torch_dtype")  # in newer and older versions of transformers


def run(config: Config) -> Path:
    """Writes the merged checkpoint; returns its directory.

    Raises:
      UserError: Model or adapter are missing, malformed or incompatible, or the output exists.
    """
    if config.adapter is None:
        raise UserError("--adapter: name the adapter to merge, such as the output directory of a run of sft")
    if jax.process_count() > 1:
        raise UserError("merge runs in one process; --mesh uses all of its devices")
    adapter = recorded.find_adapter(config.adapter)
    trained, _ = recorded.restore(adapter, model=config.model, dtype=config.dtype, mesh=config.mesh)
    # Length and rank are those of a training step, which every model supports.
    trained = dataclasses.replace(trained, quantize="none", length=2, rank=1)
    assistant = Assistant.of(trained)
    with jax.set_mesh(assistant.program.mesh):
        base, delta = assistant.load(adapter)
        merged = lora.merge(base, delta)
    program = assistant.program
    model_config = checkpoint.read_config(assistant.directory)
    model_config |= {name: trained.dtype for name in _DTYPES if name in model_config}
    names = program.family.names(program.shape)
    checkpoint.save(config.out, merged, names, model_config, tokenizer=assistant.directory)
    processes.console().print(
        f"{config.out}: {trained.model} with {len(delta)} weights changed by {adapter}, in {trained.dtype}",
        highlight=False,
        soft_wrap=True,
    )
    return config.out
