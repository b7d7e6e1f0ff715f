"""The examples that a conversation gives: what is rendered of it, and which of that the assistant says.

A model is prompted with what a template renders up to an answer. Where a template renders that in the same way within
the whole conversation, one example teaches all answers. Where it does not (Qwen 3 drops the reasoning of all turns but
the last), every answer is an example of its own, behind the text with which the model is prompted for it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from experiments.errors import UserError
from experiments.input.chat import Call, Template, texts_of
from experiments.input.control import Marked, Span
from experiments.input.records import Conversation, Message
from experiments.input.rendering import RenderingError

TrainOn = Literal["answers", "last", "all"]
"""What is learned: all of the assistant's answers, the last one, or the whole text."""

_PROBES = "Alpha", "Omega"  # two answers that have no character in common at their beginning


@dataclass(frozen=True)
class Example:
    """A text of which some is learned.

    Attributes:
      text: Whole.
      spans: What is learned, ascending.
      literal: See :class:`experiments.input.control.Marked`.
      document: Whether it stands between the tokens that begin and end a text, which a template renders itself.
    """

    text: str
    spans: list[Span]
    literal: list[Span]
    document: bool = False


@dataclass(frozen=True)
class Plan:
    """What is to be learned of a conversation, and the renderings that this takes; made by :func:`plan`.

    Attributes:
      record: The conversation.
      template: That renders it.
      location: Where it stands, for errors.
      learned: The numbers of the messages that are learned; of those that are not, where everything else is.
      everything: Whether everything else is learned.
      calls: What is rendered.
    """

    record: Conversation
    template: Template
    location: str
    learned: list[int]
    everything: bool
    calls: list[Call]


def plan(template: Template, record: Conversation, location: str, train_on: TrainOn) -> Plan:
    """What is to be learned of a conversation.

    Args:
      template: Of the checkpoint.
      record: With at least one message.
      location: Where it stands, for errors.
      train_on: What is learned. A message of weight 0 never is.

    Raises:
      UserError: No message is the assistant's.
    """
    numbers = answers(record, location)
    if not numbers:
        raise UserError(f"{location}: none of the {len(record.messages)} messages is the assistant's: nothing to learn")
    weights = {number: _weight(record.messages[number], number, location) for number in numbers}
    everything = train_on == "all"
    if everything:
        learned = [number for number in numbers if not weights[number]]
    else:
        learned = [number for number in numbers if weights[number] and number >= record.learn_from]
        learned = learned[-1:] if train_on == "last" else learned
    rendered = numbers if template.marks_generation and learned else learned
    calls = [whole_call(record, number) for number in rendered]
    if not template.marks_generation:
        calls = [call for whole, number in zip(calls, learned) for call in (prompt_call(record, number), whole)]
    if everything or (learned and rendered[-1] < len(record.messages) - 1):
        calls.append(whole_call(record))
    return Plan(record, template, location, learned, everything, calls)


def conversation_examples(plan: Plan, renderings: Sequence[Marked | RenderingError], notes: set[str]) -> list[Example]:
    """The examples of a conversation.

    Args:
      plan: Of the conversation.
      renderings: Of the plan's calls.
      notes: Takes sentences on what a user should know about the record.

    Returns:
      One example where the template renders every answer after the text with which the model is prompted for it; else
      one for each answer. None where all answers have weight 0.

    Raises:
      UserError: The template refuses the messages, or leaves out an answer or a call.
    """
    if plan.everything:
        return [_everything(plan, renderings, notes)]
    if not plan.learned:
        notes.add("nothing to learn: all their answers have weight 0")
        return []
    return (_marked if plan.template.marks_generation else _by_turns)(plan, renderings, notes)


def answers(record: Conversation, location: str) -> list[int]:
    """The numbers of the messages that are the assistant's."""
    for number, message in enumerate(record.messages):
        if not isinstance(message.get("role"), str):
            raise UserError(f"{location}, message {number + 1}: its role is {message.get('role')!r}, expected a text")
    return [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]


def prompt_call(record: Conversation, number: int) -> Call:
    """What renders the text with which a model is prompted for a message."""
    return Call(record.messages[:number], record.tools, record.template_arguments, prompt=True)


def whole_call(record: Conversation, number: int | None = None) -> Call:
    """What renders a conversation up to a message and with it, or to its end."""
    end = None if number is None else number + 1
    return Call(record.messages[:end], record.tools, record.template_arguments)


