"""Prompts and what follows them as tokens: what is to be predicted, what is cut, where texts end."""

import numpy as np
import pytest

from experiments.models import location
from experiments.tasks.batching import NO_LABEL
from experiments.tasks.continuations import encode, encode_prompts
from experiments.tasks.text import load_tokenizer

PROMPTS = ["games:", "x11:"]
TEXTS = ["chess – für alle", "window manager"]


@pytest.fixture(params=["tiny-llama", "tiny-gpt2"])
def tokenizer(request):
    return load_tokenizer(location.find(request.param))


def begin(tokenizer):
    """How many tokens stand before every text."""
    return 0 if tokenizer.token_to_id("<|begin_of_text|>") is None else 1


@pytest.mark.parametrize("end", [7, None])
def test_labels_are_the_text_and_its_end(tokenizer, end):
    encoded = encode(tokenizer, PROMPTS, TEXTS, 100, end)
    tokens, mask = encode_prompts(tokenizer, PROMPTS, end)
    for row, text in enumerate(TEXTS):
        sequence, labels = encoded.sequences[row], encoded.labels[row]
        prompt = tokens[row, mask[row]]
        assert len(sequence) == len(labels)
        assert sequence[: len(prompt)].tolist() == prompt.tolist()
        assert (labels[: len(prompt) - 1] == NO_LABEL).all()
        following = labels[len(prompt) - 1 :]
        assert (following != NO_LABEL).all()
        np.testing.assert_array_equal(sequence[len(prompt) :], following[:-1])
        assert end is None or following[-1] == end
        assert tokenizer.decode(following[: None if end is None else -1].tolist()) == f" {text}"
    assert tokens.shape[1] == mask.sum(axis=1).max() and (mask[:, : begin(tokenizer) + 1]).all()


def test_long_texts_are_cut(tokenizer):
    whole, cut = (encode(tokenizer, PROMPTS, TEXTS, length, 7) for length in (100, 6))
    for row in range(2):
        assert cut.sequences[row].tolist() == whole.sequences[row][:6].tolist()
        assert cut.labels[row].tolist() == whole.labels[row][:6].tolist()


def test_a_tokenizer_that_ends_texts_itself():
    tokenizer = load_tokenizer(location.find("tiny-llama"))
    end = tokenizer.token_to_id("<|end_of_text|>")
    once = encode(tokenizer, PROMPTS, TEXTS, 100, end)
    from tokenizers.processors import TemplateProcessing

    special = ("<|begin_of_text|>", "<|end_of_text|>")
    template = f"{special[0]} $A {special[1]}"
    pairs = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=pairs)
    again = encode(tokenizer, PROMPTS, TEXTS, 100, end)
    for one, other in ((once.sequences, again.sequences), (once.labels, again.labels)):
        assert [x.tolist() for x in one] == [x.tolist() for x in other]
    assert not (encode_prompts(tokenizer, PROMPTS, end)[0] == end).any()
