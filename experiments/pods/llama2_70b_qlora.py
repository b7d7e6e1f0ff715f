"""Llama 2 70B in NF4 by LoRA on all linear layers (QLoRA): 64 chips of v5e."""

from pathlib import Path

from experiments.studies.sft.config import BatchSizes, Config
from experiments.training.mesh import MeshSizes

STUDY = "experiments.studies.sft.study"
DEFAULTS = Config(
    model="meta-llama/Llama-2-70b-hf",
    out=Path("runs/llama2-70b-qlora"),
    mesh=MeshSizes(fsdp=64),
    batch=BatchSizes(64),
    quantize="nf4",
    rank=16,
    alpha=32.0,
    lr=1e-4,
    targets=("attention", "feed-forward"),
    dtype="bfloat16",
    length=2048,
    checkpoint_every=200,
)
