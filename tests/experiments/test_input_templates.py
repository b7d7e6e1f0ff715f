"""The chat templates of released models: what transformers renders, and what of it is learned."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments.errors import UserError
from experiments.input.chat import Call
from experiments.input.encoding import load_encoder
from experiments.input.options import Options
from experiments.input.records import Conversation
from experiments.models import location

FIXTURES = Path(__file__).parent / "fixtures/templates"
STORED = json.loads((FIXTURES / "expected.json").read_text())
CONVERSATIONS, EXPECTED = STORED["conversations"], STORED["expected"]
REFUSED = {  # by transformers too, or because the template leaves out a call
    "llama3": ["calls"],
    "gemma": ["system", "calls"],
    "gemma3": ["calls"],
    "smollm3": ["calls"],
    "phi3": ["calls"],
    "phi3_5": ["calls"],
}
SAID = {"one": "A game for two.\nOn 64 squares.", "many": "Still fine.", "calls": "It is 90 m tall."}
END = {
    **dict.fromkeys(("llama3", "llama3_1"), "<|eot_id|>"),
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_5_think", "smollm3"), "<|im_end|>"),
    "qwen3_training": "<|im_end|>",
    **dict.fromkeys(("gemma", "gemma3"), "<end_of_turn>"),
    **dict.fromkeys(("phi3", "phi3_5"), "<|end|>\n<|end_of_text|>"),
    "mistral_nemo": "<|end_of_text|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """The encoder of a template, by its name and options."""
    encoders = {}

    def encoder(name, **options):
        key = name, json.dumps(options)
        if key not in encoders:
            directory = tmp_path_factory.mktemp(name)
            tokenizer = Tokenizer.from_file(str(location.find("tiny-llama") / "tokenizer.json"))
            tokenizer.add_special_tokens(STORED["special"][name])
            tokenizer.save(str(directory / "tokenizer.json"))
            tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
            (directory / "tokenizer_config.json").write_text(json.dumps(tokens))
            (directory / "chat_template.jinja").write_text((FIXTURES / f"{name}.jinja").read_text())
            encoders[key] = load_encoder(directory, None, Options(**options))
        encoders[key].notes.clear()
        return encoders[key]

    return encoder


def record(what):
    one = CONVERSATIONS[what]
    tools = tuple(one["tools"]) if "tools" in one else None
    return Conversation(tuple(one["messages"]), tools, template_arguments=one.get("arguments", {}))


def decoded(encoder, ids):
    return encoder.tokenizer.decode(list(ids), skip_special_tokens=False)


def answers(encoder, examples):
    """What is learned, answer by answer, and what stands before each."""
    pairs = []
    for tokens, targets in examples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], targets, [0]])))
        pairs += [
            (decoded(encoder, tokens[:begin]), decoded(encoder, tokens[begin:end]))
            for begin, end in edges.reshape(-1, 2)
        ]
    return pairs


@pytest.mark.parametrize("what", CONVERSATIONS)
@pytest.mark.parametrize("name", EXPECTED)
def test_renderings_and_answers(encoders, name, what):
    encoder, one, expected = encoders(name), record(what), EXPECTED[name][what]
    if what in REFUSED.get(name, []):
        with pytest.raises(UserError, match=r"here.*: the chat template of .*jinja (does not accept|omits)"):
            encoder.encode([one], ["here"])
        return
    if (name, what) == ("deepseek_r1_distill", "calls"):
        return  # it needs null for a content, which transformers does not give it: see below
    turns = {int(turn): pair for turn, pair in expected["turns"].items()}
    calls = [Call(one.messages, one.tools, one.template_arguments)]
    for turn in turns:
        calls.append(Call(one.messages[:turn], one.tools, one.template_arguments, prompt=True))
        calls.append(Call(one.messages[: turn + 1], one.tools, one.template_arguments))
    texts = [rendering.text for rendering in encoder.template.renderings(calls, "here")]
    assert texts == [expected["whole"], *(text for pair in turns.values() for text in pair)]

    pairs = answers(encoder, encoder.encode([one], ["here"]))
    assert len(pairs) == len(turns)
    for (prompt, completion), (turn, (expected_prompt, whole)) in zip(pairs, turns.items()):
        if whole.startswith(expected_prompt):
            assert any(text.startswith(prompt + completion) for text in (whole, expected["whole"]))
            assert prompt == expected_prompt or encoder.template.marks_generation
        message = one.messages[turn]
        assert message.get("content", "height") in completion
        assert completion.endswith(END[name]) or (name.startswith("phi") and completion.endswith("<|end|>"))
    prompt, answer = encoder.encode_prompt(one, "here")
    last = max(turns)
    assert decoded(encoder, prompt) == turns[last][0] and answer == one.messages[last]["content"]
    np.testing.assert_array_equal(prompt, encoder.tokenizer.encode(turns[last][0]).ids)


def test_thinking_of_earlier_turns_is_learned_in_examples_of_their_own(encoders):
    encoder = encoders("qwen3")
    pairs = answers(encoder, encoder.encode([record("thinking")], ["here"]))
    question = "<|im_start|>user\nWhat is chess?<|im_end|>\n<|im_start|>assistant\n"
    assert pairs[0] == (question, "<think>\nTwo players.\n</think>\n\nA game.<|im_end|>")
    assert pairs[1] == (
        f"{question}A game.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n",
        "<think>\nOne more than one.\n</think>\n\n2<|im_end|>",
    )
    (last,) = encoders("qwen3", train_on="last").encode([record("thinking")], ["here"])
    assert answers(encoder, [last]) == pairs[1:]
    assert len(encoders("qwen3_training").encode([record("thinking")], ["here"])) == 1


def test_blocks_of_a_template_that_drops_earlier_thinking(tmp_path):
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(source)
    tokenizer = Tokenizer.from_file(str(location.find("tiny-llama") / "tokenizer.json"))
    tokenizer.add_special_tokens(STORED["special"]["qwen3"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder = load_encoder(tmp_path, None)
    completions = [text for _, text in answers(encoder, encoder.encode([record("thinking")], ["here"]))]
    assert completions == [
        "<think>Two players.</think>A game.<|im_end|>",
        "<think>One more than one.</think>2<|im_end|>",
    ]
    assert len(encoder.encode([record("one")], ["here"])) == 1


def test_a_prompt_that_opens_the_thinking(encoders):
    encoder = encoders("qwen3_5_think")
    pairs = answers(encoder, encoder.encode([record("thinking")], ["here"]))
    assert [prompt.endswith("<|im_start|>assistant\n<think>\n") for prompt, _ in pairs] == [True, True]
    assert [completion for _, completion in pairs] == [
        "Two players.\n</think>\n\nA game.<|im_end|>",
        "One more than one.\n</think>\n\n2<|im_end|>",
    ]
    assert not encoder.notes
    ((prompt, completion),) = answers(encoder, encoder.encode([record("no_thinking")], ["here"]))
    assert prompt.endswith("<think>\n\n</think>\n\n") and completion == f"{SAID['one']}<|im_end|>"
    # The same argument for all records.
    off = encoders("qwen3_5_think", template_arguments={"enable_thinking": False})
    np.testing.assert_array_equal(
        off.encode_prompt(record("one"), "")[0], encoder.encode_prompt(record("no_thinking"), "")[0]
    )
    # Its answers do not begin with what its prompt opens: learned without it, and said.
    encoder = encoders("deepseek_r1_distill")
    ((prompt, completion),) = answers(encoder, encoder.encode([record("one")], ["here"]))
    assert prompt == "<|begin_of_text|><｜User｜>What is chess?<｜Assistant｜>"
    assert completion == f"{SAID['one']}<｜end▁of▁sentence｜>"
    (note,) = encoder.notes
    assert r"ends with '<think>\n', but answers do not begin with it; it is not trained on" in note


def test_a_system_message_that_only_prompts_have(encoders):
    # Mistral's template renders it where a user's message is the last one.
    encoder = encoders("mistral_nemo")
    ((prompt, completion),) = answers(encoder, encoder.encode([record("system")], ["here"]))
    assert prompt == "<|begin_of_text|>[INST]Answer in one line.\n\nWhat is chess?[/INST]"
    assert completion == f"{SAID['one']}<|end_of_text|>"


def test_calls_are_learned_and_tools_are_rendered(encoders):
    encoder = encoders("qwen2_5")
    (example,) = encoder.encode([record("calls")], ["here"])
    pairs = answers(encoder, [example])
    assert pairs[0][1] == '<tool_call>\n{"name": "height", "arguments": {"of": "tower"}}\n</tool_call><|im_end|>'
    assert '<tools>\n{"type": "function", "function": {"name": "height"' in pairs[0][0]
    assert pairs[1][1] == "It is 90 m tall.<|im_end|>"
    encoder = encoders("deepseek_r1_distill")
    pairs = answers(encoder, encoder.encode([record("calls")], ["here"]))
    assert 'function<｜tool▁sep｜>height\n```json\n{"of": "tower"}\n```' in pairs[0][1]
    assert pairs[1][1] == "It is 90 m tall.<｜end▁of▁sentence｜>"
