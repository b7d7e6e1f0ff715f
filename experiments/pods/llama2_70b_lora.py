"""Llama 2 70B by LoRA on all linear layers: 32 chips of v5p."""

from pathlib import Path

from experiments.configs.sft import BatchSizes, Config
from experiments.training.mesh import MeshSizes

STUDY = "experiments.studies.sft.study"
DEFAULTS = Config(
    model="meta-llama/Llama-2-70b-chat-hf",
    out=Path("runs/llama2-70b-lora"),
    mesh=MeshSizes(fsdp=32),
    batch=BatchSizes(32),
    rank=16,
    alpha=32.0,
    lr=1e-4,
    targets=("attention", "feed-forward"),
    dtype="bfloat16",
    length=2048,
    remat="dots",
    checkpoint_every=200,
)
