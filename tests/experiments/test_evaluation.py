"""Scores of answers: what one question at a time gives, for base and adapter; comparisons of methods; the command."""

import dataclasses
import doctest
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lora
from experiments import generation, run
from experiments.evaluation import answers, questions, scores, tasks
from experiments.evaluation.answers import Answer, Answerer
from experiments.evaluation.decoding import Decoding
from experiments.evaluation.questions import make_questions, precede
from experiments.input.records import Completion, Conversation, Text
from experiments.models import llama, location
from experiments.studies.sft import data, held_out, recorded
from experiments.studies.sft.assistant import Assistant
from tests.experiments import official_data as official
from tests.experiments.conftest import SYSTEM

NEW = 6


def sft(tuned, name="lora"):
    """The config of a run, as it is recorded."""
    return recorded.restore(tuned / "out" / name / "adapter-best")[0]


@pytest.fixture(scope="module")
def asked(tuned):
    config = dataclasses.replace(sft(tuned), test_examples=None)
    examples, encoder = held_out.find_held_out(config), data.read_encoder(config, location.find(config.model))
    return held_out.make_all_questions(config, examples, encoder, lambda question: True, pytest.fail)


def test_questions_are_the_prompts_that_sft_learns_to_answer(tuned, asked):
    decode = data.read_encoder(sft(tuned), tuned / "model").tokenizer.decode
    first = asked.alone[0]
    assert decode(first.prompt.tolist()) == f"<|system|>{SYSTEM}\n<|user|>30 + 30?\n<|assistant|>"
    assert decode(first.answer.tolist()).strip() == first.reference == "It is 60."
    solved = "".join(f"<|user|>{i} + {i}?\n<|assistant|>It is {2 * i}.\n" for i in range(3))
    text = decode(asked.preceded[0].prompt.tolist())
    assert text == f"<|system|>{SYSTEM}\n{solved}<|user|>30 + 30?\n<|assistant|>"
    np.testing.assert_array_equal(asked.preceded[0].answer, first.answer)
    assert len(asked.alone) == len(asked.preceded) == 7


