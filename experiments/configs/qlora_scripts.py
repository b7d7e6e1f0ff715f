"""The hyperparameters of the scripts of QLoRA's authors for models of 7B parameters.

With more parameters the scripts have a dropout rate of 0.05 (13B to 65B) and a learning rate of 1e-4 (33B and 65B).
"""

from typing import Any

RANK = 64
SCRIPTS: dict[str, Any] = {
    "alpha": 16.0,
    "dropout": 0.1,
    "lr": 2e-4,
    "batch_size": 16,
    "steps": 1875,
    "warmup": 0.0,  # the scripts pass 3 %, which Hugging Face's constant schedule ignores
    "clip": 0.3,
    "length": 512,
}
FIXED: dict[str, Any] = {"schedule": "constant", "pack": False, "dtype": "bfloat16"}
"""Settings that other studies of the paper do not offer as flags."""
