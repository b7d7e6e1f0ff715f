"""Reads records for post-training: preferences, rated answers, problems, and pairs of texts."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

from experiments.errors import UserError
from experiments.input.columns import check_not_empty, mixed_kinds, read_prompt, read_text, turn
from experiments.input.messages import read_tools
from experiments.input.records import Message, Preference, Problem, Rated, TextPair
from experiments.input.strict_json import kind

_LABELS = {
    True: True,
    False: False,
    "true": True,
    "false": False,
    "1": True,
    "0": False,
}  # True == 1, False == 0
NEGATIVES = ("negative", "negatives", *(f"negative_{number}" for number in range(1, 17)))


def read_preference(row: Mapping[str, Any], where: str) -> Preference:
    """Reads a better and a worse answer, and their prompt or shared beginning."""
    chosen, rejected = read_prompt(row, "chosen", where), read_prompt(row, "rejected", where)
    prompt = read_prompt(row, "prompt", where) if "prompt" in row else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise mixed_kinds(where, chosen=chosen, rejected=rejected)
    if _without_space(chosen) == _without_space(rejected):
        raise UserError(f"{where}: chosen and rejected are the same; expected answers that differ")
    tools = read_tools(row, where)
    if isinstance(chosen, str) or isinstance(rejected, str):
        if prompt is None:
            prompt = _shared_text(str(chosen), str(rejected))
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        elif not isinstance(prompt, str):
            raise mixed_kinds(where, prompt=prompt, chosen=chosen)
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            check_not_empty(str(text), name, where)
        return Preference(prompt, chosen, rejected, tools)
    if isinstance(prompt, str):  # if the answers are whole conversations, it is the text of their first message
        prompt = turn("user", prompt) if chosen[0]["role"] == "assistant" else None
    if prompt is None:
        prompt = _shared_messages(chosen, rejected)
        if not prompt:
            raise UserError(f"{where}: chosen and rejected start with different messages; expected a prompt")
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if not chosen or not rejected:
        raise UserError(f"{where}: {'rejected' if chosen else 'chosen'} has no message after the prompt")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        _has_answer(messages, name, where)
    return Preference(prompt, chosen, rejected, tools)


def read_rated(row: Mapping[str, Any], where: str) -> Rated:
    """Reads an answer and whether it is good."""
    prompt, completion = read_prompt(row, "prompt", where), read_prompt(row, "completion", where)
    if isinstance(prompt, str) != isinstance(completion, str):
        raise mixed_kinds(where, prompt=prompt, completion=completion)
    if not is_label(row["label"]):
        raise UserError(f"{where}: label is {kind(row['label'])}, expected true (good) or false (bad)")
    if isinstance(completion, str):
        check_not_empty(completion, "completion", where)
    else:
        _has_answer(completion, "completion", where)
    label = row["label"]
    return Rated(
        prompt, completion, _LABELS[label.lower() if isinstance(label, str) else label], read_tools(row, where)
    )


def read_problem(row: Mapping[str, Any], where: str) -> Problem:
    """Reads a prompt and the answer with which a reward compares."""
    answer = row["answer"]
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str):
        raise UserError(f"{where}: answer is {kind(answer)}, expected a string")
    check_not_empty(answer, "answer", where, "an answer to compare with")
    prompt = read_prompt(row, "prompt", where)
    if isinstance(prompt, str):
        check_not_empty(prompt, "prompt", where, "a question")
    elif prompt[-1]["role"] == "assistant":
        raise UserError(f"{where}: the prompt ends with a message of the assistant, expected one to answer")
    return Problem(prompt, answer, read_tools(row, where))


def read_anchor(row: Mapping[str, Any], where: str) -> TextPair:
    """Reads an anchor, its positive and optionally negatives."""
    return _read_texts(row, where, "anchor", "positive")


def read_query(row: Mapping[str, Any], where: str) -> TextPair:
    """Reads a query, its document and optionally negatives."""
    return _read_texts(row, where, "query", "document")


def _read_texts(row: Mapping[str, Any], where: str, first: str, second: str) -> TextPair:
    texts = {name: read_text(row, name, where) for name in (first, second)}
    for name in NEGATIVES:
        value = row.get(name, [])
        values = value if isinstance(value, list) else [value]
        for number, text in enumerate(values, start=1):
            title = f"{name} {number}" if isinstance(value, list) else name
            texts[title] = read_text({title: text}, title, where)
    for name, text in texts.items():
        check_not_empty(text, name, where, "a text to embed")
    anchor, positive, *negatives = texts.values()
    if positive in negatives:
        raise UserError(f"{where}: a negative is the same text as {second}")
    return TextPair(anchor, positive, tuple(negatives))


def _has_answer(messages: tuple[Message, ...], name: str, where: str) -> None:
    """Raises a UserError unless the assistant says or calls something."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UserError(f"{where}: {name} has no message of the assistant")
    for message in answers:
        content = message.get("content")
        empty = not content.strip() if isinstance(content, str) else not content
        if empty and not message.get("tool_calls"):
            raise UserError(f"{where}: {name} is empty; expected text to train on")


def _without_space(value: Any) -> Any:
    """Returns text, or messages, without white space at the ends of texts."""
    if isinstance(value, str):
        return value.strip()
    return [{key: _without_space(item) if isinstance(item, str) else item for key, item in m.items()} for m in value]


def _shared_text(first: str, second: str) -> str:
    """Returns the common prefix of two texts, up to the last word boundary."""
    shared = "".join(a for a, _ in _shared(first, second))
    words = shared if shared[-1:].isspace() else shared[: 1 + max(shared.rfind(space) for space in " \n\t")]
    return words.rstrip()


def _shared_messages(first: tuple[Message, ...], second: tuple[Message, ...]) -> tuple[Message, ...]:
    return tuple(a for a, _ in _shared(first, second))


def _shared(first: Iterable[Any], second: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    return takewhile(lambda pair: pair[0] == pair[1], zip(first, second))


def is_label(value: Any) -> bool:
    """Whether a value is true or false."""
    return isinstance(value, bool | int | str) and (value.lower() if isinstance(value, str) else value) in _LABELS
