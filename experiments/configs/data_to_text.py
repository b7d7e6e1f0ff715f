"""Data to text, summaries and SQL with a decoder: the base, LoRA on two sets of layers, full fine-tuning."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from experiments import settings
from experiments.configs import presets
from experiments.configs.decoder import Target
from experiments.configs.fine_tuning import FineTuning
from experiments.configs.method_names import separated_by_commas
from experiments.errors import UserError
from experiments.evaluation.decoding import Decoding
from experiments.input.official import catalog

METHODS: dict[str, tuple[Target, ...]] = {
    "query-value": ("query", "value"),
    "linear": ("attention", "feed-forward"),
    "full": (),
}
"""The weights that LoRA adapts, by method; none in full fine-tuning."""

Methods = Annotated[tuple[str, ...], separated_by_commas(tuple(METHODS))]

_GPT2 = {
    "rank": 4,
    "alpha": 32.0,
    "lr": 2e-4,
    "epochs": 5,
    "batch_size": 8,
    "warmup": 500,
    "weight_decay": 0.01,
    "dropout": 0.1,
    "label_smoothing": 0.1,
    "clip": None,
    "length": 512,
    "beams": 10,
    "length_penalty": 0.9,  # table 11; the command in the authors' repository has 0.8
    "no_repeat_ngram": 4,
    "new_tokens": 64,
}
_GPT3 = {
    "rank": 8,
    "alpha": 8.0,  # not stated; the paper sets alpha to the first rank that it tries
    "lr": 2e-4,
    "full_lr": 5e-6,
    "epochs": 2,
    "batch_size": 128,
    "weight_decay": 0.1,
}
_WARMUP = 250_000  # tokens
PAPERS: dict[str, dict[str, dict[str, Any]]] = {
    "gpt-2": {"e2e": _GPT2},
    "gpt-3": {
        "wikisql": _GPT3 | {"length": 384, "warmup": round(_WARMUP / (128 * 384)), "new_tokens": 64},
        "samsum": _GPT3 | {"length": 2048, "warmup": round(_WARMUP / (128 * 2048)), "new_tokens": 128},
    },
}
"""The hyperparameters of the paper by the name of `--paper` and data set (LoRA, tables 11 and 12)."""

_OFFICIAL = [name for settings in PAPERS.values() for name in settings]

_OF_ALL: dict[str, Any] = {
    "methods": ("query-value", "full"),
    "steps": None,
    "pack": False,
    "test_examples": None,
}
_FAST_PAPER: dict[str, Any] = {"epochs": 1, "batch_size": 2, "warmup": 1, "beams": 2}


@dataclass(frozen=True)
class Config(FineTuning, Decoding):
    """Generates texts and SQL with SmolLM2-135M, before and after LoRA and full fine-tuning (LoRA, tables 3 and 4).

    Three tasks: tags of a Debian package to its synopsis (like E2E), long description to synopsis (like SAMSum), and a
    question on a generated table to SQL, which sqlite3 executes (like WikiSQL). Each is answered by the base, without
    and with solved examples in its prompt, and after LoRA on query and value, LoRA on all linear layers, and full
    fine-tuning.

    With --paper, the hyperparameters and the decoding are the paper's for the official data set that --data names and
    the model that --model names. Flags that are set win. See docs/guides/data.md.
    """

    STUDY = "experiments.studies.data_to_text.study"
    MINUTES = 45
    FAST: ClassVar = {
        "model": "tiny-llama",
        "tasks": ("debian_tags", "sql_questions"),
        "steps": 2,
        "test_examples": 4,
        "new_tokens": 4,
        "length": 128,
        "rank": 2,
        "template": "{% for message in messages if message.role != 'system' %}{{ message.content }}\n{% endfor %}",
    }

    model: str = "smollm2-135m"
    """The base, a model as for sft."""

    tasks: tuple[str, ...] = ("debian_tags", "debian_synopses", "sql_questions")
    """The tasks, from debian_tags, debian_synopses and sql_questions."""

    data: tuple[str, ...] = ()
    """Official data sets instead of the tasks: e2e:DIRECTORY, wikisql:DIRECTORY or samsum:DIRECTORY, with the files as
    they are distributed. WikiSQL is scored on its validation examples, as in the paper, the others on test examples."""

    paper: Literal["gpt-2", "gpt-3"] | None = None
    """The setting of the LoRA paper, with --model and --data: gpt-2 (medium or large, on E2E, tables 3 and 11), or
    gpt-3 (on WikiSQL or SAMSum, tables 4 and 12, for another model)."""

    methods: Methods = tuple(METHODS)
    """The methods to train, separated by commas: query-value and linear (LoRA on these layers), full (full
    fine-tuning)."""

    rank: int = 16
    """Rank of the LoRA factors."""

    lr: float | None = None
    """Peak learning rate of LoRA. None is sft's choice for the model."""

    full_lr: float | None = None
    """Peak learning rate of full fine-tuning. None is sft's choice for the model."""

    steps: int | None = 48
    """Maximum number of training steps of each run. None trains for all epochs."""

    length: int = 256
    """Tokens per sequence."""

    test_examples: int | None = 40
    """Number of test examples of each task, from the beginning. None uses all."""

    new_tokens: int = 40
    """Maximum number of tokens per answer."""

    template: str | None = None
    """A chat template for a model without one, as for sft."""

    seed: int = 0
    """Random seed of the initial factors and the order of the examples."""

    out: Path = Path("runs/data-to-text")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    fresh: bool = False
    """Start over, even if --out holds finished or interrupted runs with the same settings."""

    fast: bool = False
    """The smallest complete study: a tiny model with random weights, which supports the shorter texts only."""

    def __post_init__(self) -> None:
        if self.paper is None:  # otherwise preset() has set the values, and others are the user's
            settings.use_fast(self, self.FAST | {"out": Path(f"{type(self).out}-fast")})
        self.check_fine_tuning()
        Decoding.__post_init__(self)
        settings.positive(self, "rank", "lr", "full_lr", "length", "test_examples", "new_tokens")
        settings.not_negative(self, "seed")
        tasks = type(self).tasks
        if not self.tasks or not {*self.tasks} <= {*tasks} or len({*self.tasks}) < len(self.tasks):
            raise ValueError(f"tasks must be one or more of {', '.join(tasks)}, each once; got {' '.join(self.tasks)}")
        if not self.methods:
            raise ValueError(f"methods must be one or more of {', '.join(METHODS)}")
        if self.data and self.tasks not in (tasks, self.FAST["tasks"]):
            raise ValueError("tasks and data exclude each other; set only one of them")
        if self.paper and (self.model == type(self).model or len(self.data) != 1):
            model = "openai-community/gpt2-medium" if self.paper == "gpt-2" else "DIRECTORY"
            data = " or ".join(f"{name}:DIRECTORY" for name in PAPERS[self.paper])
            raise ValueError(
                f"--paper {self.paper}: pass the model and one data set of the original setting, as in --model {model} "
                f"--data {data}"
            )

    def preset(self) -> Self:
        """Returns the settings of the paper for the model and the data, in place of the defaults.

        Raises:
          UserError: The data is not that of the paper; see :meth:`sources`.
        """
        assert self.paper is not None
        (name,) = self.sources()
        if name not in PAPERS[self.paper]:
            other = next(paper for paper, settings in PAPERS.items() if name in settings)
            raise UserError(f"--paper {self.paper} has no setting for --data {self.data[0]}; --paper {other} has one")
        values = PAPERS[self.paper][name] | _OF_ALL
        return presets.preset(self, f"{self.paper}-{name}", values, self.FAST | _FAST_PAPER)

    def sources(self) -> dict[str, str]:
        """Returns what `--data` of sft is for each task, by the name of the task.

        Raises:
          UserError: Official data is missing, is of another kind, or is named twice.
        """
        if not self.data:
            return {task: task for task in self.tasks}
        named = {}
        for data in self.data:
            selection = catalog.find(data)
            name = None if selection is None else selection.layout.name
            if name not in _OFFICIAL or name in named:
                raise UserError(
                    f"--data {data}: expected different data sets of {', '.join(_OFFICIAL)}, as in e2e:DIRECTORY"
                )
            named[name] = data
        return named


DEFAULTS = Config()
