"""Generation token by token: the tokens of greedy decoding, keys and values that are kept, bounded compilations."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from experiments import generation
from experiments.generation import session as sessions
from experiments.models import location
from experiments.models.options import Options
from experiments.tasks.text import load_tokenizer
from tests.experiments.decoders import ALL, expected, load

NEW = 10


def prompt_of(name, row):
    want = expected(name)
    return want["prompts_left"][row][want["mask_left"][row].astype(bool)].tolist()


@pytest.mark.parametrize("name", ALL)
def test_a_stream_yields_the_tokens_of_greedy_decoding(name):
    model = load(name)
    session = generation.Session(model.model, model.step, model.base)
    for row, want in enumerate(expected(name)["greedy"]):
        assert list(session.stream(prompt_of(name, row), new_tokens=NEW)) == want.tolist()


def test_only_new_tokens_are_read():
    model = load("llama", Options(scan=True))
    session = generation.Session(model.model, model.step, model.base)
    prompt = prompt_of("llama", 2)
    answer = list(session.stream(prompt, new_tokens=4))
    read = session.tokens_read
    assert read == len(prompt) + 3  # the last new token has not been read yet
    turn = [*prompt, *answer, 5, 6]
    continued = list(session.stream(turn, new_tokens=2))
    assert session.tokens_read == read + 3 + 1
    fresh = generation.Session(model.model, model.step, model.base)
    assert list(fresh.stream(turn, new_tokens=2)) == continued
    changed = [*prompt[:-2], 8, 9]  # a template may render earlier turns differently
    read = session.tokens_read
    assert list(session.stream(changed, new_tokens=2)) == list(fresh.stream(changed, new_tokens=2))
    assert session.tokens_read == read + 3


def test_a_stream_ends_at_an_end_token_and_at_the_maximum_length():
    model = load("gpt2")
    prompt, want = prompt_of("gpt2", 0), expected("gpt2")["greedy"][0].tolist()
    session = generation.Session(model.model, model.step, model.base)
    assert list(session.stream(prompt, new_tokens=NEW, eos={want[3]})) == want[: want.index(want[3])]
    assert session.longest == 32
    assert len(list(session.stream(prompt, new_tokens=100))) == 32 - len(prompt) + 1
    text = list(range(2, 34))
    assert len(list(session.stream(text[:32], new_tokens=100))) == 1
    for wrong in ([*text[:32], 1], []):
        with pytest.raises(ValueError, match=f"The text has {len(wrong)} tokens, expected 1 to 32"):
            next(session.stream(wrong, new_tokens=1))


def test_compilations_do_not_depend_on_lengths(monkeypatch):
    monkeypatch.setattr(sessions, "_SLOTS", 64)
    model = load("llama", Options(scan=True))
    session = generation.Session(model.model, model.step, model.base)
    counts = []
    for length in (3, 9, 17, 21, 26, 30):
        tokens = [(7 * i + length) % 50 + 2 for i in range(length)]
        assert len(list(session.stream(tokens, new_tokens=3))) == 3
        counts.append(sessions._read_piece._cache_size() + sessions._advance._cache_size())
    assert counts[-1] == counts[2]


def test_a_cache_grows_without_changing_its_text(monkeypatch):
    model = load("qwen3")
    prompt = prompt_of("qwen3", 1)
    want = list(generation.Session(model.model, model.step, model.base).stream(prompt, new_tokens=20))
    monkeypatch.setattr(sessions, "_SLOTS", 8)
    small = generation.Session(model.model, model.step, model.base)
    assert list(small.stream(prompt, new_tokens=20)) == want


def test_samples_follow_the_key(getkey):
    model = load("llama")
    key, how = getkey(), {"new_tokens": NEW, "temperature": 1.0, "top_p": 0.9}
    prompt = prompt_of("llama", 0)
    first, again, other = (
        list(generation.Session(model.model, model.step, model.base, k).stream(prompt, **how))
        for k in (key, key, getkey())
    )
    assert first == again != other
    cold = generation.Session(model.model, model.step, model.base, key)
    assert list(cold.stream(prompt, new_tokens=NEW, temperature=1e-4)) == expected("llama")["greedy"][0].tolist()
    with pytest.raises(ValueError, match="needs a key"):
        next(generation.Session(model.model, model.step, model.base).stream(prompt, new_tokens=1, temperature=1.0))


def sentencepiece():
    """A tokenizer with a token for each byte, whose decoder drops the first space."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary |= {piece: 256 + i for i, piece in enumerate(("▁Hello", "▁", "b", "▁world", "é", "</s>"))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["</s>"])
    return tokenizer


@pytest.mark.parametrize("make", [sentencepiece, lambda: load_tokenizer(location.find("tiny-llama"))])
def test_pieces_add_up_to_the_text_and_are_never_broken(make):
    tokenizer, rng = make(), np.random.default_rng(0)
    texts = ["Hello wörld", " b  €uro", "😀 é\n\n漢字", "a" * 5 + "\u200d🤷🏽\u200d♀️ end "]
    cases = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    if make is sentencepiece:
        euro, smile = (list(text.encode()) for text in "€😀")
        cases += [[256, *euro, 261, 259, *smile, 257, 258], [*smile, *smile, 260, *euro]]
    for tokens in cases:
        detokenizer = generation.Detokenizer(tokenizer)
        pieces = [detokenizer.push(token) for token in tokens]
        rest = detokenizer.flush()
        assert "".join(pieces) + rest == tokenizer.decode(tokens)
        assert not any("\ufffd" in piece for piece in (*pieces, rest))
        assert sum(map(bool, pieces)) > 1
    for _ in range(50):  # whatever a model generates, also parts of characters
        detokenizer = generation.Detokenizer(tokenizer)
        for token in rng.integers(0, tokenizer.get_vocab_size(), 30).tolist():
            assert not detokenizer.push(token).endswith("\ufffd")
        assert not detokenizer.flush().endswith("\ufffd")


def test_an_incomplete_character_at_the_end_is_left_out():
    detokenizer = generation.Detokenizer(sentencepiece())
    assert [detokenizer.push(token) for token in (256, *"€".encode()[:2])] == ["Hello", "", ""]
    assert detokenizer.flush() == ""
