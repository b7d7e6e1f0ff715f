"""Official data sets in the distributed formats: what is read, which directory is which, and what is wrong with one."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.input import labeled, sources
from experiments.input.official import catalog, commonsense, sql
from experiments.input.records import Completion, Conversation, Text
from experiments.tasks.batching import NO_LABEL
from tests.experiments import official_data as official


def contents(record):
    return [message["content"] for message in record.messages]


@pytest.mark.parametrize(
    ("folder", "texts", "labels", "names"),
    [
        ("CoLA", ('He said "hello.', "They drank the pub."), [1, 0], ("unacceptable", "acceptable")),
        ("SST-2", ("hide new secretions from the parental units ", '" wit '), [0, 1], ("negative", "positive")),
        (
            "MRPC",
            (('Amrozi accused his brother , whom he called " the witness " .', 'He accused " the'),),
            [1],
            ("not_equivalent", "equivalent"),
        ),
        ("QQP", (("How is life?", "What is life like?"),), [1], ("not_duplicate", "duplicate")),
        ("MNLI", (("It has two sides.", "It is good."),), [1], ("entailment", "neutral", "contradiction")),
        ("QNLI", (("When did it begin?", "It began in 1970."),), [0], ("entailment", "not_entailment")),
        (
            "RTE",
            (("No weapons were found.", "Weapons were found."), ('He and "she met.', "They met.")),
            [1, 0],
            ("entailment", "not_entailment"),
        ),
        (
            "WNLI",
            (("I stuck a pin through a carrot.", "The carrot had a hole."),),
            [1],
            ("not_entailment", "entailment"),
        ),
    ],
)
def test_glue(tmp_path, folder, texts, labels, names):
    root = official.write_glue(tmp_path)
    name = "glue/" + folder.lower().replace("-", "")
    for data in (f"{root}/{folder}", f"{name}:{root}", f"{name}:{root}/{folder}"):
        train = labeled.load(data, "train")
        assert (train.texts, train.labels.tolist(), train.names) == (texts, labels, names)
        assert train.labels.dtype == np.int32 and train.are_labeled
    test = labeled.load(f"{root}/{folder}", "test")
    assert test.labels.tolist() == [NO_LABEL] and not test.are_labeled and test.are_pairs == train.are_pairs
    assert len(labeled.load(f"{root}/{folder}", "validation", 1)) == 1


def test_similarity_is_a_regression(tmp_path):
    official.write_glue(tmp_path)
    train, test = (labeled.load(f"{tmp_path}/STS-B", split) for split in ("train", "test"))
    np.testing.assert_array_equal(train.labels, np.float32([5, 3.8]))
    assert train.names == () and train.texts[0] == ("A plane takes off.", "An air plane takes off.")
    assert np.isnan(test.labels).all() and not test.are_labeled


def test_mismatched_examples_have_a_name(tmp_path):
    official.write_glue(tmp_path)
    for split in ("validation", "test"):
        for name, kind in (("mnli", "matched"), ("mnli-mismatched", "mismatched")):
            assert labeled.load(f"glue/{name}:{tmp_path}", split).texts == ((kind, "b"),)
    assert labeled.load(f"{tmp_path}/MNLI", "validation").labels.tolist() == [2]


def test_paraphrases_with_the_list_of_development_pairs(tmp_path):
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    rows = [f"{i % 2}\t{i}\t{i + 10}\tfirst {i}\tsecond {i}" for i in range(4)]
    official.write_lines(tmp_path / "msr_paraphrase_train.txt", [header, *rows], end="\r\n")
    official.write_lines(tmp_path / "msr_paraphrase_test.txt", [header, rows[1]], end="\r\n")
    with pytest.raises(UserError, match=r"no dev_ids\.tsv, which the split train of glue/mrpc needs; .*train\.tsv, or"):
        labeled.load(str(tmp_path), "train")
    official.write_lines(tmp_path / "mrpc_dev_ids.tsv", ["1\t11", "2\t12"])
    splits = {split: labeled.load(str(tmp_path), split) for split in ("train", "validation", "test")}
    assert splits["train"].texts == (("first 0", "second 0"), ("first 3", "second 3"))
    assert splits["validation"].labels.tolist() == [1, 0]
    assert splits["test"].labels.tolist() == [1] and splits["test"].are_labeled


def test_glue_for_decoders(tmp_path):
    official.write_glue(tmp_path)
    train, validation = sources.splits(f"{tmp_path}/RTE")
    assert train[0] == Completion(
        "sentence1: No weapons were found.\nsentence2: Weapons were found.\nlabel:", " not_entailment"
    )
    assert len(train) == len(validation) == 2
    assert sources.read_separate([f"{tmp_path}/RTE"], "test") is None  # its labels are secret
    mnli = sources.read(f"glue/mnli:{tmp_path}", "train")[0]
    assert mnli == Completion("premise: It has two sides.\nhypothesis: It is good.\nlabel:", " neutral")
    assert sources.read(f"{tmp_path}/STS-B", "validation")[0].completion == " 0.000"
    with pytest.raises(UserError, match="the labels of GLUE's test examples are secret"):
        list(sources.read(f"glue/rte:{tmp_path}:test", "train"))


def test_e2e_has_several_references_except_in_training(tmp_path):
    root = official.write_e2e(tmp_path)
    train, test = (catalog.find(str(root)).examples(split) for split in ("train", "test"))
    assert [example.answer for example in train] == [
        ('There is a place, Alimentum, "here".',),
        ("Alimentum is here.",),
        ("Cotto is a coffee shop.",),
    ]
    assert [len(example.answer) for example in test] == [2, 1]
    assert train[2].record == Completion("name[Cotto], eatType[coffee shop]\ntext:", " Cotto is a coffee shop.")
    assert test[0].answer == (train[0].answer[0], train[1].answer[0])
    assert [len(records) for records in sources.splits(str(root))] == [3, 2]


def test_e2e_as_loras_authors_distribute_it(tmp_path):
    lines = [
        "name : Cotto | Type : coffee shop||Cotto is a coffee shop . ",
        "name : Cotto | Type : coffee shop||A shop . ",
    ]
    for name in ("train", "valid", "test"):
        official.write_lines(tmp_path / "text" / f"{name}.txt", lines)
        rows = [dict(zip(("context", "completion"), line.split("||"))) for line in lines]
        official.write_rows(tmp_path / "json" / f"{name}_formatted.jsonl", rows)
    for form in ("text", "json"):
        (example,) = catalog.find(str(tmp_path / form)).examples("validation")
        assert example.answer == ("Cotto is a coffee shop .", "A shop .")
        assert example.record.prompt == "name : Cotto | Type : coffee shop\ntext:"
    official.write_lines(tmp_path / "text" / "valid.txt", [*lines, "name : Cotto"])
    with pytest.raises(UserError, match=r"valid\.txt, line 3: expected attributes and text separated by one \|\|"):
        sources.splits(str(tmp_path / "text"))


def test_wikisql(tmp_path):
    root = official.write_wikisql(tmp_path)
    first, second, third = catalog.find(str(root)).examples("validation")
    assert first.record == Completion(
        "table: Player, Team, Points, team (2)\nquestion: Who?\nSQL:",
        ' SELECT "Team" FROM table WHERE "Player" = \'John\'',
    )
    assert second.record.completion == ' SELECT MAX("Points") FROM table'
    assert third.record.completion == (
        ' SELECT COUNT("team (2)") FROM table WHERE "Player" = \'John\' AND "Points" > \'1,000.5\''
    )
    for example in (first, second, third):
        assert sql.parse(example.record.completion, example.answer.columns) == example.answer.query
    assert first.answer.database == root / "dev.db"


@pytest.mark.parametrize(
    "text",
    [
        "",
        'SELECT "Nobody" FROM table',
        'SELECT "Team" FROM tables',
        'SELECT MEDIAN("Team") FROM table',
        'SELECT "Team" FROM table AND "Player" = \'x\'',
        'SELECT "Team" FROM table WHERE "Player" = x',
        'SELECT "Team" FROM table WHERE "Player" = 1.2.3',
        'SELECT "Team" FROM table; DROP TABLE table',
    ],
)
def test_other_sql_has_no_logical_form(text):
    assert sql.parse(text, ("Player", "Team")) is None


def test_names_need_no_quotes():
    text = "select count(Team) from Games where player = 'x'"
    assert sql.parse(text, ("Player", "Team"), "games") == sql.Query(1, 3, ((0, 0, "x"),))


@pytest.mark.parametrize(
    "query",
    [
        sql.Query(0, 0, ()),
        sql.Query(1, 3, ((0, 0, 'it\'s "a" AND b'), (0, 2, -3.5), (1, 1, 4))),
        sql.Query(0, 5, ((1, 0, ""),)),
    ],
)
def test_sql_and_logical_forms_are_equivalent(query):
    columns = ('a "quoted", name', "b")
    assert sql.parse(sql.write(query, columns) + " ;\n", columns) == query


def test_samsum(tmp_path):
    for name in ("train", "val", "test"):
        official.write_json(tmp_path / f"{name}.json", [official.SAMSUM, official.SAMSUM])
    train, validation = sources.splits(str(tmp_path))
    dialogue = "Amanda: I baked  cookies. Do you want some?\nJerry: Sure!"
    assert train[0] == Completion(f"{dialogue}\nsummary:", " " + official.SAMSUM["summary"])
    assert len(validation) == 2 and validation.location(1) == f"{tmp_path}/val.json, item 2 (line 1)"


@pytest.mark.parametrize("folder", ["", "dataset"])
def test_commonsense(tmp_path, folder):
    labels = {"boolq": "true", "piqa": "solution2", "hellaswag": "ending4"}
    rows = [official.choice(task, labels.get(task, "answer1")) for task in commonsense.TASKS]
    official.write_json(tmp_path / ("ft-training_set" if folder else "") / "commonsense_170k.json", rows)
    for task, row in zip(commonsense.TASKS, rows):
        official.write_json(tmp_path / folder / task / "test.json", [row])
    train, test = (catalog.find(str(tmp_path)).examples(split) for split in ("train", "test"))
    assert len(train) == len(test) == 8
    assert test[1].answer == commonsense.Choice("solution2", "piqa")
    assert contents(train[1].record) == [rows[1]["instruction"], "the correct answer is solution2"]
    records, validation = sources.splits(str(tmp_path))
    assert len(records) == 8 and validation is None  # the test questions are for the end
    assert len(sources.read_separate([str(tmp_path)], "test")) == 8
    one = catalog.find(f"commonsense/arc-easy:{tmp_path}").examples("test")
    assert [example.answer.task for example in one] == ["ARC-Easy"]
    assert catalog.find(str(tmp_path / folder / "boolq")).layout.name == "commonsense/boolq"


def test_alpaca(tmp_path):
    official.write_json(tmp_path / "alpaca_data.json", official.ALPACA)
    train, validation = sources.splits(str(tmp_path))
    assert contents(train[1]) == ["Name the odd one out.\n\nTwitter, Instagram, Telegram", "Telegram"]
    assert validation is None
    with pytest.raises(UserError, match=r"alpaca_data\.json, item 3 \(line 1\): output is empty"):
        train[2]


def test_oasst1_is_the_best_reply_at_each_level(tmp_path):
    root = official.write_oasst(tmp_path / "trees", official.OASST_TREE, official.UNANSWERED_TREE)
    rows = [row for tree in (official.OASST_TREE, official.UNANSWERED_TREE) for row in official.flatten(tree["prompt"])]
    assert len(rows) == 8
    official.write_rows(tmp_path / "messages" / "2023-04-12_oasst_ready.messages.jsonl", rows)
    for directory in (root, tmp_path / "messages"):
        (record,) = sources.splits(str(directory))[0]
        assert contents(record) == ["Why can't we divide by 0?", "best", "And i?", "imaginary"]
        assert [message["role"] for message in record.messages] == ["user", "assistant"] * 2
    official.write_rows(tmp_path / "messages" / "2023-04-12_oasst_ready.messages.jsonl", rows[1:])
    with pytest.raises(UserError, match="line 1: the parent q of this message is not in the file"):
        sources.splits(str(tmp_path / "messages"))


def test_guanaco_is_text(tmp_path):
    text = "### Human: Why?### Assistant: Because.### Human: Ah"
    for name in ("train", "eval"):
        official.write_rows(tmp_path / f"openassistant_best_replies_{name}.jsonl", [{"text": text}])
    assert [records[0] for records in sources.splits(str(tmp_path))] == [Text(text)] * 2


@pytest.mark.parametrize(("version", "name", "count"), [("v1.1", "squad", 4), ("v2.0", "squad-v2", 6)])
def test_squad(tmp_path, version, name, count):
    root = official.write_squad(tmp_path, version)
    for data in (str(root), f"{name}:{root}"):
        train, validation = sources.splits(data)
        assert len(train) == len(validation) == count
    assert train[0] == Completion(
        f"{official.SQUAD_CONTEXT}\nquestion: What character does it have?\nanswer:", " Catholic"
    )
    assert train.location(0) == f"{root}/train-{version}.json, item 1 (line 1), question 5733"
    rows = catalog.find(str(root)).examples("validation")
    assert rows[0].answer == ("Catholic", "a Catholic character")
    if version == "v2.0":
        assert rows[2].answer == () and rows[2].record.completion == " unanswerable"


def test_a_split_and_a_weight_of_an_official_data_set(tmp_path):
    root = official.write_squad(tmp_path)
    train, validation = sources.splits([f"squad:{root}:dev:2", f"{root}:0.5"])
    assert len(train) == 8 + 2 and len(validation) == 4
    assert sources.splits(f"{root}:train")[1] is None


@pytest.mark.parametrize(
    ("write", "edit", "message"),
    [
        (
            "glue",
            ("RTE/train.tsv", "\tentailment\n", "\tperhaps\n"),
            r"RTE/train\.tsv, line 3: label is 'perhaps', expected one of entailment, not_entailment",
        ),
        ("glue", ("RTE/train.tsv", "They met.\t", "They met. "), r"RTE/train\.tsv, line 3: 3 columns, expected the 4"),
        ("glue", ("STS-B/train.tsv", "3.800", "high"), r"STS-B/train\.tsv, line 3: score is 'high', expected a number"),
        (
            "glue",
            ("CoLA/train.tsv", "\t*\t", "\t"),
            r"CoLA/train\.tsv, line 2: 3 columns, expected the 4 columns source",
        ),
        ("e2e", ("trainset.csv", "mr,ref", "mr,text"), r"trainset\.csv: the header has no ref; got mr, text"),
        ("e2e", ("trainset.csv", ",Alimentum is", ", Alimentum,is"), r"trainset\.csv, line 3: 3 columns, expected 2"),
        (
            "wikisql",
            ("train.jsonl", '"sel": 2', '"sel": 9'),
            r"train\.jsonl, line 2: sel has the number 9, expected one",
        ),
        ("wikisql", ("train.jsonl", '"1-1000-1"', '"2-2"'), r"train\.jsonl, line 1: the table 2-2 is not in"),
        (
            "wikisql",
            ("train.jsonl", '"agg": 1', '"agg": "MAX"'),
            r"train\.jsonl, line 2: agg is a string, expected a num",
        ),
        (
            "wikisql",
            ("train.jsonl", "[0, 0, ", "[0, "),
            r"line 1: the condition \[0, 'John'\] is not \[column, operator",
        ),
        (
            "squad",
            ("train-v1.1.json", '"question": "What is', '"q": "What is'),
            r"train-v1\.1\.json, item 1 .*5734: no q",
        ),
        (
            "squad",
            ("train-v1.1.json", '"qas": [', '"qas": [1, '),
            r"item 1 \(line 1\): got a number, expected an object",
        ),
        ("oasst", ("", "", ""), r"oasst_ready\.trees\.jsonl\.gz, line 2: no prompt; got message_tree_id"),
    ],
)
def test_malformed_files_are_named_with_the_line(tmp_path, write, edit, message):
    if write == "oasst":
        official.write_oasst(tmp_path, official.OASST_TREE, {"message_tree_id": "y"})
    else:
        getattr(official, f"write_{write}")(tmp_path)
        path = tmp_path / edit[0]
        text = path.read_bytes().decode()
        assert edit[1] in text
        path.write_bytes(text.replace(*edit[1:]).encode())
    data = str(tmp_path / edit[0].partition("/")[0]) if write == "glue" else str(tmp_path)
    with pytest.raises(UserError, match=message):
        labeled.load(data, "train") if write == "glue" else list(sources.read(data, "train"))


def variants(value):
    """Yields copies of a JSON value, in each of which one part is of another type."""
    yield from (None, 1, "x", [], [1], {}, True)
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for part in variants(value[key]):
            copy = value.copy()
            copy[key] = part
            yield copy


@pytest.mark.parametrize("name", ["squad-v2", "oasst1", "messages", "wikisql", "tables", "samsum", "commonsense"])
def test_values_of_other_types_are_errors_of_the_user(tmp_path, name):
    squad, (root, answer, *_) = official.squad("v2.0"), official.flatten(official.OASST_TREE["prompt"])
    files = {
        "squad-v2": ("train-v2.0.json", squad | {"data": squad["data"][:1]}, official.write_json),
        "oasst1": ("2023_oasst_ready.trees.jsonl", official.OASST_TREE, write_row),
        "messages": (
            "2023_oasst_ready.messages.jsonl",
            answer,
            lambda path, row: official.write_rows(path, [root, row]),
        ),
        "samsum": ("train.json", official.SAMSUM, lambda path, row: official.write_json(path, [row])),
        "commonsense": ("commonsense_170k.json", official.choice("piqa", "solution1"), write_row),
    }
    if name in ("wikisql", "tables"):
        official.write_wikisql(tmp_path)
        path = tmp_path / ("train.jsonl" if name == "wikisql" else "train.tables.jsonl")
        content, write = json.loads(path.read_text().splitlines()[0]), write_row
    else:
        path, content, write = tmp_path / files[name][0], *files[name][1:]
    layout = {"messages": "oasst1", "tables": "wikisql"}.get(name, name)
    errors = count = 0
    for variant in variants(content):
        write(path, variant)
        count += 1
        try:
            list(sources.read(f"{layout}:{tmp_path}", "train"))
        except UserError as error:
            errors += 1
            assert str(path) in str(error) or str(tmp_path) in str(error)
    assert count > errors > 0


def write_row(path, row):
    official.write_rows(path, [row])


def test_a_wrong_directory_is_told_what_it_lacks(tmp_path):
    official.write_lines(tmp_path / "train.tsv", ["a\tb", "1\t2"])
    expected = {
        "squad": r"no train-v1\.1\.json, which the split train of squad needs; the directory has train\.tsv",
        "wikisql": r"no train\.jsonl and train\.tables\.jsonl, which",
        "e2e": r"no trainset\.csv, .*expected trainset\.csv, or train\.txt, or train_formatted\.jsonl; the directory",
        "oasst1": r"no \*oasst_ready\?trees\.jsonl\*",
        "commonsense": r"no commonsense_170k\.json",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message):
            sources.read(f"{name}:{tmp_path}", "train")
    with pytest.raises(UserError, match=r"squad:nowhere: no such directory nowhere; expected squad:DIRECTORY"):
        sources.read("squad:nowhere", "train")
    with pytest.raises(UserError, match=r"the nearest official data set is glue/rte:DIRECTORY"):
        labeled.load(f"glue/rt:{tmp_path}", "train")
    with pytest.raises(UserError, match=r"the nearest official data set is squad:DIRECTORY"):
        sources.read(f"sqad:{tmp_path}", "train")
    official.write_squad(tmp_path)
    (tmp_path / "train-v1.1.json").unlink()
    with pytest.raises(UserError, match=r"no train-v1\.1\.json"):
        sources.read(str(tmp_path), "train")
    with pytest.raises(UserError, match="the texts have no labels"):
        labeled.load(str(tmp_path), "validation")


def test_several_data_sets_in_a_directory_are_asked_for_by_name(tmp_path):
    official.write_glue(tmp_path / "glue_data")
    with pytest.raises(UserError, match=r"holds glue/cola, .*choose one, as in glue/cola:"):
        labeled.load(f"{tmp_path}/glue_data", "train")
    for version in ("v1.1", "v2.0"):
        official.write_squad(tmp_path / "squad", version)
    with pytest.raises(UserError, match=r"holds squad and squad-v2; choose one, as in squad:"):
        sources.read(str(tmp_path / "squad"), "train")
    assert len(sources.read(f"squad-v2:{tmp_path}/squad", "train")) == 6


def test_other_directories_are_not_recognized(tmp_path):
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for name in ("train", "val", "test"):
        official.write_json(tmp_path / f"{name}.json", [row])
    official.write_lines(tmp_path / "train.tsv", ["index\tsentence1\tsentence2\tlabel", "0\ta\tb\tmaybe"])
    official.write_lines(tmp_path / "train.txt", ["a text"])
    assert catalog.find(str(tmp_path)) is None
    assert catalog.find("org/name") is None and catalog.find("debian_sections") is None


def test_the_hub(tmp_path, monkeypatch):
    squad = [{"context": "c", "question": "q", "answers": {"text": ["a", "b"], "answer_start": [0, 1]}}]
    messages = official.flatten(official.OASST_TREE["prompt"])
    messages = [{key: row.get(key) for key in ("message_id", "parent_id", "text", "role", "rank")} for row in messages]
    mnli = [{"premise": "p", "hypothesis": "h", "label": label, "idx": 0} for label in (2, -1)]
    tables = {
        ("rajpurkar/squad", None): {"train": squad, "validation": squad},
        ("OpenAssistant/oasst1", None): {"train": messages[:4] + messages[5:], "validation": messages},
        ("nyu-mll/glue", "mnli"): {
            "train": mnli[:1],
            "validation_matched": mnli[:1] * 2,
            "validation_mismatched": mnli[:1],
            "test_matched": mnli[1:],
        },
    }

    def load(name, config):
        return {split: datasets.Dataset.from_list(rows) for split, rows in tables[name, config].items()}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    train, validation = sources.splits("squad")
    assert train[0] == Completion("c\nquestion: q\nanswer:", " a") and len(validation) == 1
    assert sources.read_separate(["squad"], "test") is None
    assert catalog.find("squad").examples("validation")[0].answer == ("a", "b")
    (record,) = sources.read("oasst1:train", "train")
    assert isinstance(record, Conversation) and contents(record)[1] == "best"
    assert len(sources.splits("oasst1")[1]) == 1
    validation, test = (labeled.load("glue/mnli", split) for split in ("validation", "test"))
    assert validation.texts == (("p", "h"),) * 2 and validation.labels.tolist() == [2, 2]
    assert test.labels.tolist() == [NO_LABEL]
    with pytest.raises(UserError, match="wikisql is not on the Hugging Face Hub; name its directory"):
        sources.read("wikisql", "train")


def test_digests_depend_on_content_only(tmp_path):
    one, other = (official.write_squad(tmp_path / name) for name in ("a", "b"))
    digests = [sources.read(str(root), "train").digest for root in (one, other)]
    assert digests[0] == digests[1] != sources.read(str(one), "validation").digest
    path = Path(other / "train-v1.1.json")
    path.write_text(json.dumps(official.squad("v1.1")).replace("Catholic", "catholic"))
    assert sources.read(str(other), "train").digest != digests[0]


def test_the_guide_lists_every_data_set():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")
    for layout in catalog.LAYOUTS.values():
        assert f"`{layout.name}`" in page or f"`{layout.name.partition('/')[2]}`" in page
        assert layout.hub is None or f"`{layout.hub.partition(':')[0]}`" in page
