"""Records to tokens: control tokens in texts, where an answer begins, what is learned, and what is said about it."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from experiments.errors import UserError
from experiments.input import control, options, sources
from experiments.input.boundaries import BoundaryTokenizer
from experiments.input.control import ControlTokens, LiteralTokenizer
from experiments.input.encoding import load_encoder
from experiments.input.options import Options
from experiments.input.records import Completion, Conversation, Preference, Text
from experiments.input.tokenized import tokenize
from experiments.input.turns import Example
from experiments.models import location

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = CHATML.replace(
    "{% if m.content %}{{ m.content }}{% endif %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% elif m.content %}{{ m.content }}{% endif %}",
).replace("{{ '<|im_end|>\n' }}{% endfor %}{%", "{{ '\n' if m.role == 'assistant' else '<|im_end|>\n' }}{% endfor %}{%")


@pytest.fixture
def encoder(tmp_path):
    """A function that makes the encoder of a checkpoint with a template."""

    def build(chat_template=CHATML, vocabulary=None, end=None, ends=(), **options):
        tokenizer = Tokenizer.from_file(str(location.find("tiny-llama") / "tokenizer.json"))
        tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))
        ends = [tokenizer.token_to_id(token) for token in ends]
        return load_encoder(tmp_path, end, Options(**options), ends=ends, vocabulary=vocabulary)

    return build


def learned(encoder, record):
    """What is learned of a record's examples."""
    examples = encoder.encode([record], ["line 1"])
    return [encoder.tokenizer.decode(t[on].tolist(), skip_special_tokens=False) for t, on in examples]


def user(content="?", **others):
    return {"role": "user", "content": content, **others}


def assistant(content, **others):
    return {"role": "assistant", "content": content, **others}


def ends(encoder, record):
    """How many tokens end a turn."""
    tokens = np.concatenate([one.tokens for one in encoder.encode([record], ["line 1"])])
    return int((tokens == encoder.tokenizer.token_to_id("<|im_end|>")).sum())


SPELLED = [
    Conversation((user("what does <|im_end|> do?"), assistant("it <|im_end|> ends"))),
    Conversation((user([{"type": "text", "text": "a <|im_"}, {"type": "text", "text": "end|> b"}]), assistant("c"))),
    Conversation((user("<|im_end|><|im_end|>"), assistant("<|im_end|>"))),
    Completion("<|im_end|>", "x <|im_start|>user\n<|im_end|>"),
]


@pytest.mark.parametrize("template", [CHATML, GENERATION], ids=["plain", "generation"])
@pytest.mark.parametrize("record", SPELLED, ids=range(len(SPELLED)))
def test_control_tokens_in_a_text_are_text(encoder, record, template):
    literal = encoder(template)
    assert ends(literal, record) == 2
    assert ends(encoder(template, control_tokens="parse"), record) > 2
    messages = (
        record.messages if isinstance(record, Conversation) else (user(record.prompt), assistant(record.completion))
    )
    # The tokens of the text between control tokens are those of a tokenizer that has none.
    text = literal.template.render(messages, "").split("<|im_start|>assistant\n")[1]
    plain = Tokenizer.from_file(str(literal.directory / "tokenizer.json"))
    plain.encode_special_tokens = True
    expected = plain.encode(text.removesuffix("\n").removesuffix("<|im_end|>"), add_special_tokens=False).ids
    (example,) = literal.encode([record], [""])
    assert example.tokens[example.targets][: len(expected)].tolist() == expected
    assert literal.tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False) == literal.template.render(
        messages, ""
    )


def test_control_tokens_in_calls_tools_and_arguments(encoder):
    call = {"function": {"name": "height", "arguments": {"<|im_end|>": "<|im_end|>"}}}
    tools = ({"type": "function", "function": {"name": "height", "description": "<|im_end|>"}},)
    template = "{{ tools | tojson(ensure_ascii=true) }}{{ extra }}" + CHATML
    record = Conversation(
        (user(), assistant(None, tool_calls=[call])), tools, template_arguments={"extra": "<|im_end|>"}
    )
    assert ends(encoder(template), record) == 2
    assert '"arguments": {"<|im_end|>": "<|im_end|>"}' in learned(encoder(template), record)[0]
    # What the user of the command line gives is the user's own.
    assert ends(encoder("{{ more }}" + CHATML, template_arguments={"more": "<|im_end|>"}), record) == 3
    with pytest.raises(
        UserError, match=r"--template-arguments: the chat template of .* does not use the variable enable_thinkin"
    ):
        encoder("{{ enable_thinking }}" + CHATML, template_arguments={"enable_thinkin": False})


