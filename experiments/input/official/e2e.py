"""The E2E NLG challenge: descriptions of restaurants by attributes, in English.

The distributed tables have the columns `mr` and `ref`. The files of LoRA's authors have lines `attributes||text`, which
their scripts convert to JSON lines with `context` and `completion`. Development and test data have several references
for the same attributes.

References:
  Novikova et al., `The E2E Dataset <https://arxiv.org/abs/1706.09254>`_, 2017
  Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, §5.4
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.errors import UserError
from experiments.input.delimited import DelimitedRows
from experiments.input.official.layout import Example, Layout, Rows, head, json_rows, value
from experiments.input.opening import open_content
from experiments.input.records import Completion
from experiments.tasks.examples import read_lines

_SEPARATOR = "||"


def _rows(paths: Sequence[Path], split: str) -> Rows:
    """Returns attributes and references: each pair for training, all references of the same attributes otherwise."""
    path = paths[0]
    pairs = {".csv": _table, ".txt": _lines, ".jsonl": _contexts}[path.suffix](path)
    if split == "train":
        return [(where, (attributes, (text,))) for where, attributes, text in pairs]
    groups: dict[str, tuple[str, list[str]]] = {}
    for where, attributes, text in pairs:
        groups.setdefault(attributes, (where, []))[1].append(text)
    return [(where, (attributes, tuple(texts))) for attributes, (where, texts) in groups.items()]


def _table(path: Path) -> list[tuple[str, str, str]]:
    rows = DelimitedRows(open_content(path), ",")
    if missing := {"mr", "ref"} - set(rows.columns):
        raise UserError(f"{path}: the header has no {' and '.join(sorted(missing))}; got {', '.join(rows.columns)}")
    return [(rows.location(i), rows[i]["mr"], rows[i]["ref"]) for i in range(len(rows))]


def _lines(path: Path) -> list[tuple[str, str, str]]:
    pairs = []
    for number, line in enumerate(read_lines(path), start=1):
        where, parts = f"{path}, line {number}", line.split(_SEPARATOR)
        if len(parts) != 2:
            raise UserError(f"{where}: expected attributes and text separated by one {_SEPARATOR}, got {line[:40]!r}")
        pairs.append((where, parts[0].strip(), parts[1].strip()))
    return pairs


def _contexts(path: Path) -> list[tuple[str, str, str]]:
    rows = json_rows([path], "train")
    return [(at, value(row, "context", str, at), value(row, "completion", str, at).strip()) for at, row in rows]


def _example(row: tuple[str, tuple[str, ...]], where: str) -> Example:
    attributes, texts = row
    if not all(text.strip() for text in texts):
        raise UserError(f"{where}: the reference is empty")
    return Example(Completion(f"{attributes}\ntext:", f" {texts[0]}"), texts)


def _matches(path: Path) -> bool:
    start = head(path)
    marks = {".txt": _SEPARATOR, ".jsonl": '"context"', ".csv": "mr"}
    return marks[path.suffix] in start.partition("\n")[0]


LAYOUT = Layout(
    "e2e",
    {
        "train": [["trainset.csv"], ["train.txt"], ["train_formatted.jsonl"]],
        "validation": [["devset.csv"], ["valid.txt"], ["valid_formatted.jsonl"]],
        "test": [["testset_w_refs.csv"], ["test.txt"], ["test_formatted.jsonl"]],
    },
    _example,
    _rows,
    _matches,
)
