"""The generated questions on tables, and the metrics of SQL."""

import doctest
import gzip
import json
import re

import pytest

from experiments.evaluation import queries
from experiments.input import sources
from experiments.input.official import sql
from experiments.tasks import examples
from experiments.tasks.sql_questions import make, tables

CITIES = {
    "name": "cities",
    "columns": ["city", "country", "area"],
    "rows": [["Lima", "Peru", 30], ["Cusco", "Peru", 5], ["Oslo", "Norway", 20]],
}


def shipped(split):
    text = gzip.decompress((examples.SHIPPED["sql_questions"] / f"{split}.jsonl.gz").read_bytes()).decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("split", make.SPLITS)
def test_the_shipped_files_are_what_the_script_makes(split):
    rows = shipped(split)
    assert len(rows) == make.SIZES[split] and rows == make.examples(split)
    assert len({row["messages"][1]["content"] for row in rows}) == len(rows)
    assert {row["table"]["name"] for row in rows} == set(make.SPLITS[split])


def test_every_query_has_a_form_and_a_result():
    operators, aggregates = set(), set()
    for row in shipped("test"):
        query, table = row["messages"][-1]["content"], row["table"]
        form = sql.parse(query, table["columns"], table["name"])
        assert form is not None and tables.execute(table, query)
        question = row["messages"][1]["content"].partition("\n")[2]
        for _, operator, value in form.conditions:
            operators.add(operator)
            assert str(value) in question
        aggregates.add(form.aggregate)
        assert "{" not in question
    assert operators == {0, 1, 2} and aggregates == {*range(len(sql.AGGREGATES))}


def test_no_topic_is_in_two_splits():
    names = [name for topics in make.SPLITS.values() for name in topics]
    assert len(set(names)) == len(names)


def test_the_same_lines_again(tmp_path, capsys):
    make.write(tmp_path, {"test": make.examples("test")})
    assert (tmp_path / "test.jsonl.gz").read_bytes() == (
        examples.SHIPPED["sql_questions"] / "test.jsonl.gz"
    ).read_bytes()
    assert "test: 400 examples" in capsys.readouterr().out


def test_records_are_conversations():
    train, validation = sources.splits("sql_questions")
    assert len(train) == make.SIZES["train"] and len(validation) == make.SIZES["validation"]
    assert [message["role"] for message in train[0].messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("SELECT city FROM cities", 'select "city" from cities;', True),
        (
            "SELECT MAX(area) FROM cities WHERE area = 1 AND city = 'x'",
            "SELECT max( area ) FROM CITIES WHERE City='X' AND area=1.0",
            True,
        ),
        ("SELECT city FROM cities WHERE area > 5", "SELECT city FROM cities WHERE area < 5", False),
        ("SELECT COUNT(city) FROM cities", "SELECT city FROM cities", False),
        ("SELECT city FROM cities WHERE city = 'O''Brien'", "SELECT city FROM cities WHERE city = 'o''brien'", True),
        ("SELECT city FROM cities WHERE area = '5'", "SELECT city FROM cities WHERE area = 5", False),
    ],
)
def test_forms_are_compared_without_order_and_case(one, other, same):
    assert queries.score_tables([one], [other], [CITIES])["logical_form"] == 100 * same
    assert all(sql.parse(queries.statement(text), CITIES["columns"], "cities") for text in (one, other))


@pytest.mark.parametrize(
    "query",
    [
        "",
        "cities",
        "SELECT city, area FROM cities",
        "SELECT city FROM cities ORDER BY area",
        "SELECT city FROM towns",
        "SELECT town FROM cities",
        "SELECT DISTINCT city FROM cities",
    ],
)
def test_other_queries_have_no_form(query):
    assert sql.parse(query, CITIES["columns"], "cities") is None


def test_a_query_with_the_right_result_has_another_form():
    right = "SELECT city FROM cities WHERE area > 20"
    answers = [right, "```sql\nSELECT city FROM cities WHERE area = 30;\n```", "Lima", "SELECT town FROM cities"]
    scores = queries.score_tables(answers, [right] * 4, [CITIES] * 4)
    assert scores == {"logical_form": 25.0, "execution": 50.0}


def test_an_answer_cannot_write_or_run_for_long(tmp_path):
    path = tmp_path / "other.db"
    for query in (
        f"ATTACH DATABASE '{path}' AS other",
        "DELETE FROM cities",
        "CREATE TABLE more (x)",
        "PRAGMA user_version = 3",
        "SELECT load_extension('x')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(i) FROM n",
        "SELECT city FROM cities; SELECT area FROM cities",
        "SELECT city\0 FROM cities",
    ):
        assert tables.execute(CITIES, query) is None, query
    assert not path.exists()
    assert tables.execute(CITIES, "SELECT SUM(area) FROM cities WHERE country = 'Peru'") == [(35,)]


def test_the_readme_shows_a_shipped_example():
    text = (examples.SHIPPED["sql_questions"] / "README.md").read_text()
    table, question, query = re.findall(r"^    (\S.*)$", text, re.MULTILINE)[:3]
    assert {"role": "user", "content": f"{table}\n{question}"} in [row["messages"][1] for row in shipped("test")]
    assert query in [row["messages"][2]["content"] for row in shipped("test")]


@pytest.mark.parametrize("module", [queries, tables])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0