def _marked(plan: Plan, renderings: Sequence[Marked | RenderingError], notes: set[str]) -> list[Example]:
    """The examples of a template with `{% generation %}` blocks: what these render of each answer."""
    template, whole, numbers = plan.template, renderings[-1], answers(plan.record, plan.location)
    upto = [one for one in renderings[: len(numbers)] if isinstance(one, Marked)]
    if len(upto) == len(numbers):
        firsts = [0, *(len(one.blocks) for one in upto)]
        parts = [Example(one.text, one.blocks[first:], one.literal) for one, first in zip(upto, firsts)]
    else:  # it refuses a conversation that ends earlier: the blocks of the whole one are its answers, in turn
        text, blocks, literal = template.require(whole, plan.location)
        if len(blocks) != len(numbers):
            raise UserError(
                f"{plan.location}: the chat template of {template.where} has {len(blocks)} {{% generation %}} blocks "
                f"for {len(numbers)} answers, so that there is no telling which is which"
            )
        parts = [Example(text, [block], literal) for block in blocks]
    examples = []
    for number, part in zip(numbers, parts):
        if number in plan.learned:
            rendered = "".join(part.text[begin:end] for begin, end in part.spans)
            _check(template, plan.record.messages[number], rendered, f"{plan.location}, message {number + 1}")
            examples += [part] if part.spans else []
    if not examples:
        raise UserError(
            f"{plan.location}: the {{% generation %}} blocks of {template.where} render nothing of what the "
            "assistant says"
        )
    return _joined(plan, whole, examples, notes)


def _joined(plan: Plan, whole: Marked | RenderingError, examples: list[Example], notes: set[str]) -> list[Example]:
    """The examples of some answers, or one for all where the whole conversation has the same texts."""
    for one in examples:
        _note_end(plan.template, one, notes)
    if isinstance(whole, RenderingError):
        return examples
    _note_tools(plan, whole.text, notes)
    if not all(whole.text.startswith(one.text[: one.spans[-1][1]]) for one in examples):
        return examples
    return [Example(whole.text, [span for one in examples for span in one.spans], whole.literal)]


def _note_end(template: Template, example: Example, notes: set[str]) -> None:
    """Notes where no control token ends what is learned."""
    begin, end = example.spans[-1]
    tokens = template.control.tokens_in(example.text, example.literal)
    if not template.control.spellings or any(begin <= first and last <= end for first, last in tokens):
        return
    behind = [example.text[first:last] for first, last in tokens if first >= end]
    if template.marks_generation and behind:
        reason = f"the end of a turn, {behind[0]}, is outside the {{% generation %}} blocks of {template.where}"
    else:
        reason = f"no control token ends an answer in {template.where}"
    notes.add(f"{reason}: the model never learns to stop")


def _everything(plan: Plan, renderings: Sequence[Marked | RenderingError], notes: set[str]) -> Example:
    """The example whose whole text is learned, apart from some messages."""
    whole = plan.template.require(renderings[-1], plan.location)
    excluded = []
    if plan.learned:
        (example, *others) = (_marked if plan.template.marks_generation else _by_turns)(plan, renderings, set())
        if others or example.text != whole.text:
            raise UserError(
                f"{plan.location}: the chat template of {plan.template.where} does not tell which text is that of a "
                "message of weight 0, which is not learned where everything else is (--train-on all)"
            )
        excluded = example.spans
    for number in answers(plan.record, plan.location):
        if number not in plan.learned:
            _check(plan.template, plan.record.messages[number], whole.text, f"{plan.location}, message {number + 1}")
    edges = [0, *(edge for span in excluded for edge in span), len(whole.text)]
    spans = [(begin, end) for begin, end in zip(edges[::2], edges[1::2]) if end > begin]
    _note_tools(plan, whole.text, notes)
    return Example(whole.text, spans, whole.literal)


def _by_turns(plan: Plan, renderings: Sequence[Marked | RenderingError], notes: set[str]) -> list[Example]:
    """The examples of a template without blocks: what it renders more with an answer than to prompt for it."""
    whole, examples = renderings[-1], []
    for number, prompt, text in zip(plan.learned, renderings[::2], renderings[1::2]):
        here, message = f"{plan.location}, message {number + 1}", plan.record.messages[number]
        try:
            example = _turn_example(plan, number, prompt, text, notes)
        except UserError:
            if number == plan.learned[-1]:
                raise
            notes.add(f"an answer before the last one is left out: {plan.template.where} cannot render it as the last")
            continue
        ((begin, end),) = example.spans
        _check(plan.template, message, example.text[begin:end], here)
        examples.append(example)
    return _joined(plan, whole, examples, notes)


