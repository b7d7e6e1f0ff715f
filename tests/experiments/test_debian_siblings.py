"""The shipped preferences and problems are what their scripts make of other shipped data."""

import collections
import doctest
import gzip
import json

import pytest

from experiments.evaluation import rewards
from experiments.input import sources
from experiments.input.records import Preference, Problem
from experiments.tasks import examples
from experiments.tasks.debian_siblings import make as siblings
from experiments.tasks.debian_topics import make as topics


@pytest.mark.parametrize("split", siblings.SPLITS)
def test_siblings_are_of_one_source(split):
    with gzip.open(examples.SHIPPED["debian_synopses"] / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    records = sources.read(f"debian_siblings:{split}", split)
    pairs = list(siblings.preferences(rows))
    assert [records.sources[0]._rows[i] for i in range(len(records))] == pairs
    source_of = {row["package"]: row["source"] for row in rows}
    assert all(source_of[row["package"]] == row["source"] == source_of[row["sibling"]] for row in pairs)
    assert all(isinstance(records[i], Preference) for i in range(20)) and len(records) >= 200


@pytest.mark.parametrize("split", topics.SIZES)
def test_topics(split):
    records = sources.read(f"debian_topics:{split}", split)
    assert [records.sources[0]._rows[i] for i in range(len(records))] == topics.problems(split)
    assert len(records) == topics.SIZES[split]
    problems = [record for record in records if isinstance(record, Problem)]
    counts = collections.Counter(problem.answer for problem in problems)
    assert counts == dict.fromkeys(topics.TOPICS.values(), topics.SIZES[split] // 4)


def test_docstrings():
    assert doctest.testmod(siblings).failed == doctest.testmod(rewards).failed == 0
