"""Generates this directory's data from debian_sections.

python -m experiments.tasks.debian_topics.make
"""

import itertools
import json
from pathlib import Path
from typing import Any

from experiments.tasks import examples

TOPICS = {"games": "game", "mail": "mail", "math": "math", "sound": "sound"}
"""The word for each of the sections."""

SYSTEM = "Answer with one word."
QUESTION = "{}\nTopic: game, mail, math or sound?"
SIZES = {"train": 800, "validation": 160, "test": 200}
_HERE = Path(__file__).parent


def problems(split: str) -> list[dict[str, Any]]:
    """Returns the first problems of a split, each topic in turn: a constant answer is right a quarter of the time."""
    data = examples.load("debian_sections", split)
    texts = {name: [t for t, label in zip(data.texts, data.labels) if data.names[label] == name] for name in TOPICS}
    return [
        {
            "prompt": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": QUESTION.format(text)},
            ],
            "answer": TOPICS[name],
        }
        for row in itertools.islice(zip(*texts.values()), SIZES[split] // len(TOPICS))
        for name, text in zip(texts, row)
    ]


def main() -> None:
    """Writes all splits."""
    for split in SIZES:
        rows = problems(split)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (_HERE / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(rows):,} problems")


if __name__ == "__main__":
    main()