def _turn_example(
    plan: Plan, number: int, prompt: Marked | RenderingError, whole: Marked | RenderingError, notes: set[str]
) -> Example:
    """The example of one answer, behind what prompts for it."""
    here = f"{plan.location}, message {number + 1}"
    prompt, whole = plan.template.require(prompt, here), plan.template.require(whole, here)
    if whole.text.startswith(prompt.text):
        return Example(whole.text, [(len(prompt.text), len(whole.text))], whole.literal)
    return _behind_its_header(plan, number, prompt, whole, notes)


def _behind_its_header(plan: Plan, number: int, prompt: Marked, whole: Marked, notes: set[str]) -> Example:
    """The example of an answer that does not begin with its prompt."""
    template, location = plan.template, f"{plan.location}, message {number + 1}"
    before, call = plan.record.messages[:number], whole_call(plan.record, number)
    calls = [replace(call, messages=[*before, {"role": "assistant", "content": probe}]) for probe in _PROBES]
    texts = [template.require(one, location).text for one in template.renderings(calls, location)]
    header = _shared(*texts)
    if texts[0] != texts[1] and whole.text.startswith(header):
        if prompt.text.startswith(header):
            opened = prompt.text[len(header) :]
            notes.add(
                f"the prompt of {template.where} ends with {opened!r}, with which no answer begins: answers are "
                "learned without it"
            )
            return Example(whole.text, [(len(header), len(whole.text))], whole.literal)
        if header[-1:] == prompt.text[-1:]:
            # What stands before the answer depends on the messages behind: what prompts for it is what counts.
            shift = len(prompt.text) - len(header)
            moved = [(a + shift, b + shift) for a, b in whole.literal if a >= len(header)]
            text = prompt.text + whole.text[len(header) :]
            return Example(text, [(len(prompt.text), len(text))], prompt.literal + moved)
    raise UserError(
        f"{location}: the chat template of {template.where} renders the conversation differently up to here and with "
        "the answer, so that there is no telling what the assistant says in it; a template that marks it with "
        "{% generation %} blocks can be learned from"
    )


def _shared(first: str, second: str) -> str:
    """The beginning that two texts have in common."""
    sizes = (size for size, (a, b) in enumerate(zip(first, second)) if a != b)
    return first[: next(sizes, min(len(first), len(second)))]


_REASONING_END = re.compile(r"</[\w:]*think\w*>|\[/THINK\]|<channel\|>")


def _check(template: Template, message: Message, rendered: str, location: str) -> None:
    """Raises a UserError where a template leaves out what the assistant says or calls.

    Templates trim texts, escape them as JSON and drop reasoning before an answer: the answer's last line is looked for.
    """
    for text in texts_of(message.get("content"), location):
        lines = _REASONING_END.split(text)[-1].strip().splitlines()
        if lines and not _appears(lines[-1].strip(), rendered):
            raise UserError(
                f"{location}: the chat template of {template.where} leaves out what the assistant says, "
                f"{_short(lines[-1])}; --template FILE sets another template"
            )
    for name in _calls(message):
        if not _appears(name, rendered):
            raise UserError(
                f"{location}: the chat template of {template.where} leaves out the assistant's call of {name}; "
                "--template FILE sets another template"
            )


def _note_tools(plan: Plan, text: str, notes: set[str]) -> None:
    learned = () if plan.everything else plan.learned
    others = [message for number, message in enumerate(plan.record.messages) if number not in learned]
    if any(not _appears(name, text) for message in others for name in _calls(message)):
        notes.add("tool_calls that are not learned are left out by the chat template")
    functions = [tool.get("function", tool) for tool in plan.record.tools or ()]
    if any(not _appears(str(function.get("name")), text) for function in functions):
        notes.add("tools are left out by the chat template")


def _calls(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    calls = message.get("tool_calls") or []
    functions = [call.get("function", call) for call in calls if isinstance(call, dict)]
    return [function["name"] for function in functions if isinstance(function.get("name"), str)]


def _appears(text: str, within: str) -> bool:
    return text in within or json.dumps(text, ensure_ascii=False)[1:-1] in within or json.dumps(text)[1:-1] in within


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]} …")


def _weight(message: Message, number: int, location: str) -> bool:
    weight = message.get("weight", 1)
    if weight is None:
        return True
    if isinstance(weight, str) or weight not in (0, 1):
        raise UserError(f"{location}, message {number + 1}: its weight is {weight!r}, expected 0 or 1")
    return bool(weight)
