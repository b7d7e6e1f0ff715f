"""The settings of the LoRA paper on GLUE: RoBERTa (table 9) and DeBERTa (table 10), with the results of table 2."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.configs import papers
from experiments.configs.papers import Preset

TASKS = ("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb")
"""The order of the tables' columns."""

_LORA, _FULL, _BITFIT = r"^LoRA on query and value, r = \d+$", "^full fine-tuning$", "^BitFit$"
_WORDS = {"sst2": "SST-2", "cola": "CoLA", "stsb": "STS-B"}

_BASE = {
    "epochs": (30, 60, 30, 80, 25, 25, 80, 40),
    "batch_size": (16, 16, 16, 32, 32, 16, 32, 16),
    "lr": (5e-4, 5e-4, 4e-4, 4e-4, 4e-4, 5e-4, 5e-4, 4e-4),
    "length": (512,) * 8,
}
_LARGE = {
    "epochs": (10, 10, 20, 20, 10, 20, 20, 30),
    "batch_size": (4, 4, 4, 4, 4, 4, 8, 8),
    "lr": (3e-4, 4e-4, 3e-4, 2e-4, 2e-4, 3e-4, 4e-4, 2e-4),
    "length": (128, 128, 512, 128, 512, 512, 512, 512),
}
_LARGE_HOULSBY = {**_LARGE, "epochs": (10, 10, 20, 20, 10, 20, 20, 10), "batch_size": (4,) * 8, "length": (128,) * 8}
_XXL = {
    "epochs": (5, 16, 30, 10, 8, 11, 11, 10),
    "batch_size": (8, 8, 32, 4, 6, 8, 4, 4),
    "lr": (1e-4, 6e-5, 2e-4, 1e-4, 1e-4, 1e-4, 2e-4, 2e-4),
    "length": (256, 128, 128, 64, 512, 320, 320, 128),
    "weight_decay": (0.0, 0.01, 0.01, 0.0, 0.01, 0.01, 0.01, 0.1),
}
"""The hyperparameters of LoRA by task."""

_PFEIFFER, _HOULSBY = (10, 20, 20, 20, 10, 20, 20, 20), (10, 5, 10, 10, 5, 20, 20, 10)
"""The epochs of adapters by task in the setting of Houlsby et al."""

_RESULTS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "roberta-base": {
        _FULL: ["87.6", "94.8", "90.2", "63.6", "92.8", "91.9", "78.7", "91.2"],
        _BITFIT: ["84.7", "93.7", "92.7", "62.0", "91.8", "84.0", "81.5", "90.8"],
        "^AdapterDrop, size 48, 4 layers$": ["87.1", "94.2", "88.5", "60.8", "93.1", "90.2", "71.5", "89.7"],
        "^AdapterDrop, size 48, 12 layers$": ["87.3", "94.7", "88.4", "62.6", "93.0", "90.6", "75.9", "90.3"],
        _LORA: ["87.5±.3", "95.1±.2", "89.7±.7", "63.4±1.2", "93.3±.3", "90.8±.1", "86.6±.7", "91.5±.2"],
    },
    "roberta-large": {
        _FULL: ["90.2", "96.4", "90.9", "68.0", "94.7", "92.2", "86.6", "92.4"],
        _LORA: ["90.6±.2", "96.2±.5", "90.9±1.2", "68.2±1.9", "94.9±.3", "91.6±.1", "87.4±2.5", "92.6±.2"],
    },
    "roberta-large-houlsby": {
        "^Pfeiffer adapters, size 64$": ["90.2", "96.1", "90.2", "68.3", "94.8", "91.9", "83.8", "92.1"],
        "^Pfeiffer adapters, size 16$": ["90.5", "96.6", "89.7", "67.8", "94.8", "91.7", "80.1", "91.9"],
        "^Houlsby adapters, size 64$": ["89.9", "96.2", "88.7", "66.5", "94.7", "92.1", "83.4", "91.0"],
        "^Houlsby adapters, size 8$": ["90.3", "96.3", "87.7", "66.3", "94.7", "91.5", "72.9", "91.5"],
        _LORA: ["90.6±.2", "96.2±.5", "90.2±1.0", "68.2±1.9", "94.8±.3", "91.6±.2", "85.2±1.1", "92.3±.5"],
    },
    "deberta-xxl": {
        _FULL: ["91.8", "97.2", "92.0", "72.0", "96.0", "92.7", "93.9", "92.9"],
        _LORA: ["91.9±.2", "96.9±.2", "92.6±.6", "72.4±1.1", "96.0±.1", "92.9±.1", "94.9±.4", "93.0±.2"],
    },
}
"""Table 2 by row and task."""


def _fields(table: Mapping[str, Sequence[Any]], task: str, **shared: Any) -> dict[str, Any]:
    by_name = {name: values[TASKS.index(task)] for name, values in table.items()}
    length, lr = by_name.pop("length"), by_name.pop("lr")
    return {
        **papers.ALL,
        "seeds": 5,
        "clip": 1.0,
        **by_name,
        "lr": (lr,),
        "lengths": papers.lengths(length),
        **shared,
    }


