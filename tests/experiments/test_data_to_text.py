"""Data to text end to end on a tiny model: what it writes, reads again, and concludes; the paper's settings."""

import dataclasses
import json

import pytest

from experiments import command_line, execution
from experiments.configs import data_to_text
from experiments.configs.data_to_text import Config
from experiments.errors import UserError
from experiments.evaluation import answers
from experiments.studies.data_to_text import report, study
from experiments.studies.data_to_text.report import BASE, FULL, LINEAR, QUERY_VALUE, SHOTS, Measured
from experiments.studies.sft import study as sft_study
from tests.experiments import official_data as official

pytestmark = pytest.mark.usefixtures("lenient")


def test_the_smallest_study_and_its_results_again(tmp_path, monkeypatch, capsys):
    config = Config(fast=True, out=tmp_path)
    rows = study.run(config)
    assert [(row.task, row.method) for row in rows] == [
        (task, method) for task in config.tasks for method in (BASE, QUERY_VALUE, LINEAR, FULL)
    ]
    for row in rows:
        queries = {"logical_form", "execution"} if row.task == "sql_questions" else set()
        assert row.metrics.keys() == {"rouge_l", "bleu", "chrf"} | queries
    assert 0 == rows[0].parameters < rows[1].parameters < rows[2].parameters < rows[3].parameters
    record = json.loads((tmp_path / "run.json").read_text())
    assert [row["score"] for row in record["rows"]] == [row.score for row in rows]
    page = (tmp_path / "README.md").read_text()
    assert "| WikiSQL: paper's LoRA | 4.7M | – | – | – | 73.4 | – |" in page
    assert "| questions: LoRA, all linear |" in page and "| tags: full fine-tuning |" in page
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    monkeypatch.setattr(sft_study, "_train", lambda *args: pytest.fail("trained again"))
    assert study.run(config) == rows


