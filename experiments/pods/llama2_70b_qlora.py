"""Llama 2 70B in NF4 by LoRA on all linear layers (QLoRA): 64 chips of v5e."""

import dataclasses
from pathlib import Path

from experiments.configs.sft import BatchSizes
from experiments.pods import llama2_70b_lora
from experiments.training.mesh import MeshSizes

STUDY = llama2_70b_lora.STUDY
DEFAULTS = dataclasses.replace(
    llama2_70b_lora.DEFAULTS,
    out=Path("runs/llama2-70b-qlora"),
    quantize="nf4",
    mesh=MeshSizes(fsdp=64),
    batch=BatchSizes(64),
    remat="full",
)
