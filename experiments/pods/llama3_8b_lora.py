"""Llama 3 8B by LoRA on all linear layers: 16 chips of v5e."""

from pathlib import Path

from experiments.configs.sft import BatchSizes, Config
from experiments.training.mesh import MeshSizes

STUDY = "experiments.studies.sft.study"
DEFAULTS = Config(
    model="meta-llama/Meta-Llama-3-8B-Instruct",
    out=Path("runs/llama3-8b-lora"),
    mesh=MeshSizes(fsdp=16),
    batch=BatchSizes(64),
    rank=16,
    alpha=32.0,
    lr=2e-4,
    targets=("attention", "feed-forward"),
    dtype="bfloat16",
    length=2048,
    checkpoint_every=200,
)
