"""Metrics of official data sets: values computed by hand, and those of the libraries' own examples."""

import doctest
import functools
import math

import nltk
import numpy as np
import pytest

from experiments.errors import UserError
from experiments.evaluation import choices, labels, queries, reading, tasks, texts, wordnet
from experiments.input.official import catalog, sql
from experiments.input.official.commonsense import Choice
from tests.experiments import official_data as official

# The example of nltk's documentation, from the paper on BLEU.
GUIDE = "It is a guide to action which ensures that the military always obeys the commands of the party"
GUIDES = (
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
)


@pytest.mark.parametrize(
    ("task", "predictions", "answers", "expected"),
    [
        # 2 true positives, 1 false positive, 1 false negative, 0 true negatives; and one of each kind more.
        ("cola", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"matthews": 100 * (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2)}),
        ("mrpc", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"accuracy": 60, "f1": 200 / 3}),
        ("qqp", [0, 0], [0, 1], {"accuracy": 50, "f1": 0}),
        ("sst2", [0, 1, 1, 1], [0, 1, 0, 0], {"accuracy": 50}),
        ("mnli-mismatched", [0, 1, 2], [0, 2, 2], {"accuracy": 200 / 3}),
        # Deviations -1, 0, 1 and -2, -1, 3: 5 / sqrt(2 · 14); ranks 1, 2, 3 and 1, 2, 3.
        ("stsb", [1.0, 2.0, 3.0], [0.0, 1.0, 5.0], {"pearson": 500 / math.sqrt(28), "spearman": 100}),
        ("stsb", [3.0, 1.0, 2.0], [1.0, 2.0, 3.0], {"pearson": -50, "spearman": -50}),
        ("rte", [" Entailment", "not_entailment\n", "no idea"], [0, 1, 1], {"accuracy": 200 / 3}),
        ("stsb", ["1", "nothing", " 2.0"], [1.0, 0.0, 2.0], {"pearson": 100, "spearman": 100}),
    ],
)
def test_labels(task, predictions, answers, expected):
    scores = tasks.evaluate(f"glue/{task}", predictions, answers)
    assert list(scores) == list(expected) == list(tasks.names(f"glue/{task}"))
    assert scores == pytest.approx(expected)


def test_a_constant_prediction_has_no_correlation():
    assert all(np.isnan(list(tasks.evaluate("glue/stsb", [1.0, 1.0], [1.0, 2.0]).values())))


def test_bleu_is_the_geometric_mean_of_clipped_precisions():
    # "the" may count twice, as in the best reference. The closest references have 7 and 4 words, the texts 7 and 4.
    answers = ["the the the the the the the", "a b c d"]
    references = [("the cat is on the mat", "there is a cat on the mat"), ("a b c d",)]
    precisions = (2 + 4) / 11, (0 + 3) / 9, (0 + 2) / 7, (0 + 1) / 5
    assert texts.bleu(answers, references) == pytest.approx(100 * math.prod(precisions) ** 0.25)
    short = texts.bleu(["a b c d"], [("a b c d e f",)])
    assert short == pytest.approx(100 * math.exp(1 - 6 / 4))
    # The score of the E2E challenge's script ignores case and separates punctuation.
    assert tasks.evaluate("e2e", ["Cotto, a Cafe!"], [("cotto , a cafe !", "other")])["bleu"] == pytest.approx(100)
    assert texts.bleu(["Cotto, a Cafe!"], [("cotto , a cafe !",)]) < 100


def test_nist_is_the_information_of_the_words_that_match():
    # Each of three words has log2(3) bits, their sequences none; an answer of two thirds of the length scores half.
    assert texts.nist(["a B c"], [("A b c",)]) == pytest.approx(math.log2(3))
    assert texts.nist(["a b"], [("a b c",)]) == pytest.approx(math.log2(3) / 2)
    assert texts.nist([""], [("a b c",)]) == 0


def test_meteor_is_that_of_nltks_example(tmp_path, monkeypatch):
    (tmp_path / "wordnet").mkdir()
    write_wordnet(tmp_path / "wordnet")
    monkeypatch.setattr(nltk.data, "path", [])
    reader = wordnet.open_reader(tmp_path / "wordnet")
    monkeypatch.setattr(wordnet, "open_reader", lambda: reader)
    assert texts.meteor([GUIDE], [GUIDES]) == pytest.approx(69.44, abs=0.005)
    # Both words match, in one chunk: precision and recall are 1, and half of (1/2)³ is the penalty.
    assert texts.meteor(["the auto"], [("the car",)]) == pytest.approx(100 * (1 - 0.5 / 8))
    assert tasks.evaluate("e2e", ["the auto"], [("the car",)], ["meteor"]) == {"meteor": pytest.approx(93.75)}
    assert tasks.evaluate("e2e", ["the auto"], [("the car",)])["meteor"] == pytest.approx(93.75)


def write_wordnet(directory):
    """WordNet's files as Debian distributes them, with one set of synonyms."""
    for pos in ("noun", "verb", "adj", "adv"):
        (directory / f"{pos}.exc").write_text("")
        (directory / f"data.{pos}").write_text("")
        (directory / f"index.{pos}").write_text("")
    data = "00000000 06 n 02 car 0 auto 0 000 | a motor vehicle  \n"
    (directory / "data.noun").write_text(data)
    (directory / "index.noun").write_text(
        "auto n 1 0 1 0 00000000  \ncar n 1 0 1 0 00000000  \n",
    )
    for name in ("cntlist.rev", "verb.Framestext"):
        (directory / name).write_text("")


