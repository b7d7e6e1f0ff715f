"""Llama 3 8B by DoRA on all linear layers: 16 chips of v5e."""

import dataclasses
from pathlib import Path

from experiments.pods import llama3_8b_lora

STUDY = llama3_8b_lora.STUDY
DEFAULTS = dataclasses.replace(llama3_8b_lora.DEFAULTS, out=Path("runs/llama3-8b-dora"), method="dora")