def test_control_tokens_without_a_template(encoder):
    for record in (Completion("a <|im_end|>", "b<|im_end|>"), Text("<|im_end|> x <|im_end|>")):
        literal, parsed = encoder(None, end=1), encoder(None, end=1, control_tokens="parse")
        assert (ends(literal, record), ends(parsed, record)) == (0, 2)
        text = literal.tokenizer.decode(literal.encode([record], [""])[0].tokens.tolist(), skip_special_tokens=False)
        whole = record.text if isinstance(record, Text) else record.prompt + record.completion
        assert text == f"<|begin_of_text|>{whole}<|end_of_text|>"


def test_characters_that_programs_keep_to_themselves_are_text(encoder):
    content = "a \ufdd0b\ufdd1 \ue000\U000f0000\U00020000\U0002a6cf c"
    record = Conversation((user(content), assistant(content)))
    assert learned(encoder(GENERATION), record) == [f"{content}<|im_end|>"]
    assert learned(encoder(), record) == [f"{content}<|im_end|>"]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (("<|end_of_text|>", "<|im_end|>"), "one\n\n<|im_start|><|im_end|>"),
        (("<|end_of_text|>",), "one\n\n<|im_start|><|im_end|>\n<|end_of_text|>"),
        ((), "one\n\n<|im_start|><|im_end|>\n<|end_of_text|>"),
    ],
)
def test_answers_end_with_the_token_that_ends_the_turn(encoder, ends, expected):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_start|><|im_end|>{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}<|end_of_text|>{{ '\n' }}{% endif %}"
    )
    record = Conversation((user(), assistant("one\n\n")))
    assert learned(encoder(template, ends=ends), record) == [expected]


def test_weights(encoder):
    turns = (user(), assistant("one", weight=0), user(), assistant("two", weight=1), user(), assistant("three"))
    for template, end in ((CHATML, "<|im_end|>"), (GENERATION, "<|im_end|>")):
        assert learned(encoder(template), Conversation(turns)) == [f"two{end}three{end}"]
        assert learned(encoder(template, train_on="last"), Conversation(turns)) == [f"three{end}"]
        assert learned(encoder(template), Conversation(turns, learn_from=4)) == [f"three{end}"]
        (whole,) = learned(encoder(template, train_on="all"), Conversation(turns))
        assert "one" not in whole and whole.startswith("<|im_start|>user\n?<|im_end|>\n") and "two" in whole
        nothing = encoder(template)
        assert learned(nothing, Conversation(turns[:2])) == []
        assert dict(nothing.notes) == {"not trained on, because all answers have weight 0": 1}
    for weight in (0.5, 2, "1", -1):
        with pytest.raises(UserError, match=r"line 1, message 2: weight is .*, expected 0 or 1"):
            learned(encoder(), Conversation((user(), assistant("x", weight=weight))))


def test_the_whole_text_is_learned_on_demand(encoder):
    record = Conversation((user(), assistant("one")))
    for template in (CHATML, GENERATION):
        all_of_it = "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\none<|im_end|>\n"
        assert learned(encoder(template, train_on="all"), record) == [all_of_it]
    assert learned(encoder(None, end=1, train_on="all"), Completion("a", "b")) == ["ab<|end_of_text|>"]
    assert learned(encoder(None, end=1), Completion("a", "b")) == ["b<|end_of_text|>"]
    assert learned(encoder(None, end=1), Text("a b")) == ["a b<|end_of_text|>"]
    assert learned(encoder(), Text("a b")) == ["a b"]
    with pytest.raises(UserError, match="line 1: got a preference record, expected a conversation"):
        learned(encoder(), Preference("a", "b", "c"))


