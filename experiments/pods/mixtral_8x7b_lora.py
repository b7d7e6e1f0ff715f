"""Mixtral 8x7B by LoRA on attention and experts: 16 chips of v5e."""

from pathlib import Path

from experiments.configs.sft import BatchSizes, Config
from experiments.training.mesh import MeshSizes

STUDY = "experiments.studies.sft.study"
DEFAULTS = Config(
    model="mistralai/Mixtral-8x7B-Instruct-v0.1",
    out=Path("runs/mixtral-8x7b-lora"),
    mesh=MeshSizes(fsdp=8, tensor=2, sequence=True),
    batch=BatchSizes(32),
    rank=16,
    alpha=32.0,
    lr=1e-4,
    targets=("attention", "feed-forward"),
    dtype="bfloat16",
    length=2048,
    checkpoint_every=200,
)
