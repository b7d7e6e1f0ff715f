"""Llama 3 8B by DoRA on all linear layers: 16 chips of v5e."""

from pathlib import Path

from experiments.studies.sft.config import BatchSizes, Config
from experiments.training.mesh import MeshSizes

STUDY = "experiments.studies.sft.study"
DEFAULTS = Config(
    model="meta-llama/Meta-Llama-3-8B",
    out=Path("runs/llama3-8b-dora"),
    mesh=MeshSizes(fsdp=16),
    batch=BatchSizes(64),
    method="dora",
    rank=16,
    alpha=32.0,
    lr=2e-4,
    targets=("attention", "feed-forward"),
    dtype="bfloat16",
    length=2048,
    checkpoint_every=200,
)
