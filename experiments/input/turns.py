"""Converts conversations to examples: rendered text, and the spans of it that the assistant says.

A model is prompted with the text that a template renders up to an answer. If the rendered conversation begins with this
text for every answer, one example contains all answers. Otherwise (Qwen 3 drops the reasoning of all turns but the
last), every answer is a separate example, preceded by the text with which the model is prompted for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from experiments.errors import UserError
from experiments.input.chat import Rendering, Template
from experiments.input.control import Marked, Span
from experiments.input.omissions import check_rendered, note_tools
from experiments.input.plans import Plan, answers, whole_call
from experiments.input.rendering import RenderingError

_PROBES = "Alpha", "Omega"  # two answers without a common prefix


@dataclass(frozen=True)
class Example:
    """A text and the parts of it that the loss covers.

    Attributes:
      text: The whole text.
      spans: The parts that the loss covers, ascending.
      literal: See :class:`experiments.input.control.Marked`.
      document: Whether to add the tokens that begin and end a text. Chat templates render them.
    """

    text: str
    spans: list[Span]
    literal: list[Span]
    document: bool = False


def conversation_examples(plan: Plan, renderings: Sequence[Rendering], notes: set[str]) -> list[Example]:
    """Returns the examples of a conversation.

    Args:
      plan: The plan of the conversation.
      renderings: The renderings of the plan's calls.
      notes: Notes for the user are added to it.

    Returns:
      One example if the rendered conversation begins with the prompt of every answer, otherwise one example for each
      answer. No example if all answers have weight 0.

    Raises:
      UserError: The template does not accept the messages, or omits an answer or a call.
    """
    if plan.inverted:
        return [_inverted_example(plan, renderings, notes)]
    if not plan.selected:
        notes.add("not trained on, because all answers have weight 0")
        return []
    return _selected_examples(plan, renderings, notes)


def _selected_examples(plan: Plan, renderings: Sequence[Rendering], notes: set[str]) -> list[Example]:
    """Returns the examples of the selected messages."""
    locate = _examples_from_blocks if plan.template.marks_generation else _examples_from_prompts
    return locate(plan, renderings, notes)


def _examples_from_blocks(plan: Plan, renderings: Sequence[Rendering], notes: set[str]) -> list[Example]:
    """Locates answers by the `{% generation %}` blocks of the template."""
    template, whole, numbers = plan.template, renderings[-1], answers(plan.record, plan.location)
    prefixes = [prefix for prefix in renderings[: len(numbers)] if isinstance(prefix, Marked)]
    if len(prefixes) == len(numbers):
        firsts = [0, *(len(prefix.blocks) for prefix in prefixes)]
        parts = [Example(prefix.text, prefix.blocks[first:], prefix.literal) for prefix, first in zip(prefixes, firsts)]
    else:  # it does not accept prefixes of the conversation: the blocks of the whole one are its answers in order
        text, blocks, literal = template.require(whole, plan.location)
        if len(blocks) != len(numbers):
            raise UserError(
                f"{plan.location}: the chat template of {template.where} has {len(blocks)} {{% generation %}} blocks "
                f"for {len(numbers)} answers; expected one block per answer"
            )
        parts = [Example(text, [block], literal) for block in blocks]
    examples = []
    for number, part in zip(numbers, parts):
        if number in plan.selected:
            rendered = "".join(part.text[begin:end] for begin, end in part.spans)
            check_rendered(template, plan.record.messages[number], rendered, f"{plan.location}, message {number + 1}")
            examples += [part] if part.spans else []
    if not examples:
        raise UserError(
            f"{plan.location}: the {{% generation %}} blocks of {template.where} do not contain the assistant's answers"
        )
    return _merge_examples(plan, whole, examples, notes)


def _merge_examples(plan: Plan, whole: Rendering, examples: list[Example], notes: set[str]) -> list[Example]:
    """Merges the examples of answers into one if the whole conversation begins with the text of each."""
    examples = [_end_turns(plan.template, example) for example in examples]
    for example in examples:
        _note_end(plan.template, example, notes)
    if isinstance(whole, RenderingError):
        return examples
    note_tools(plan, whole.text, notes)
    if not all(whole.text.startswith(example.text[: example.spans[-1][1]]) for example in examples):
        return examples
    return [Example(whole.text, [span for example in examples for span in example.spans], whole.literal)]


def _end_turns(template: Template, example: Example) -> Example:
    """Ends each span with the token that ends the turn: generation does not reach the text after it.

    This is the first of the control tokens at the end of the span that ends a generation, or else the last of them.
    """
    tokens = template.control.tokens_in(example.text, example.literal)
    spans = []
    for begin, end in example.spans:
        position, last = end, None
        for first, after in reversed([token for token in tokens if begin <= token[0] and token[1] <= end]):
            if example.text[after:position].strip():
                break
            position = first
            if last is None or example.text[first:after] in template.control.ends:
                last = after
        spans.append((begin, end if last is None else last))
    return replace(example, spans=spans)


def _note_end(template: Template, example: Example, notes: set[str]) -> None:
    """Adds a note if no control token ends the answer."""
    begin, end = example.spans[-1]
    tokens = template.control.tokens_in(example.text, example.literal)
    if not template.control.spellings or any(begin <= first and last <= end for first, last in tokens):
        return
    later = [example.text[first:last] for first, last in tokens if first >= end]
    if template.marks_generation and later:
        reason = f"the end of a turn, {later[0]}, is outside the {{% generation %}} blocks of {template.where}"
    else:
        reason = f"no control token ends an answer in {template.where}"
    notes.add(f"{reason}: the model does not learn to end its answers")


def _inverted_example(plan: Plan, renderings: Sequence[Rendering], notes: set[str]) -> Example:
    """Returns the example of a whole conversation except the selected messages."""
    whole = plan.template.require(renderings[-1], plan.location)
    excluded = []
    if plan.selected:
        (example, *others) = _selected_examples(plan, renderings, set())
        if others or example.text != whole.text:
            raise UserError(
                f"{plan.location}: cannot locate a message of weight 0 in the text of the chat template of "
                f"{plan.template.where}, to exclude it from --train-on all"
            )
        excluded = example.spans
    for number in answers(plan.record, plan.location):
        if number not in plan.selected:
            check_rendered(
                plan.template, plan.record.messages[number], whole.text, f"{plan.location}, message {number + 1}"
            )
    edges = [0, *(edge for span in excluded for edge in span), len(whole.text)]
    spans = [(begin, end) for begin, end in zip(edges[::2], edges[1::2]) if end > begin]
    note_tools(plan, whole.text, notes)
    return Example(whole.text, spans, whole.literal)


def _examples_from_prompts(plan: Plan, renderings: Sequence[Rendering], notes: set[str]) -> list[Example]:
    """Locates answers as the text that follows their prompts, for templates without `{% generation %}` blocks."""
    whole, examples = renderings[-1], []
    for number, prompt, text in zip(plan.selected, renderings[::2], renderings[1::2]):
        location, message = f"{plan.location}, message {number + 1}", plan.record.messages[number]
        try:
            example = _turn_example(plan, number, prompt, text, notes)
        except UserError:
            if number == plan.selected[-1]:
                raise
            notes.add(f"an answer before the last one is skipped: {plan.template.where} cannot render it as the last")
            continue
        ((begin, end),) = example.spans
        check_rendered(plan.template, message, example.text[begin:end], location)
        examples.append(example)
    return _merge_examples(plan, whole, examples, notes)


def _turn_example(plan: Plan, number: int, prompt: Rendering, whole: Rendering, notes: set[str]) -> Example:
    """Returns the example of one answer, preceded by its prompt."""
    location = f"{plan.location}, message {number + 1}"
    prompt, whole = plan.template.require(prompt, location), plan.template.require(whole, location)
    if whole.text.startswith(prompt.text):
        return Example(whole.text, [(len(prompt.text), len(whole.text))], whole.literal)
    return _example_after_header(plan, number, prompt, whole, notes)


def _example_after_header(plan: Plan, number: int, prompt: Marked, whole: Marked, notes: set[str]) -> Example:
    """Returns the example of an answer if the conversation up to it does not begin with its prompt.

    The header of an answer is the common prefix of the conversation with two different answers.
    """
    template, location = plan.template, f"{plan.location}, message {number + 1}"
    before, call = plan.record.messages[:number], whole_call(plan.record, number)
    calls = [replace(call, messages=[*before, {"role": "assistant", "content": probe}]) for probe in _PROBES]
    texts = [template.require(rendering, location).text for rendering in template.renderings(calls, location)]
    header = _common_prefix(*texts)
    if texts[0] != texts[1] and whole.text.startswith(header):
        if prompt.text.startswith(header):
            suffix = prompt.text[len(header) :]
            notes.add(
                f"the prompt of {template.where} ends with {suffix!r}, but answers do not begin with it; it is not "
                "trained on"
            )
            return Example(whole.text, [(len(header), len(whole.text))], whole.literal)
        if header[-1:] == prompt.text[-1:]:
            # The text before the answer depends on later messages: use the prompt instead.
            shift = len(prompt.text) - len(header)
            literal = [(a + shift, b + shift) for a, b in whole.literal if a >= len(header)]
            text = prompt.text + whole.text[len(header) :]
            return Example(text, [(len(prompt.text), len(text))], prompt.literal + literal)
    raise UserError(
        f"{location}: cannot locate the answer, because the chat template of {template.where} renders the conversation "
        "before it differently with and without it; use a template with {% generation %} blocks (--template FILE)"
    )


def _common_prefix(first: str, second: str) -> str:
    """Returns the common prefix of two texts."""
    sizes = (size for size, (a, b) in enumerate(zip(first, second)) if a != b)
    return first[: next(sizes, min(len(first), len(second)))]