def test_answers_and_losses_are_those_of_single_questions(asked, monkeypatch, getkey):
    monkeypatch.setattr(answers, "_ROWS", 3)
    monkeypatch.setattr(answers, "_PIECE", 8)
    model = llama.load(location.find("tiny-llama"))
    apply, base = lora.nnx.functional(model)
    spec = {"attention/query/kernel": lora.LoRA(2, init="orthogonal")}
    delta = lora.init(getkey(), base, spec, apply, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    answerer = Answerer(model, lambda tokens: " ".join(map(str, tokens)), [3])
    counts = []
    for params, group in (((base, delta), asked.alone), ((base, {}), asked.preceded)):
        results = answerer.answer(params, group, NEW, counts.append)
        adapted = jax.jit(lora.adapt(apply))
        step = generation.make_step(lora.adapt(apply))
        for question, result in zip(group[::3], results[::3]):
            text = np.concatenate([question.prompt, question.answer])[None]
            labels = np.full(text.shape, -1)
            labels[0, len(question.prompt) - 1 : -1] = question.answer
            loss = jnp.sum(adapted(*params, text, labels_BL=labels))
            np.testing.assert_allclose(result.loss, loss, rtol=1e-4)
            assert result.tokens == len(question.answer)
            prompt = jnp.asarray(question.prompt)[None]
            cache = model.cache(1, prompt.shape[1] + NEW)
            (tokens,) = generation.greedy(step, params, prompt, cache=cache, new_tokens=NEW, eos=3).tolist()
            assert result.text == " ".join(map(str, tokens[: tokens.index(3)] if 3 in tokens else tokens))
    assert counts == [3, 3, 1] * 2


def test_answers_by_beam_search_are_those_of_single_questions(asked, monkeypatch):
    monkeypatch.setattr(answers, "_ROWS", 3)
    model = llama.load(location.find("tiny-llama"))
    apply, base = lora.nnx.functional(model)
    answerer = Answerer(model, lambda tokens: " ".join(map(str, tokens)), [3])
    decoding = Decoding(beams=3, length_penalty=0.5, no_repeat_ngram=2)
    results = answerer.answer((base, {}), asked.alone[:4], NEW, decoding=decoding)
    step = generation.make_step(apply)
    for question, result in zip(asked.alone, results):
        prompt = jnp.asarray(question.prompt)[None]
        options = {"cache": model.cache(1, prompt.shape[1] + NEW), "new_tokens": NEW, "eos": 3, "prompt_repeats": True}
        beams = generation.beam_search(step, base, prompt, **options, beams=3, length_penalty=0.5, no_repeat=2)
        tokens = beams.tokens_BKN[0, 0].tolist()
        assert result.text == " ".join(map(str, tokens[: tokens.index(3)] if 3 in tokens else tokens))


def test_scores_of_known_answers():
    references = ["the cat sat on the mat", "dogs bark at night loudly"]
    perfect = scores.score("x", [Answer(text, 2 * math.log(5), 2) for text in references], references)
    assert (perfect.rouge_l, perfect.rouge_l_error) == (100, 0) and perfect.examples == 2
    assert perfect.bleu == pytest.approx(100) and perfect.perplexity == pytest.approx(5)
    texts = ["the cat lay on the mat", "cats"]
    some = scores.score("x", [Answer(text, 1.0, 1) for text in texts], references)
    assert some.rouge_l == pytest.approx((100 * 5 / 6 + 0) / 2)  # five of six words in order
    assert some.rouge_l_error == pytest.approx(100 * 5 / 6 / 2)
    assert 0 < some.bleu < 50
    empty = scores.score("x", [Answer("", 1e9, 1)] * 2, references)
    assert empty.rouge_l == empty.bleu == 0 and empty.perplexity > 1e300
    assert scores.cells(empty)[0] == "1.0e+304"


def test_solved_examples_come_before_the_question():
    one, two = (
        Conversation(({"role": "user", "content": text}, {"role": "assistant", "content": text.upper()}))
        for text in ("a", "b")
    )
    task = {"role": "system", "content": "Shout."}
    with_task = Conversation((task, *one.messages))
    assert precede(with_task, [two]).messages == (task, *two.messages, *one.messages)
    assert precede(one, [with_task, two]).messages == (*one.messages, *two.messages, *one.messages)
    assert precede(Text("a"), [Text("b")]) == Text("a")
    assert doctest.testmod(questions).failed == 0 < doctest.testmod(questions).attempted


def test_texts_and_completions_without_a_template(tuned):
    encoder = data.read_encoder(dataclasses.replace(sft(tuned), model="tiny-llama"), location.find("tiny-llama"))
    records = [Completion("1 and 1:", " 2"), Text("one two three four"), Completion("", "")]
    completion, text, empty = make_questions(encoder, records, ["here"] * 3)
    decode = encoder.tokenizer.decode
    assert (decode(completion.prompt.tolist()), completion.reference) == ("1 and 1:", "2")
    assert decode([*text.prompt, *text.answer]).startswith("one two three four")
    assert empty is None


def test_methods_are_compared_in_one_table(tuned):
    results = json.loads((tuned / "out" / "comparison.json").read_text())
    names = ["base", "base, 3 examples in its prompt", "tuned", "tuned, merged"]
    for result, method, rows in zip(results, ("lora", "dora"), (names, names[2:]), strict=True):
        assert result["name"] == method
        assert [row["name"] for row in result["scores"]] == rows  # the base of both is the same
        assert result["trained_parameters"] > 0 and result["validation_loss"] > 0
        assert all(row["examples"] == 5 and row["perplexity"] > 1 for row in result["scores"])
        perplexities = [row["perplexity"] for row in result["scores"]]
        assert perplexities[-2] == pytest.approx(perplexities[-1], rel=1e-3)
        assert perplexities[-2] != pytest.approx(results[0]["scores"][0]["perplexity"], rel=1e-3)
    page = (tuned / "out" / "README.md").read_text()
    assert page.startswith("# sft\n") and "| dora | " in page and "dora is as good as lora" in page
    assert (tuned / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_shows_what_the_run_has_scored(tuned, tmp_path, capsys, monkeypatch):
    adapter = tuned / "out" / "lora"
    command = ["evaluate", "--adapter", adapter, "--test-examples", "5", "--new-tokens", "6", "--out", tmp_path / "out"]
    command = list(map(str, command))
    assert run.main(command) == 0
    shown = capsys.readouterr().out
    stored, again = (json.loads((path / "scores.json").read_text()) for path in (adapter, tmp_path / "out"))
    assert again["scores"] == stored["scores"] and again["answers"] == stored["answers"]
    assert [answer["reference"] for answer in again["answers"]][:2] == ["It is 60.", "It is 62."]
    assert "5 examples of" in shown and "(test)" in shown and "tuned, merged" in shown
    monkeypatch.setattr(Answerer, "answer", pytest.fail)
    assert run.main(command) == 0
    assert capsys.readouterr().out.splitlines()[-9:] == shown.splitlines()[-9:]


def test_a_file_and_the_base_alone(tuned, tmp_path, capsys):
    path = tmp_path / "more.jsonl"
    path.write_text((tuned / "data" / "validation.jsonl").read_text())
    command = ["evaluate", "--model", tuned / "model", "--data", path, "--new-tokens", "4", "--out", tmp_path / "out"]
    assert run.main(list(map(str, command))) == 0
    (row,) = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]  # no examples for its prompt
    assert (row["name"], row["examples"]) == ("base", 4)
    assert f"4 examples of {path}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "{tuned}/nothing"], "error: --adapter {tuned}/nothing: no such directory"),
        (
            ["--adapter", "{tuned}/out"],
            "expected a directory with adapter.json (lora_jax) or adapter_config.json (PEFT); adapters are in {tuned}",
        ),
        (["--adapter", "{tuned}/out/lora", "--model", "tiny-gpt2"], "a conversation needs a chat template"),
        (["--adapter", "{tuned}/out/lora", "--data", "{tuned}/data:tset"], "tset"),
        (["--test-examples", "0"], "test_examples must be positive"),
    ],
)
def test_what_a_user_can_put_right(tuned, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setenv("COLUMNS", "300")
    flags = [flag.format(tuned=tuned) for flag in flags]
    assert run.main(["evaluate", "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert message.format(tuned=tuned) in error and "Traceback" not in error


def test_an_adapter_without_a_record_needs_the_name_of_its_model(tuned, tmp_path, capsys):
    source = tuned / "out" / "lora" / "adapter-best"
    adapter = tmp_path / "adapter"
    lora.save(adapter, lora.load(source))
    assert run.main(["evaluate", "--adapter", str(adapter)]) == 2
    assert "no base model is recorded with it; name the one it adapts with --model" in capsys.readouterr().err
    (adapter / "run.json").write_text("{}")
    assert run.main(["evaluate", "--adapter", str(adapter)]) == 2
    assert f"error: {adapter / 'run.json'}: " in capsys.readouterr().err
    assert recorded.restore(tuned / "out" / "lora" / "peft")[0].model == str(tuned / "model")


def test_an_assistant_loads_adapters_of_both_formats(tuned):
    assistant = Assistant.of(sft(tuned))
    (_, ours), (_, peft) = (assistant.load(tuned / "out" / "lora" / name) for name in ("adapter-best", "peft"))
    for path in ours:
        np.testing.assert_array_equal(ours[path].a, peft[path].a)
    assert assistant.load(None)[1] == {}


def test_data_without_held_out_examples(tuned, tmp_path, capsys, lenient):
    path = tmp_path / "train.jsonl"
    path.write_text((tuned / "data" / "train.jsonl").read_text())
    command = ["sft", "--model", tuned / "model", "--data", path, "--fast", "--samples", "0", "--length", "64"]
    command += ["--rank", "2", "--batch.global", "4", "--out", tmp_path / "out"]
    assert run.main(list(map(str, command))) == 0
    assert "has no test or validation examples; --validation-share holds some out" in capsys.readouterr().out
    assert not (tmp_path / "out" / "scores.json").exists()


def test_an_official_data_set_is_scored_with_its_metrics(tuned, tmp_path, capsys, lenient, monkeypatch):
    data = official.write_squad(tmp_path / "squad", "v2.0")
    command = ["sft", "--model", "tiny-llama", "--data", data, "--fast", "--samples", "0", "--length", "128"]
    command += ["--rank", "2", "--batch.global", "4", "--test-examples", "6", "--out", tmp_path / "out"]
    command = list(map(str, command))
    monkeypatch.setattr(answers, "_ROWS", 3)
    assert run.main(command) == 0  # trained on six questions of version 2, scored on those for development
    shown = capsys.readouterr().out
    assert "exact_match" in shown and "squad-v2" in shown
    stored = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(stored["metrics"]) == {row["name"] for row in stored["scores"]} >= {"base", "tuned"}
    assert all(set(metrics) == {"exact_match", "f1"} for metrics in stored["metrics"].values())
    texts = [answer["tuned"] for answer in stored["answers"]]
    right = [("Catholic", "a Catholic character"), ("a statue",), ()] * 2
    assert stored["metrics"]["tuned"] == tasks.evaluate("squad-v2", texts, right)
    monkeypatch.setattr(Answerer, "answer", pytest.fail)
    assert run.main(["evaluate", "--adapter", str(tmp_path / "out"), "--out", str(tmp_path / "out")]) == 0


def test_a_missing_database_is_reported_before_answering(tmp_path, capsys, monkeypatch):
    data = official.write_wikisql(tmp_path / "wikisql")
    (data / "test.db").unlink()
    monkeypatch.setattr(Answerer, "answer", pytest.fail)
    assert run.main(["evaluate", "--model", "tiny-llama", "--data", str(data), "--out", str(tmp_path / "out")]) == 2
    assert "test.db: no such file" in capsys.readouterr().err.replace("\n", "")
