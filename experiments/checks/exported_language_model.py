"""Whether transformers and peft compute what a run of `llama-tiny` or `gpt2-tiny` computed.

    python -m experiments.run llama-tiny
    python -m experiments.checks.exported_language_model runs/llama-tiny --base experiments/models/tiny/llama

The second command needs torch, transformers and peft, and none of this project's own dependencies. It opens the merged
checkpoint, and the adapter on its base, and compares the perplexity of the test texts and the likeliest texts after
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
    parser.add_argument("out", type=Path, help="what the study was given as --out")
    parser.add_argument("--base", type=Path, required=True, help="the checkpoint that it started from")
    chosen = parser.parse_args()
    record = json.loads((chosen.out / "run.json").read_text(encoding="utf-8"))
    run = chosen.out / record["directory"]
    base = AutoModelForCausalLM.from_pretrained(chosen.base, dtype=torch.float32)
    opened = {
        "merged checkpoint": AutoModelForCausalLM.from_pretrained(run / "merged"),
        "adapter by peft": PeftModel.from_pretrained(base, run / "peft"),
    }
    for name, model in opened.items():
        compare(name, model.eval(), chosen.base, record)


@torch.no_grad()
def compare(name: str, model: torch.nn.Module, base: Path, record: dict) -> None:
    """Prints perplexity and texts beside the run's.

    Raises:
      SystemExit: They differ.
    """
    config, result = record["config"], record["result"]
    expected, found = np.log(result["perplexities"]["adapted"]), loss(model, base, config)
    tokenizer, same = AutoTokenizer.from_pretrained(base), 0
    for prompt, _, after in result["texts"]:
        given = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(
            **given, max_new_tokens=config["new_tokens"], do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
        )
        ours = tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        same += ours == after
    print(f"{name}: {type(model).__name__}")
    print(f"  mean loss a token {found:.7f}, the run's {expected:.7f}: {abs(found - expected):.1e} apart")
    print(f"  {same} of {len(result['texts'])} texts the same")
    if abs(found - expected) > _TOLERANCE or same < len(result["texts"]):
        sys.exit(f"{name}: not what the run computed")


def loss(model: torch.nn.Module, base: Path, config: dict) -> float:
    """Mean loss a token of the test texts."""
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