def _rows(name: str, task: str, hyperparameters: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the hyperparameters of rows, and the paper's results; rows that it does not have, have none."""
    results = {pattern: values[TASKS.index(task)].replace("±", " ± ") for pattern, values in _RESULTS[name].items()}
    patterns = list(dict.fromkeys([*results, *hyperparameters, ""]))
    return {pattern: {"paper": results.get(pattern, ""), **hyperparameters.get(pattern, {})} for pattern in patterns}


def _adapters(task: str) -> dict[str, dict[str, Any]]:
    """The adapters of Houlsby's setting: 32 examples per step, a rate of 3e-4 with exceptions for the larger ones."""

    def row(epochs: int, rate: float = 3e-4) -> dict[str, Any]:
        return {"lr": (rate,), "epochs": epochs, "batch_size": 32}

    index, slow = TASKS.index(task), 3e-5
    pfeiffer, houlsby = row(5 if task == "mnli" else _PFEIFFER[index]), row(_HOULSBY[index])
    return {
        "^Pfeiffer adapters, size 64$": row(_PFEIFFER[index], slow if task in ("mnli", "sst2") else 3e-4),
        "^Pfeiffer adapters, size 16$": pfeiffer,
        "^Pfeiffer adapters": pfeiffer,
        "^Houlsby adapters, size 64$": row(_HOULSBY[index], slow if task == "mnli" else 3e-4),
        "^Houlsby adapters, size 8$": houlsby,
        "^Houlsby adapters": houlsby,
    }


def _preset(
    name: str,
    source: str,
    table: Mapping[str, Sequence[Any]],
    notes: Sequence[str],
    rows: Callable[[str], Mapping[str, Mapping[str, Any]]] = lambda task: {},
    *,
    title: str,
    model: str,
    model_type: str,
    width: int,
    **shared: Any,
) -> Preset:
    return Preset(
        f"LoRA, {source}",
        TASKS,
        lambda task: _fields(table, task, **shared),
        lambda task: _rows(name, task, rows(task)),
        heading=lambda task: f"paper: {title}, {_WORDS.get(task, task.upper())}",
        model=model,
        model_type=model_type,
        width=width,
        notes=(*notes, *papers.NOTES),
    )


_START = (
    "In the paper, runs on MRPC, RTE and STS-B start from the adapter of MNLI; these start from the pretrained model."
)
_CITED = "The paper cites the result of full fine-tuning; here it has the rates and epochs of RoBERTa's authors."
_OTHERS_CITED = (
    "It cites those of BitFit and AdapterDrop, too; here these have the rate and epochs of LoRA. It states 0.3 and 0.9 "
    "million parameters of AdapterDrop, which adapters of size 48 in 4 and in 12 layers have."
)
_BATCH = "The batch size is that of the table, which the scripts use on each of several GPUs."
_ROBERTA: dict[str, Any] = {
    "model_type": "roberta",
    "ranks": (8,),
    "warmup": 0.06,
    "weight_decay": 0.1,
    "full_lr": (1e-5, 2e-5, 3e-5),
}
_ROBERTA_BASE: dict[str, Any] = _ROBERTA | {
    "title": "RoBERTa-base",
    "model": "RoBERTa-base: a directory or FacebookAI/roberta-base",
    "width": 768,
    "alpha": 8.0,
}
_ROBERTA_LARGE: dict[str, Any] = _ROBERTA | {
    "title": "RoBERTa-large",
    "model": "RoBERTa-large: a directory or FacebookAI/roberta-large",
    "width": 1024,
    "alpha": 16.0,
}


def _full(task: str) -> dict[str, dict[str, Any]]:
    return {_FULL: {"epochs": 10}}


PRESETS: dict[str, Preset] = {
    "roberta-base": _preset(
        "roberta-base",
        "table 9, RoBERTa-base",
        _BASE,
        [
            "Alpha is the table's 8; the scripts have 16. Weight decay is the scripts'.",
            _BATCH,
            _START,
            _CITED,
            _OTHERS_CITED,
        ],
        _full,
        methods=("head", "bitfit", "full", "lora", "adapter-drop"),
        **_ROBERTA_BASE,
    ),
    "roberta-large": _preset(
        "roberta-large",
        "table 9, RoBERTa-large",
        _LARGE,
        [
            "The values are the table's; the scripts have other ones for CoLA (3e-4 instead of 2e-4) and STS-B (4 "
            "examples, 10 epochs, 3e-4, 128 tokens instead of 8, 30, 2e-4, 512). Weight decay is the scripts'.",
            _BATCH,
            _START,
            _CITED,
        ],
        _full,
        methods=("head", "full", "lora"),
        **_ROBERTA_LARGE,
    ),
    "roberta-large-houlsby": _preset(
        "roberta-large-houlsby",
        "table 9, RoBERTa-large in the setting of Houlsby et al.",
        _LARGE_HOULSBY,
        [
            "Houlsby adapters of size 16 and Pfeiffer adapters of size 8 are not in the paper. Weight decay is the "
            "scripts'.",
            _BATCH,
        ],
        _adapters,
        methods=("head", "lora", "houlsby", "pfeiffer"),
        sizes=(8, 16, 64),
        **_ROBERTA_LARGE,
    ),
    "deberta-xxl": _preset(
        "deberta-xxl",
        "table 10, DeBERTa-XXL",
        _XXL,
        [
            "Rank 16 and alpha 32 are those of the scripts, the released checkpoint and the 4.7 million parameters of "
            "table 2; table 10 has 8 and 8. The scripts have other rates for CoLA (1.3e-4) and RTE (2.6e-4), and a "
            "warmup in steps.",
            "The paper's runs are in float16, with a dropout of the head by task.",
            "The paper cites the results of full fine-tuning, without rates; --methods head,lora,full --full-lr RATE "
            "adds it.",
            _BATCH,
            _START,
        ],
        title="DeBERTa-XXL",
        model="DeBERTa-v2-XXL: a directory with microsoft/deberta-v2-xxlarge in safetensors, and tokenizer.json",
        model_type="deberta-v2",
        width=1536,
        methods=("head", "lora"),
        ranks=(16,),
        alpha=32.0,
        warmup=0.1,
    ),
}
"""The settings by the name of `--paper`."""
