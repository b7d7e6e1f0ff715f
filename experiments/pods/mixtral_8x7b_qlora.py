"""Mixtral 8x7B in NF4 by LoRA on attention and experts (QLoRA): 8 chips of v5e."""

import dataclasses
from pathlib import Path

from experiments.configs.sft import BatchSizes
from experiments.pods import mixtral_8x7b_lora
from experiments.training.mesh import MeshSizes

STUDY = mixtral_8x7b_lora.STUDY
DEFAULTS = dataclasses.replace(
    mixtral_8x7b_lora.DEFAULTS,
    out=Path("runs/mixtral-8x7b-qlora"),
    quantize="nf4",
    mesh=MeshSizes(fsdp=4, tensor=2, sequence=True),
    batch=BatchSizes(16),
)
