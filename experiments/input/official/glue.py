"""GLUE: a directory for each task, as `download_glue_data.py` writes it.

MRPC may also be the tables of the paraphrase corpus and the list of GLUE's development pairs, which that script leaves
if it cannot download the list. Test labels are secret, except those of the paraphrase corpus.

References:
  Wang et al., `GLUE <https://arxiv.org/abs/1804.07461>`_, 2018
"""

from pathlib import Path

from experiments.input.official.glue_tables import PARAPHRASES, hub_reader, reader
from experiments.input.official.glue_tasks import MNLI, TASKS, Task
from experiments.input.official.layout import Layout


def _never(path: Path) -> bool:
    """The directory of MNLI is that of its matched examples, unless the user names the others."""
    return False


def _layout(name: str, task: Task) -> Layout:
    train, dev, test = [["train.tsv"]], [["dev.tsv"]], [["test.tsv"]]
    splits = {}
    if task is MNLI:
        kind = "mismatched" if "-" in name else "matched"
        dev, test = [[f"dev_{kind}.tsv"]], [[f"test_{kind}.tsv"]]
        splits = {"validation": f"validation_{kind}", "test": f"test_{kind}"}
    if name == "mrpc":
        tables = [[PARAPHRASES, ids] for ids in ("dev_ids.tsv", "mrpc_dev_ids.tsv")]
        train, dev, test = [*train, *tables], [*dev, *tables], [["msr_paraphrase_test.txt"], *test]
    return Layout(
        f"glue/{name}",
        {"train": train, "validation": dev, "test": test},
        task.example,
        reader(task),
        _never if name == "mnli-mismatched" else task.matches,
        (task.folder,),
        f"nyu-mll/glue:{name.partition('-')[0]}:",
        splits,
        hub_reader(task),
        frozenset(["test"]),
    )


LAYOUTS = [_layout(name, task) for name, task in TASKS.items()]
