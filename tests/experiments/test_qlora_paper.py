"""The studies of QLoRA's tables and figures with the settings of its authors."""

import json

import pytest

from experiments import command_line, execution
from experiments.configs import sft
from experiments.errors import UserError
from experiments.studies import all_linear, all_linear_paper, datatypes
from experiments.studies.all_linear_paper import Measured
from experiments.studies.sft import study as sft_study
from tests.experiments import official_data as official

pytestmark = pytest.mark.usefixtures("lenient")


def parsed(*args):
    """The config of a command line."""
    configs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "execute", lambda config: configs.append(config) or 0)
        assert command_line.main([*map(str, args)]) == 0
    return configs[0]


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    """Alpaca in its distributed form, with an empty answer."""
    root = tmp_path_factory.mktemp("alpaca")
    rows = [{**row, "output": row["output"] or "A poem."} for row in official.ALPACA * 12]
    official.write_json(root / "alpaca_data.json", [*rows, official.ALPACA[2]])
    return root


PAPER = ("--paper", "llama-7b")
TINY = ("--model", "tiny-llama", "--template", "{% for message in messages %}{{ message.content }}\n{% endfor %}")


def test_layers_and_ranks_on_alpaca(alpaca, tmp_path, monkeypatch):
    flags = ("--mesh.data", 2, "--checkpoint-every", 1, "--out", tmp_path)
    config = parsed("all-linear", *PAPER, "--fast", *TINY, "--data", alpaca, *flags)
    rows = all_linear.run(config)
    assert [(row.layers, row.rank) for row in rows] == [
        *((layers, 2) for layers in all_linear_paper._TARGETS),
        (all_linear_paper._FULL, None),
    ]
    assert [row.parameters for row in rows] == sorted(row.parameters for row in rows)
    settings = json.loads((tmp_path / "all-linear-r2-seed0" / "config.json").read_text())
    assert (settings["mesh"]["data"], settings["checkpoint_every"]) == (2, 1)
    assert (settings["quantize"], settings["double_quantization"], settings["dtype"]) == ("nf4", True, "bfloat16")
    assert (settings["schedule"], settings["clip"], settings["alpha"], settings["dropout"]) == (
        "constant",
        0.3,
        16,
        0.1,
    )
    page = (tmp_path / "README.md").read_text()
    assert "| all linear, r = 2 |" in page
    monkeypatch.setattr(sft_study, "_train", lambda *args: pytest.fail("trained again"))
    assert all_linear.run(config) == rows


def test_data_types_of_a_base_in_bfloat16(alpaca, tmp_path):
    flags = ("--data", f"alpaca:{alpaca}", "--validation-share", 0.2, "--batch-size", 2, "--out", tmp_path)
    rows = datatypes.run(parsed("datatypes", *PAPER, "--fast", *TINY, *flags))
    assert rows[0].name == "bfloat16" and rows[0].bits == 16
    assert all(row.after != row.before for row in rows)
    settings = json.loads((tmp_path / "nf4-double" / "config.json").read_text())
    assert (settings["schedule"], settings["clip"], settings["alpha"], settings["rank"]) == ("constant", 0.3, 16, 2)


def test_presets_are_those_of_the_scripts(alpaca):
    flags = (*PAPER, "--model", "llama", "--data", f"alpaca:{alpaca}")
    types, layers = parsed("datatypes", *flags), parsed("all-linear", *flags)
    for config in (types, layers):
        assert (config.alpha, config.dropout, config.lr, config.batch_size, config.steps) == (16, 0.1, 2e-4, 16, 1875)
        assert (config.warmup, config.clip, config.length) == (0, 0.3, 512)
    assert (types.rank, types.schedule, types.dtype, types.pack) == (64, "constant", "bfloat16", False)
    assert layers.ranks == (8, 64) and layers.label_smoothing == 0
    assert [config.out.name for config in (types, layers)] == ["datatypes-llama-7b", "all-linear-llama-7b"]


@pytest.mark.parametrize("name", ["datatypes", "all-linear"])
def test_the_smallest_study_of_the_preset_is_small_and_in_a_directory_of_its_own(name, alpaca):
    config = parsed(name, *PAPER, "--fast", "--model", "llama", "--data", f"alpaca:{alpaca}", "--lr", "1e-2")
    assert (config.steps, config.batch_size, config.out.name) == (2, 2, f"{name}-llama-7b-fast")
    assert (config.lr, config.alpha, config.model) == (1e-2, 16, "llama")


def test_flags_win_over_the_preset(alpaca):
    """Also those with the value that is the default without it."""
    data = (*PAPER, "--model", "llama", "--data", f"alpaca:{alpaca}")
    types = parsed("datatypes", *data, "--rank", 16, "--schedule", "linear", "--steps", 24)
    assert (types.rank, types.schedule, types.steps, types.alpha) == (16, "linear", 24, 16)
    layers = parsed("all-linear", *data, "--lr", "3e-3", "--ranks", 2, 8, 32)
    assert (layers.lr, layers.ranks, layers.clip) == (3e-3, (2, 8, 32), 0.3)


def test_the_default_settings_of_runs():
    """Which determine whether results of data types are read again."""
    config = type(command_line.find_config("datatypes").DEFAULTS)()
    expected = sft.Config(
        data=config.data,
        train_on="all",
        lr=1e-3,
        epochs=24,
        steps=24,
        eval_every=24,
        eval_share=0.9,
        validation_examples=60,
        samples=0,
        quantize="nf4",
        out=config.out / "nf4-double",
    )
    assert datatypes._run_config(config, "nf4, double", {"quantize": "nf4"}) == expected


def test_verdicts():
    rows = [
        Measured(layers, rank, 5, 9.0, score, 0.1)
        for layers, score in zip(all_linear_paper._TARGETS, (20.0, 21.0, 22.0, 25.0))
        for rank in (8, 64)
    ]
    findings = all_linear_paper._findings([*rows, Measured(all_linear_paper._FULL, None, 99, 9.0, 25.0, 0.1)])
    assert [finding.verdict for finding in findings] == ["observed"] * 3
    findings = all_linear_paper._findings([*rows, Measured(all_linear_paper._FULL, None, 99, 9.0, 30.0, 0.1)])
    assert findings[1].verdict == "not observed"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["datatypes", *PAPER, "--data", "x"], "--paper llama-7b: pass a model and text as in the original setting"),
        (["datatypes", *PAPER, "--model", "x"], "--paper llama-7b: pass a model and text as in the original setting"),
        (["all-linear", *PAPER], "--paper llama-7b: pass a decoder and conversations of the original setting"),
        (["all-linear", *PAPER, "--data", "alpaca:x"], "--paper llama-7b: pass a decoder and conversations"),
        (["all-linear", "--steps", "5", "--new-tokens", "3"], "--steps and --new-tokens: only with --paper; drop"),
        (
            ["all-linear", *PAPER, "--model", "x", "--data", "x", "--lengths", "64", "--validation-examples", "5"],
            "--validation-examples and --lengths: only without --paper; drop --validation-examples and --lengths",
        ),
        (["datatypes", "--paper"], "llama-7b"),
        (["all-linear", "--paper", "qlora"], "llama-7b"),
    ],
)
def test_what_the_user_can_put_right_is_one_sentence(args, message, capsys):
    assert command_line.main(args) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_data_types_need_validation_examples(alpaca, tmp_path):
    config = parsed("datatypes", *PAPER, "--fast", *TINY, "--data", f"alpaca:{alpaca}", "--out", tmp_path / "out")
    with pytest.raises(UserError, match="has no validation examples; hold some out with --validation-share"):
        datatypes.run(config)
