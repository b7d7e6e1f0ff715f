"""A conversation with several models, which share its messages; each keeps the keys and values of what it has read."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

import lora_jax as lora
from experiments import generation
from experiments.configs.chat import Config
from experiments.errors import UserError
from experiments.input.records import Completion, Conversation, Message
from experiments.studies.sft.assistant import Assistant

_HERE = "the conversation"  # its location in error messages


class Talk:
    """Messages, and the models that answer them.

    Without a chat template each message is a text that the model continues, and earlier ones are not used.

    Args:
      config: The study's config.
      assistant: The model.
      params: Base and delta of each model by name. The first one answers.
      system: The system message; None or empty for none.
    """

    def __init__(self, config: Config, assistant: Assistant, params: Mapping[str, tuple[Any, Any]], system: str | None):
        self._config, self._assistant, self._system = config, assistant, system
        adapted = lora.adapt(lora.nnx.functional(assistant.model)[0])
        step = generation.make_step(adapted)
        keys = jax.random.split(jax.random.key(config.seed), len(params))
        self._sessions = {
            name: generation.Session(assistant.model, step, parameters, key)
            for (name, parameters), key in zip(params.items(), keys)
        }
        self.active = next(iter(params))
        """The name of the model that answers."""
        self.reset()

    @property
    def models(self) -> list[str]:
        """The names of the models."""
        return list(self._sessions)

    @property
    def tokens_read(self) -> int:
        """The number of tokens that the active model has read so far."""
        return self._sessions[self.active].tokens_read

    def reset(self) -> None:
        """Forgets all messages but the system message."""
        self._messages: list[Message] = [{"role": "system", "content": self._system}] if self._system else []

    def answer(self, text: str) -> Iterator[str]:
        """Adds a message and yields the parts of the active model's answer, which becomes a message too.

        Raises:
          UserError: The template does not accept the message, or the conversation is longer than the model supports.
        """
        session, encoder = self._sessions[self.active], self._assistant.encoder
        asked = [*self._messages, {"role": "user", "content": text}]
        if encoder.template is None:
            prompt, _ = encoder.encode_prompt(Completion(text, ""), _HERE)
        else:
            waiting = Conversation((*asked, {"role": "assistant", "content": ""}))
            prompt, _ = encoder.encode_prompt(waiting, _HERE)
        if session.longest is not None and len(prompt) > session.longest:
            raise UserError(
                f"the conversation has {len(prompt):,} tokens, the model supports {session.longest:,}; "
                "/reset starts over"
            )
        tokens = session.stream(
            prompt.tolist(),
            new_tokens=self._config.new_tokens,
            eos=self._assistant.ends,
            temperature=self._config.temperature or None,
            top_p=self._config.top_p if self._config.top_p < 1 else None,
        )
        detokenizer, parts = generation.Detokenizer(encoder.tokenizer), []
        for token in tokens:
            if part := detokenizer.push(token):
                parts.append(part)
                yield part
        if part := detokenizer.flush():
            parts.append(part)
            yield part
        if encoder.template is not None:
            self._messages = [*asked, {"role": "assistant", "content": "".join(parts)}]
