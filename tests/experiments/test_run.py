"""The command line: help, typos, and one sentence with exit status 2 for what the user can put right."""

import dataclasses
import inspect
import subprocess
import sys

import pytest

from experiments import command_line, configs, pods, run
from experiments.configs import language_model, quickstart, sft
from experiments.configs.decoder import BatchSizes
from experiments.errors import UserError
from experiments.reports.results import Outcome
from experiments.training.mesh import MeshSizes


def answer(capsys, *args):
    status = run.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def test_help_lists_the_configs(capsys):
    for args in ([], ["--help"]):
        status, out, err = answer(capsys, *args)
        assert status == 0 and not err
        assert all(f"  {name} " in out for name in ("quickstart", "llama-tiny", "gpt2-tiny"))


def test_the_list_has_one_line_and_the_minutes_of_each_command(capsys, monkeypatch):
    names = command_line.config_names(configs)
    for columns in (None, 80, 120):
        monkeypatch.delenv("COLUMNS", raising=False) if columns is None else monkeypatch.setenv("COLUMNS", str(columns))
        status, out, err = answer(capsys, "--list")
        assert status == 0 and not err
        lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
        assert set(lines) == {*names, *command_line.config_names(pods)}
        assert columns is None or max(map(len, out.splitlines())) <= columns
        for name in names:
            module = command_line.find_config(name)
            minutes = vars(type(module.DEFAULTS))["MINUTES"]
            assert (minutes is None and name == "chat") or (minutes > 0 and f" {minutes} min  " in lines[name])
            assert columns is not None or lines[name].endswith(module.__doc__.splitlines()[0])


def test_dashes_and_underscores_name_the_same_config():
    assert command_line.find_config("llama-tiny") is command_line.find_config("llama_tiny")


def test_help_of_a_config_documents_every_field(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = answer(capsys, "quickstart", "--help")
    assert status == 0
    for field in dataclasses.fields(quickstart.Config):
        assert "--" + field.name.replace("_", "-") in out
    assert "Rank of the LoRA factors" in out


@pytest.mark.parametrize("name", ["llama-tiny", "gpt2-tiny"])
def test_help_of_a_language_model(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = answer(capsys, name, "--help")
    assert status == 0 and f"(default: runs/{name})" in out and "--family" not in out
    for field in dataclasses.fields(language_model.Config):
        assert field.name == "family" or "--" + field.name.replace("_", "-") in out


@pytest.mark.parametrize("name", ["", *command_line.config_names(configs)])
def test_help_fits_the_terminal(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, err = answer(capsys, *name.split(), "--help")
    assert status == 0 and err == "" and max(map(len, out.splitlines())) <= 80
    assert "(default: )" not in " ".join(out.replace("│", " ").split()) and "\n\n\n" not in out


@pytest.mark.parametrize("config", [quickstart.Config, language_model.Config, sft.Config])
def test_every_field_has_a_docstring(config):
    classes = [kind for kind in config.__mro__ if dataclasses.is_dataclass(kind)]
    source = "".join(map(inspect.getsource, (*classes, MeshSizes, BatchSizes))).replace(
        'Annotated[int | None, tyro.conf.arg(name="global")]', "int | None"
    )
    nested = [field for kind in (MeshSizes, BatchSizes) for field in dataclasses.fields(kind)]
    for field in (*dataclasses.fields(config), *nested):
        assert f"    {field.name}: " in source
        assert source.split(f"    {field.name}: ")[1].splitlines()[1].lstrip().startswith('"""'), field.name


@pytest.mark.parametrize(("typed", "meant"), [("quikstart", "quickstart"), ("lama_tiny", "llama-tiny")])
def test_unknown_config_names_the_nearest(capsys, typed, meant):
    status, out, err = answer(capsys, typed)
    assert (status, out, err) == (2, "", f"error: unknown config {typed!r}; did you mean {meant}?\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metods", "head"], "--methods"),
        (["--methods", "head,lore"], "unknown method 'lore'"),
        (["--methods", ","], "expected different methods"),
        (["--export", "onnx"], "onnx"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--epochs", "many"], "'many'"),
        (["--lengths", "12", "8"], "lengths must be ascending"),
        (["--warmup", "1"], "warmup must be a fraction"),
        (["--lora-lr", "-1"], "must not be negative"),
    ],
)
def test_wrong_flags(capsys, monkeypatch, flags, message):
    monkeypatch.setenv("COLUMNS", "200")
    status, _, err = answer(capsys, "quickstart", *flags)
    assert status == 2 and message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "0"], "rank must be positive"),
        (["--samples", "-1"], "samples must not be negative"),
        (["--targets", "router"], "router"),
        (["--targets"], "targets"),
        (["--family", "gpt2"], "--family"),
        (["--warmup", "1"], "warmup must be a fraction"),
        (["--lengths", "12", "8"], "lengths must be ascending"),
    ],
)
def test_wrong_flags_of_a_language_model(capsys, monkeypatch, flags, message):
    monkeypatch.setenv("COLUMNS", "200")
    status, _, err = answer(capsys, "llama-tiny", *flags)
    assert status == 2 and message in err and "Traceback" not in err


def test_what_the_user_can_put_right_is_one_sentence(capsys, tmp_path, tiny_data):
    def check(message, *flags):
        status, _, err = answer(capsys, "quickstart", "--out", tmp_path / "out", *flags)
        assert status == 2 and message in err
        assert err.startswith("error: ") and err.count("\n") == 1

    check("no such data directory", "--data", tmp_path / "nowhere")
    check("expected at least 100000 examples", "--train-examples", "100000")
    ours = ("--train-examples", "None", "--test-examples", "None", "--data", tiny_data)
    check("no such directory", *ours, "--model", "./nowhere")
    check(r"config.json: no such file", *ours, "--model", tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    (data / "labels.txt").write_text("games\nmail\n")
    (data / "test.tsv").write_text("label\ttext\ngames\tchess\n")
    (data / "train.tsv").write_text("label\ttext\nsport\tball\n")
    check("label 'sport' is not in", *ours[:4], "--data", data)
    (data / "train.tsv").write_text("")
    check("train.tsv: the file is empty", *ours[:4], "--data", data)


def test_as_a_program():
    command = [sys.executable, "-m", "experiments.run", "quickstrat"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown config 'quickstrat'; did you mean quickstart?\n"


@pytest.mark.parametrize(
    "args, said",
    [
        (["sweep", "--alpha", "nan"], "alpha must be positive, not nan"),
        (["sweep", "--learning-rates", "nan"], "learning_rates must be positive, not nan"),
        (["sweep", "--seed", "-1"], "seed must not be negative"),
        (["subspaces", "--lr", "0"], "lr must be positive, not 0.0"),
        (["quickstart", "--clip", "inf"], "clip must be positive, not inf"),
    ],
)
def test_numbers_that_no_run_can_use(args, said, capsys):
    assert run.main(args) == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_output_that_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(path, *args, **kwargs):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("experiments.studies.quickstart.run", lambda config: full(config.out))
    assert run.main(["quickstart", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: No space left on device\n"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"evaluations": []}'], ids=["cut", "something else", "another version"]
)
def test_a_damaged_record_is_one_sentence(content, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"result\.json: damaged, or of another version .*--fresh starts over"):
        Outcome.load(path)