def test_content_parts(encoder):
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    record = Conversation((user(parts), assistant(parts)))
    assert learned(encoder(), record) == ["one, two<|im_end|>"]
    both = CHATML.replace(
        "{{ m.content }}",
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}",
    )
    assert learned(encoder(both), record) == ["[one, ][two]<|im_end|>"]
    image = Conversation((user([{"type": "image", "url": "x"}]), assistant("one")))
    with pytest.raises(UserError, match=r"line 1: a content part of type image; only text"):
        learned(encoder(), image)


CALL = {"type": "function", "function": {"name": "height", "arguments": {"of": "tower"}}}
NO_CALLS = CHATML.replace("{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}", "")
PARTS = CHATML.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}"
)
IN_BLOCK = GENERATION.replace("m.content + '<|im_end|>'", "'<|im_end|>'")


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (
            NO_CALLS,
            (user(), assistant("", tool_calls=[CALL])),
            "message 2: .* omits the assistant's call of height; --template FILE sets another template",
        ),
        (
            NO_CALLS,
            (user(), assistant(None, tool_calls=[CALL]), user(), assistant("x")),
            "message 2: .* call of height",
        ),
        (NO_CALLS, (user(), assistant("let me see", tool_calls=[CALL])), "message 2: .* call of height"),
        (
            PARTS,
            (user(), assistant("uno")),
            "message 2: .* omits the assistant's text 'uno'; --template FILE sets",
        ),
        (IN_BLOCK, (user(), assistant("uno")), "message 2: .* omits the assistant's text 'uno'"),
        (CHATML.replace("{{ m.content }}", "{{ m.content | length }}"), (user(), assistant("uno")), "omits the assist"),
    ],
)
def test_what_a_template_leaves_out_is_an_error(encoder, template, messages, reason):
    with pytest.raises(UserError, match=f"line 1, {reason}" if reason.startswith("message") else reason):
        learned(encoder(template), Conversation(messages))


@pytest.mark.parametrize(
    ("content", "rendering"),
    [("  padded \n", "{{ m.content | trim }}"), ('say "hi"\n\tnow é', "{{ m.content | tojson }}")],
)
def test_what_a_template_trims_or_escapes_is_there(encoder, content, rendering):
    assert learned(encoder(CHATML.replace("{{ m.content }}", rendering)), Conversation((user(), assistant(content))))
    no_thinking = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    record = Conversation((user(), assistant("<think>\nlong\n</think>\n\nuno")))
    assert learned(encoder(no_thinking), record) == ["\n\nuno<|im_end|>"]


def test_notes(encoder):
    outside = GENERATION.replace("m.content + '<|im_end|>'", "m.content").replace(
        "'\n' if m.role == 'assistant' else ", ""
    )
    one = encoder(outside)
    assert learned(one, Conversation((user(), assistant("uno")))) == ["uno"]
    (note,) = one.notes
    assert note.startswith("the end of a turn, <|im_end|>, is outside the {% generation %} blocks of ")
    assert note.endswith(": the model does not learn to end its answers")
    one = encoder(CHATML.replace("<|im_end|>", ""))
    learned(one, Conversation((user(), assistant("uno"))))
    assert [note.partition(" in ")[0] for note in one.notes] == ["no control token ends an answer"]
    one = encoder(NO_CALLS)
    turns = (user(), assistant("see", tool_calls=[CALL], weight=0), {"role": "tool", "content": "90"}, assistant("x"))
    learned(one, Conversation(turns))
    assert list(one.notes) == ["the chat template omits tool_calls of messages that are not trained on"]
    one = encoder()
    tools = ({"type": "function", "function": {"name": "height"}},)
    learned(one, Conversation((user(), assistant("uno")), tools))
    assert list(one.notes) == ["the chat template omits the tools"]
    for quiet in (CHATML, GENERATION):
        one = encoder(quiet)
        learned(one, Conversation((user(), assistant("uno"))))
        assert not one.notes


