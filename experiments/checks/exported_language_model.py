"""Checks that transformers and peft reproduce the results of `llama-tiny` or `gpt2-tiny`.

    python -m experiments.run llama-tiny
    python -m experiments.checks.exported_language_model runs/llama-tiny --base experiments/models/tiny/llama

The second command needs torch, transformers and peft, and no dependency of this project. It opens the merged
checkpoint, and the adapter on its base, and compares the perplexity of the test texts and the greedy continuation of
every prompt with those of the run.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from peft import PeftModel  # pyrefly: ignore[missing-import]
from transformers import AutoModelForCausalLM, AutoTokenizer  # pyrefly: ignore[missing-import]

from experiments.tasks import continuations, examples, text
from experiments.tasks.batching import assemble, plan

_TOLERANCE = 1e-5  # of the mean loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the --out directory of the study")
    parser.add_argument("--base", type=Path, required=True, help="the base checkpoint of the study")
    args = parser.parse_args()
    record = json.loads((args.out / "run.json").read_text(encoding="utf-8"))
    run = args.out / record["directory"]
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    models = {
        "merged checkpoint": AutoModelForCausalLM.from_pretrained(run / "merged"),
        "adapter by peft": PeftModel.from_pretrained(base, run / "peft"),
    }
    for name, model in models.items():
        compare(name, model.eval(), args.base, record)


@torch.no_grad()
def compare(name: str, model: torch.nn.Module, base: Path, record: dict) -> None:
    """Compares losses and texts with those of the run.

    Raises:
      SystemExit: They differ.
    """
    config, result = record["config"], record["result"]
    expected, actual = np.log(result["perplexities"]["adapted"]), loss(model, base, config)
    tokenizer, same = AutoTokenizer.from_pretrained(base), 0
    for prompt, _, after in result["texts"]:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            **inputs, max_new_tokens=config["new_tokens"], do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
        )
        continuation = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        same += continuation == after
    print(f"{name}: {type(model).__name__}")
    print(f"  mean loss per token {actual:.7f}, expected {expected:.7f}, difference {abs(actual - expected):.1e}")
    print(f"  {same} of {len(result['texts'])} texts are equal")
    if abs(actual - expected) > _TOLERANCE or same < len(result["texts"]):
        sys.exit(f"{name}: differs from the run")


def loss(model: torch.nn.Module, base: Path, config: dict) -> float:
    """Computes the mean loss per token of the test texts."""
    test = examples.load(config["data"], "test", config["test_examples"])
    end = json.loads((base / "config.json").read_text(encoding="utf-8"))["eos_token_id"]
    prompts = [f"{test.names[label]}:" for label in test.labels]
    tokenizer = text.load_tokenizer(base)
    encoded = continuations.encode(tokenizer, prompts, test.texts, config["lengths"][-1], end)
    total, count = 0.0, 0
    for planned in plan(encoded.sequences, config["lengths"], 64):
        batch = assemble(planned, encoded.sequences, encoded.labels, 64)
        tokens, labels = (torch.from_numpy(batch[name]).long() for name in ("tokens", "labels"))
        logits = model(input_ids=tokens).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-1, reduction="sum")
        total, count = total + float(each), count + int((labels >= 0).sum())
    return total / count


if __name__ == "__main__":
    main()