def parsed(*args):
    """The config of a command line."""
    configs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "execute", lambda config: configs.append(config) or 0)
        assert command_line.main(["data-to-text", *map(str, args)]) == 0
    return configs[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The directories of official data sets."""
    root = tmp_path_factory.mktemp("official")
    official.write_e2e(root / "e2e")
    official.write_wikisql(root / "wikisql")
    for split in ("train", "val", "test"):
        official.write_json(root / "samsum" / f"{split}.json", [official.SAMSUM])
    return root


def test_the_papers_setting_end_to_end(data, tmp_path, monkeypatch):
    decodings = []
    answer = answers.Answerer.answer
    monkeypatch.setattr(answers.Answerer, "answer", lambda *args: decodings.append(args[-1]) or answer(*args))
    flags = ("--paper", "gpt-2", "--fast", "--model", "tiny-gpt2", "--data", f"e2e:{data}/e2e")
    config = parsed(*flags, "--out", tmp_path)
    assert parsed(*flags).out.name == "data-to-text-gpt-2-e2e-fast"
    rows = study.run(config)
    assert [row.method for row in rows] == [BASE, QUERY_VALUE, FULL]  # solved examples are longer than its sequences
    assert {(each.beams, each.length_penalty, each.no_repeat_ngram) for each in decodings} == {(2, 0.9, 4)}
    assert rows[0].metrics.keys() >= {"bleu", "nist", "rouge_l", "chrf", "ter"}
    page = (tmp_path / "README.md").read_text()
    assert "| paper's GPT-2 M, LoRA | 0.35M |" in page and "CIDEr is absent" in page
    assert "its formula gives 393,216 and 737,280" in page
    settings = json.loads((tmp_path / "e2e-query-value" / "config.json").read_text())
    assert settings["dropout"] == settings["label_smoothing"] == 0.1 and settings["warmup"] == 1
    assert settings["targets"] == ["query", "value"] and settings["pack"] is False and settings["clip"] is None


def test_wikisql_is_scored_on_its_validation_examples(data, tmp_path):
    names = ("--methods", "query-value", "--beams", 2, "--out", tmp_path)
    (base, *_, tuned) = study.run(parsed("--fast", "--data", f"wikisql:{data}/wikisql", *names))
    assert base.metrics.keys() == {"logical_form", "execution"} and tuned.method == QUERY_VALUE
    stored = json.loads((tmp_path / "wikisql-query-value" / "scores.json").read_text())
    assert stored["data"].startswith(f"wikisql:{data}/wikisql:validation")


def test_a_missing_database_is_noticed_before_training(tmp_path, monkeypatch):
    root = official.write_wikisql(tmp_path / "wikisql")
    (root / "dev.db").unlink()
    monkeypatch.setattr(sft_study, "run", lambda config: pytest.fail("trained"))
    config = parsed("--fast", "--data", f"wikisql:{root}", "--out", tmp_path / "out")
    with pytest.raises(UserError, match=r"dev\.db: no such file; WikiSQL's queries are executed on it"):
        study.run(config)


def test_presets_are_the_papers(data):
    gpt2 = parsed("--paper", "gpt-2", "--model", "gpt2-medium", "--data", f"e2e:{data}/e2e")
    assert gpt2.model == "gpt2-medium" and gpt2.methods == (QUERY_VALUE, FULL)
    assert (gpt2.rank, gpt2.alpha, gpt2.lr, gpt2.weight_decay, gpt2.dropout) == (4, 32.0, 2e-4, 0.01, 0.1)
    assert (gpt2.label_smoothing, gpt2.batch_size, gpt2.epochs, gpt2.steps, gpt2.warmup) == (0.1, 8, 5, None, 500)
    assert (gpt2.beams, gpt2.length_penalty, gpt2.no_repeat_ngram, gpt2.length) == (10, 0.9, 4, 512)
    assert (gpt2.new_tokens, gpt2.test_examples, gpt2.clip, gpt2.pack) == (64, None, None, False)
    assert gpt2.out.name == "data-to-text-gpt-2-e2e"
    for name, length, warmup in (("wikisql", 384, 5), ("samsum", 2048, 1)):
        gpt3 = parsed("--paper", "gpt-3", "--model", "other", "--data", data / name)  # recognized by its files
        assert (gpt3.length, gpt3.warmup, gpt3.lr, gpt3.full_lr, gpt3.weight_decay) == (length, warmup, 2e-4, 5e-6, 0.1)
        assert (gpt3.batch_size, gpt3.epochs, gpt3.rank, gpt3.alpha, gpt3.beams) == (128, 2, 8, 8.0, 1)


def test_flags_win_over_the_preset(data):
    """Also those with the value that is the default without it."""
    flags = ("--rank", 16, "--steps", 64, "--beams", 1, "--length-penalty", 0.8, "--methods", "query-value,linear,full")
    config = parsed("--paper", "gpt-2", "--model", "other", "--data", f"e2e:{data}/e2e", *flags)
    assert (config.rank, config.steps, config.beams, config.length_penalty) == (16, 64, 1, 0.8)
    assert config.methods == tuple(data_to_text.METHODS) and config.lr == 2e-4


def test_the_default_settings_of_runs():
    """Which name the directories and determine whether results are read again."""
    run_config = study._run_config(Config(), "debian_tags", "debian_tags", LINEAR)
    expected = dataclasses.replace(
        sft_study.Config(),
        model="smollm2-135m",
        data=("debian_tags",),
        length=256,
        epochs=48,
        steps=48,
        validation_examples=0,
        test_examples=40,
        samples=0,
        out=Config.out / "debian_tags-attention-feed-forward",
    )
    assert run_config == expected


def measured(method, score, *, task="debian_tags", error=1.0, parameters=0):
    return Measured(task, method, parameters, 9.0, {"rouge_l": score}, score, error)


def test_verdicts():
    rows = [
        measured(BASE, 10.0),
        measured(SHOTS, 12.0),
        measured(QUERY_VALUE, 20.0, parameters=5),
        measured(LINEAR, 21.0, parameters=9),
        measured(FULL, 21.5, parameters=99),
    ]
    prompt, linear, full = report._findings(rows)
    assert prompt.verdict == "observed" and "LoRA, all linear minus base, 3 examples: +9.0 ± 1.4" in prompt.figures
    assert linear.verdict == "not decided" and full.verdict == "not decided"
    assert "LoRA, all linear minus full fine-tuning: -0.5 ± 1.4" in full.figures
    worse = [*rows[:2], dataclasses.replace(rows[2], score=30.0), rows[3]]
    assert [finding.verdict for finding in report._findings(worse)] == ["observed", "not observed"]
    exact = [dataclasses.replace(row, error=0.1) for row in rows]
    assert report._findings(exact)[-1].verdict == "observed"
    assert report._findings([*exact[:-1], measured(FULL, 30.0)])[-1].verdict == "not observed"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--tasks", "e2e"],
            "tasks must be one or more of debian_tags, debian_synopses, sql_questions, each once; got e2e",
        ),
        (["--paper"], "gpt-2"),
        (
            ["--paper", "gpt-3", "--data", "samsum:x"],
            "--paper gpt-3: pass the model and one data set of the original setting, as in --model DIRECTORY --data "
            "wikisql:DIRECTORY or samsum:DIRECTORY",
        ),
        (["--paper", "gpt-2", "--model", "x"], "--paper gpt-2: pass the model and one data set"),
        (
            ["--paper", "gpt-2", "--model", "x", "--data", "nowhere"],
            "--data nowhere: expected different data sets of e2e, wikisql, samsum",
        ),
        (["--paper", "gpt-2", "--model", "x", "--data", "samsum"], "--data samsum; --paper gpt-3 has one"),
        (["--tasks", "sql_questions", "--data", "e2e:x"], "tasks and data exclude each other"),
        (["--data", "e2e:nowhere"], "e2e:nowhere: no such directory nowhere"),
        (["--methods", "query-value,all"], "unknown method 'all'; expected one of query-value, linear, full"),
        (["--beams", "0"], "beams must be positive"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(args, message, capsys):
    assert command_line.main(["data-to-text", *args]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
