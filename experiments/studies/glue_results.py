"""The LoRA paper's results of the methods that glue compares, by the name of the row."""

from experiments.configs.glue import Config
from experiments.studies.comparison import paper

_ROBERTA = {"BitFit": "85.2", "full fine-tuning": "86.4", "LoRA on query and value, r = 8": "87.2"}
"""RoBERTa-base, the mean of GLUE (table 2)."""
_GPT3 = {
    "BitFit": "71.3 / 91.0",
    "full fine-tuning": "73.8 / 89.5",
    "LoRA on query and value, r = 1": "73.4 / 91.3",
    "LoRA on query and value, r = 2": "73.3 / 91.4",
    "LoRA on query and value, r = 4": "73.7 / 91.3",
    "LoRA on query and value, r = 8": "73.8 / 91.6",
    "LoRA on query and value, r = 64": "73.5 / 91.4",
    "Houlsby adapters, size 1": "71.9 / 89.8",
    "Houlsby adapters, size 4": "73.2 / 91.0",
    "Houlsby adapters, size 8": "73.2 / 91.5",
    "Houlsby adapters, size 16": "73.2 / 91.5",
    "Houlsby adapters, size 64": "72.6 / 91.5",
    "prefix of 4": "68.5 / 89.2",  # PreLayer of as many tokens
    "prefix of 16": "70.1 / 89.5",
    "prefix of 64": "64.9 / 87.9",
    "prompt of 32": "55.9 / 84.9",  # PreEmbed
    "prompt of 64": "58.7 / 88.1",
    "prompt of 128": "60.6 / 88.0",
    "prompt of 256": "63.1 / 88.6",
    "prompt of 512": "55.9 / 85.8",
    "LoRA, r = 8, with a prompt of 8": "75.0 / 91.4",
    "LoRA, r = 32, with a prompt of 8": "75.9 / 91.1",
    "LoRA, r = 64, with a prompt of 8": "76.2 / 91.3",
}
"""GPT-3 175B, WikiSQL / MNLI (tables 4, 6 and 15)."""


def of(config: Config, name: str) -> str:
    """Returns the paper's results of a row; that on MNLI alone in the setting of GPT-3."""
    of_gpt3 = paper.of_gpt3(config, _GPT3.get(name, ""))
    if config.paper == "gpt-3":
        return of_gpt3
    both = {"RoBERTa": _ROBERTA.get(name, ""), "GPT-3": of_gpt3}
    return "; ".join(f"{model} {results}" for model, results in both.items() if results)