def test_without_wordnet_meteor_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(UserError, match=r"install Debian's package wordnet-base, or run python -m nltk\.downloader"):
        wordnet.open_reader(tmp_path / "nowhere")
    monkeypatch.setattr(wordnet, "open_reader", functools.partial(wordnet.open_reader, tmp_path / "nowhere"))
    assert "meteor" not in tasks.evaluate("e2e", ["the auto"], [("the car",)])


def test_rouge_takes_the_best_reference():
    answers, references = ["the cat lay on the mat"], [("a dog barks", "the cat sat on the mat")]
    scores = texts.rouge(answers, references, ["rouge1", "rouge2", "rougeL"])
    assert scores == pytest.approx({"rouge1": 500 / 6, "rouge2": 300 / 5, "rougeL": 500 / 6})
    samsum = tasks.evaluate("samsum", ["She bakes cookies"], [("She baked a cookie",)])
    assert samsum == pytest.approx({"rouge_1": 600 / 7, "rouge_2": 200 / 5, "rouge_l": 600 / 7})  # of stems


def test_edits_and_characters():
    references = [("the cat sat on the mat",)]
    assert texts.ter(["the cat sat on a mat"], references) == pytest.approx(100 / 6)
    assert texts.chrf(["the cat sat on the mat"], references) == pytest.approx(100)
    assert texts.ter(["a b"], [("c d", "a b")]) == 0


def test_reading_comprehension():
    answers = ["The Louvre!", "in the year 1889", "", "Unanswerable.", "Paris"]
    right = [("louvre", "museum"), ("1889", "the year 1889"), (), (), ("a the",)]
    # Of "in year 1889" and "year 1889" two words match: precision 2/3, recall 1.
    assert tasks.evaluate("squad-v2", answers, right) == pytest.approx({"exact_match": 60, "f1": 100 * (3 + 0.8) / 5})
    assert reading.score(["anything"], [()]) == {"exact_match": 0, "f1": 0}


def test_choices():
    words = [("it is false, not true", "true"), ("solution2", "solution2"), ("none", "ending1"), ("answer3", "answer3")]
    for (text, label), expected in zip(words, ("false", "solution2", "", "answer3")):
        assert choices.extract(text, label) == expected
    answers = [Choice("true", "boolq"), Choice("false", "boolq"), Choice("option1", "winogrande")]
    scores = tasks.evaluate("commonsense", ["true", "true", "the correct answer is option1"], answers)
    assert scores == {"boolq": 50, "winogrande": 100, "average": 75}
    assert tasks.evaluate("commonsense/piqa", ["solution1"], [Choice("solution1")]) == {"accuracy": 100}


def test_queries(tmp_path):
    root = official.write_wikisql(tmp_path)
    answers = [example.answer for example in catalog.find(str(root)).examples("test")]
    right = [sql.write(answer.query, answer.columns) for answer in answers]
    assert tasks.evaluate("wikisql", right, answers) == {"logical_form": 100, "execution": 100}
    others = [
        'select "team" from table where "player" = \'JOHN\' AND "points" = 12',  # another form, the same result
        'SELECT "Points" FROM table WHERE "Player" = \'John\'',  # the largest value without an aggregate
        "SELECT nothing",
    ]
    assert tasks.evaluate("wikisql", others, answers) == pytest.approx({"logical_form": 0, "execution": 200 / 3})
    same = sql.write(sql.Query(3, 3, answers[2].query.conditions[::-1]), answers[2].columns)
    assert queries.score([same], answers[2:]) == {"logical_form": 100, "execution": 100}
    (root / "test.db").unlink()
    with pytest.raises(UserError, match=r"test\.db: no such file; the accuracy of results needs WikiSQL's databases"):
        queries.score(right, answers)


def test_values_of_queries_are_those_of_the_column(tmp_path):
    root = official.write_wikisql(tmp_path)
    with queries._open(root / "dev.db") as database:
        for content, values in (("12", ["hawks"]), ("12 points", ["hawks"]), (3.5, ["bulls"]), ("1,000", [])):
            assert queries.execute(database, "1-1000-1", sql.Query(1, 0, ((2, 0, content),))) == values
        assert queries.execute(database, "1-1000-1", sql.Query(2, 5, ())) == [7.75]
        with pytest.raises(ValueError, match="'many' has no number"):
            queries.execute(database, "1-1000-1", sql.Query(1, 0, ((2, 1, "many"),)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("alpaca", ["a"], [("a",)]), "alpaca: no metrics; expected one of glue/cola"),
        (("e2e", ["a"], []), "e2e: 1 predictions for 0 answers; expected one for each"),
        (("e2e", ["a"], [("a",)], ["cider"]), r"no metric cider; expected bleu, .*\(CIDEr is not implemented\)"),
    ],
)
def test_what_cannot_be_evaluated(arguments, message):
    with pytest.raises(UserError, match=message):
        tasks.evaluate(*arguments)


@pytest.mark.parametrize("module", [choices, labels, reading, tasks, sql, catalog])
def test_examples_of_the_documentation(module):
    results = doctest.testmod(module)
    assert results.failed == 0 < results.attempted