def test_a_template_for_tools(encoder, tmp_path):
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools | tojson }}" + CHATML}]
    one = encoder(named)
    tools = ({"type": "function", "function": {"name": "height"}},)
    records = [Conversation((user(), assistant("uno")), with_tools) for with_tools in (None, tools)]
    texts = [one.tokenizer.decode(e.tokens.tolist(), skip_special_tokens=False) for e in one.encode(records, ["", ""])]
    assert ["height" in text for text in texts] == [False, True]


def test_an_answer_that_only_the_last_turn_allows(encoder):
    # The template refuses a conversation that ends with a call.
    template = "{% if messages[-1].tool_calls %}{{ raise_exception('no answer') }}{% endif %}" + CHATML
    one = encoder(template)
    turns = (user(), assistant("see", tool_calls=[CALL]), {"role": "tool", "content": "90"}, assistant("ninety"))
    assert learned(one, Conversation(turns)) == ["ninety<|im_end|>"]
    assert [note.partition(":")[0] for note in one.notes] == ["an answer before the last one is skipped"]
    with pytest.raises(UserError, match=r"line 1, message 2: .*no answer"):
        learned(one, Conversation(turns[:2]))


def test_surrogates_from_a_template(encoder):
    with pytest.raises(UserError, match=r"line 1: invalid Unicode, half of a surrogate pair \(U\+D83D\) after 'x';"):
        learned(encoder("x{{ '\\ud83d' }}" + CHATML), Conversation((user(), assistant("uno"))))
    with pytest.raises(UserError, match=r"line 1: invalid Unicode, half of a surrogate pair"):
        encoder(None).encode_prompt(Completion("a\udc00", "b"), "line 1")


def test_tokens_without_an_embedding(encoder):
    one = encoder(vocabulary=513)
    reason = r"line 7: the token '<\|im_end\|>' has the id 513, but the model's embedding has only 513 rows"
    record = Conversation((user(), assistant("x")))
    for encode in (lambda: one.encode([record], ["line 7"]), lambda: one.encode_prompt(record, "line 7")):
        with pytest.raises(UserError, match=reason):
            encode()
    # A token that no record has does not matter.
    assert encoder(None, vocabulary=512).encode([Completion("x", "y")], [""])


def test_a_tokenizer_that_fails(tmp_path):
    content = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "[UNK]"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": content}))
    with pytest.raises(UserError, match=r"tokenizer.json: cannot be read as a tokenizer \(.*Missing \[UNK\] token"):
        load_encoder(tmp_path, None).encode([Completion("y", "z")], [""])


def test_large_ids_are_stored_whole(tmp_path, encoder):
    encoder()
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["x"] = 70_000  # 512 tokens, but not the first 512 numbers
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").unlink()
    one = load_encoder(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "completion": "y"}\n')
    data = tokenize(sources.read(str(tmp_path / "a.jsonl"), "train"), one, tmp_path / "tokens")
    assert data.tokens.dtype == np.uint32 and 70_000 in data.tokens


def test_every_setting_is_in_the_digest(encoder):
    digests = [
        encoder(template, vocabulary=vocabulary, end=end, **options).digest
        for template, vocabulary, end, options in [
            (CHATML, None, None, {}),
            (GENERATION, None, None, {}),
            (CHATML, 600, None, {}),
            (CHATML, None, 1, {}),
            (CHATML, None, None, {"template": GENERATION}),
            (CHATML, None, None, {"template_arguments": {"m": False}}),
            (CHATML, None, None, {"train_on": "last"}),
            (CHATML, None, None, {"train_on": "all"}),
            (CHATML, None, None, {"control_tokens": "parse"}),
            (CHATML, None, None, {"tokenize_together": True}),
        ]
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_the_same_in_every_process(encoder, tmp_path):
    encoder()
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens([f"<|{letter}|>" for letter in "abcdefgh"])  # of one length
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    program = (
        "import sys, pathlib; from experiments.input.encoding import load_encoder; "
        "print(load_encoder(pathlib.Path(sys.argv[1]), None).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "2")
    }
    assert len(digests) == 1


def llama2():
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *strip])
    return tokenizer, trainers.BpeTrainer


def unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return tokenizer, trainers.UnigramTrainer


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer


@pytest.fixture(scope="module", params=["llama2", "unigram first", "unigram always", "byte level"])
def tokenizers(request):
    """A tokenizer of some kind, and the two that are made of it."""
    kind, _, scheme = request.param.partition(" ")
    tokenizer, trainer = {"llama2": llama2, "byte": byte_level, "unigram": lambda: unigram(scheme)}[kind]()
    corpus = [
        "The answer is the tool. Hello world, how are you?",
        "def f(x):\n    return x + 1\n",
        "a <|end|> [b]",
    ] * 50
    options = {} if kind == "byte" else {"unk_token": "<unk>"} if kind == "unigram" else {}
    special = ["<unk>", "<s>", *([f"<0x{byte:02X}>" for byte in range(256)] if kind == "llama2" else [])]
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if kind == "byte" else {}
    tokenizer.train_from_iterator(
        corpus, trainer(vocab_size=600, special_tokens=special, show_progress=False, **options, **alphabet)
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken("<|start|>"), AddedToken("<|end|>", rstrip=True)])
    control = ControlTokens(["<unk>", "<s>", "<|start|>", "<|end|>"])
    literal = LiteralTokenizer(tokenizer, control, "tokenizer.json")
    return tokenizer, literal, BoundaryTokenizer(literal, control, together=False)


PAIRS = [
    ("The answer is ", "the tool"),
    ("def f(x):", "\n    return x"),
    ("def f(x):\n", "\n    return x"),
    ("How  ", "  are"),
    ("How  ", "1"),
    ("x\n\n", "\n\ny"),
    ("hello", "..."),
    ("", "hello"),
    ("<|start|>user<|end|>", "the tool"),
    ("<|start|>", " the"),
]


@pytest.mark.parametrize(("prompt", "answer"), PAIRS)
def test_training_has_the_tokens_of_prompting(tokenizers, prompt, answer):
    tokenizer, literal, boundaries = tokenizers
    example = Example(prompt + answer, [(len(prompt), len(prompt + answer))], [])
    (((ids, targets),),) = boundaries.encode([example])
    alone = tokenizer.encode(prompt).ids
    assert ids[: len(alone)].tolist() == alone and not targets[: len(alone)].any() and targets[len(alone) :].all()
    whole = tokenizer.encode(prompt + answer).ids
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == tokenizer.decode(
        whole, skip_special_tokens=False
    )
    together = BoundaryTokenizer(literal, ControlTokens([]), together=True).encode([example])[0][0]
    assert together[0].tolist() == whole


def test_answers_that_share_a_token_with_their_prompts_are_examples_of_their_own(tokenizers):
    tokenizer, _, boundaries = tokenizers
    text, spans = "the answer is the tool. How are you", [(14, 23), (28, 35)]
    pairs = boundaries.encode([Example(text, spans, [])])[0]
    assert len(pairs) == 2
    for (ids, targets), (begin, end) in zip(pairs, spans):
        assert ids[~targets].tolist() == tokenizer.encode(text[:begin]).ids
        decoded = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert decoded == tokenizer.decode(tokenizer.encode(text[:end]).ids, skip_special_tokens=False)


def test_spellings_beside_control_tokens(tokenizers):
    tokenizer, literal, _ = tokenizers
    text = "<|start|>say <|end|> now<|end|>\n<|start|>x<s>"
    (some,) = literal.encode([(text, [(13, 20)])])
    counts = {name: some.ids.tolist().count(tokenizer.token_to_id(name)) for name in ("<|start|>", "<|end|>", "<s>")}
    assert counts == {"<|start|>": 2, "<|end|>": 1, "<s>": 1}
    assert (np.diff(some.offsets[:, 0]) >= 0).all() and some.offsets[-1].tolist() == [len(text) - 3, len(text)]
    none, (all_of_them,) = tokenizer.encode(text), literal.encode([(text, [(0, 0)])])
    assert all_of_them.ids.tolist() == none.ids and all_of_them.offsets.tolist() == [list(one) for one in none.offsets]


@pytest.mark.parametrize("module", [control, options])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
