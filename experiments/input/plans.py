"""Plans which messages of a conversation the loss covers, and the renderings that locate them."""

from dataclasses import dataclass

from experiments.errors import UserError
from experiments.input.chat import Call, Template
from experiments.input.options import TrainOn
from experiments.input.records import Conversation, Message


@dataclass(frozen=True)
class Plan:
    """The messages of a conversation that the loss covers, and the renderings that locate them; from :func:`plan`.

    Attributes:
      record: The conversation.
      template: Its chat template.
      location: Its location, for error messages.
      selected: Indices of the messages that the loss covers.
      inverted: Whether the loss covers everything except the selected messages instead.
      calls: The renderings.
    """

    record: Conversation
    template: Template
    location: str
    selected: list[int]
    inverted: bool
    calls: list[Call]


def plan(template: Template, record: Conversation, location: str, train_on: TrainOn) -> Plan:
    """Plans the examples of a conversation.

    Args:
      template: The chat template.
      record: A conversation with at least one message.
      location: Its location, for error messages.
      train_on: The text that the loss covers. It never covers messages of weight 0.

    Raises:
      UserError: No message has the role assistant.
    """
    numbers = answers(record, location)
    if not numbers:
        raise UserError(f"{location}: none of the {len(record.messages)} messages has the role assistant")
    weights = {number: _weight(record.messages[number], number, location) for number in numbers}
    inverted = train_on == "all"
    if inverted:
        selected = [number for number in numbers if not weights[number]]
    else:
        selected = [number for number in numbers if weights[number] and number >= record.learn_from]
        selected = selected[-1:] if train_on == "last" else selected
    rendered = numbers if template.marks_generation and selected else selected
    calls = [whole_call(record, number) for number in rendered]
    if not template.marks_generation:
        calls = [call for whole, number in zip(calls, selected) for call in (prompt_call(record, number), whole)]
    if inverted or (selected and rendered[-1] < len(record.messages) - 1):
        calls.append(whole_call(record))
    return Plan(record, template, location, selected, inverted, calls)


def answers(record: Conversation, location: str) -> list[int]:
    """Returns the indices of the assistant's messages."""
    for number, message in enumerate(record.messages):
        if not isinstance(message.get("role"), str):
            raise UserError(f"{location}, message {number + 1}: role is {message.get('role')!r}, expected a string")
    return [number for number, message in enumerate(record.messages) if message["role"] == "assistant"]


def prompt_call(record: Conversation, number: int) -> Call:
    """Returns the call that renders the prompt for a message."""
    return Call(record.messages[:number], record.tools, record.template_arguments, prompt=True)


def whole_call(record: Conversation, number: int | None = None) -> Call:
    """Returns the call that renders a conversation up to and including a message, or completely."""
    end = None if number is None else number + 1
    return Call(record.messages[:end], record.tools, record.template_arguments)


def _weight(message: Message, number: int, location: str) -> bool:
    weight = message.get("weight", 1)
    if weight is None:
        return True
    if isinstance(weight, str) or weight not in (0, 1):
        raise UserError(f"{location}, message {number + 1}: weight is {weight!r}, expected 0 or 1")
    return bool(weight)
