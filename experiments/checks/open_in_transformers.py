"""Checks that transformers computes the same logits from a merged model that this project wrote.

The two steps may run in different environments: the first needs this project, the second torch and transformers.

    python -m experiments.checks.open_in_transformers write CHECKPOINT DIRECTORY
    python experiments/checks/open_in_transformers.py compare DIRECTORY

CHECKPOINT is a classifier in Hugging Face layout: BERT, RoBERTa, DeBERTa-v2 or ViT. The first step adapts every
kernel with a random LoRA and writes the merged model and the logits of random inputs. The second opens the model with
`AutoModelFor…Classification`, fails if a weight is missing or unused, and compares the logits.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

_INPUTS = "logits.npz"
_TOLERANCE = 1e-4


def write(checkpoint: Path, directory: Path, rank: int) -> None:
    """Writes the merged model, its inputs and its logits."""
    import jax

    import lora_jax as lora
    from experiments.models import checkpoint as weights
    from experiments.models import heads, vit

    config = weights.read_config(checkpoint)
    rng = np.random.default_rng(0)
    if config["model_type"] == "vit":
        model = vit.load(checkpoint)
        size, channels = model.config.image_size, model.config.num_channels
        images = rng.normal(size=(3, size, size, channels)).astype(np.float32)
        inputs, arguments, names = (images,), {"pixel_values": images.transpose(0, 3, 1, 2)}, vit.NAMES
    else:
        model = heads.load(checkpoint)
        shape = model.encoder.config
        mask = (np.arange(16)[None] < np.array([[16], [9], [4]])).astype(np.int32)
        padding = config.get("pad_token_id") or 0
        tokens = np.where(mask, rng.integers(padding + 1, shape.vocab_size, mask.shape), padding).astype(np.int32)
        types = rng.integers(0, max(shape.type_vocab_size, 1), mask.shape).astype(np.int32)
        inputs, names = (tokens, mask, types), heads.names(shape)
        arguments = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}
    apply_fn, base = lora.nnx.functional(model)
    delta = lora.init(jax.random.key(0), base, {"kernel$": lora.LoRA(rank=rank)}, apply_fn, *inputs)
    key = jax.random.key(1)
    delta = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape) if x.ndim > 1 else x, delta)
    adapted = jax.jit(lora.adapt(apply_fn))(base, delta, *inputs)
    difference = np.abs(adapted - jax.jit(apply_fn)(base, *inputs)).max()
    weights.save(directory, lora.merge(base, delta), names, config, tokenizer=checkpoint)
    np.savez(directory / _INPUTS, **{"logits": adapted, **arguments})  # pyrefly: ignore[bad-argument-type]
    print(f"{directory}: {config['model_type']}, the adapter changes the logits by up to {difference:.3g}")


def compare(directory: Path) -> None:
    """Opens the model with transformers and compares the logits.

    Raises:
      SystemExit: Weights are missing or unused, or the logits differ by more than float32 explains.
    """
    import torch  # pyrefly: ignore[missing-import]
    import transformers  # pyrefly: ignore[missing-import]

    kind = json.loads((directory / "config.json").read_text(encoding="utf-8"))["model_type"]
    auto = (
        transformers.AutoModelForImageClassification
        if kind == "vit"
        else transformers.AutoModelForSequenceClassification
    )
    model, report = auto.from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    if problems := {what: sorted(map(str, names)) for what, names in report.items() if names}:
        sys.exit(f"{directory}: transformers reports {problems}")
    with np.load(directory / _INPUTS) as stored:
        arguments = {
            name: torch.from_numpy(x if x.dtype == np.float32 else x.astype(np.int64)) for name, x in stored.items()
        }
    expected = arguments.pop("logits").numpy()
    with torch.no_grad():
        logits = model.eval()(**arguments).logits.numpy()
    difference, largest = np.abs(logits - expected).max(), np.abs(expected).max()
    print(f"{directory}: {type(model).__name__}, largest logit {largest:.3g}, largest difference {difference:.2g}")
    if difference > _TOLERANCE:
        sys.exit(f"{directory}: logits differ by more than {_TOLERANCE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    first = steps.add_parser("write", help="write a merged model and its logits")
    first.add_argument("checkpoint", type=Path, help="a classifier in Hugging Face layout")
    first.add_argument("directory", type=Path, help="the output directory; new or empty")
    first.add_argument("--rank", type=int, default=1, help="of the adapters (default 1)")
    second = steps.add_parser("compare", help="open it with transformers and compare the logits")
    second.add_argument("directory", type=Path, help="the output directory of the first step")
    args = parser.parse_args()
    if args.step == "write":
        write(args.checkpoint, args.directory, args.rank)
    else:
        compare(args.directory)


if __name__ == "__main__":
    main()
