"""Makes the tiny checkpoints beside it: random weights of transformers' own initialization, real tokenizers.

    pip install torch transformers
    python -m experiments.models.tiny.make

Every directory is what `save_pretrained` writes of a model that nothing has trained. The tokenizer is a byte-level
BPE, trained on the shipped Debian synopses (the training split alone) as `SECTION: SYNOPSIS`. Llama's puts a token
before every text, GPT-2's does not, as those of the real models.
"""

from pathlib import Path

import torch  # pyrefly: ignore[missing-import]
import transformers  # pyrefly: ignore[missing-import]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments.tasks import examples

HERE = Path(__file__).parent
VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS = 512, 128, 64, 2, 4
SPREAD = 0.1  # of the random weights; they are few, and shared by nothing that was learned


def tokenizer(begin: str | None, end: str) -> Tokenizer:
    """A byte-level BPE; `begin` is put before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [token for token in (begin, end) if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found = examples.load("debian_sections", "train")
    made.train_from_iterator([f"{found.names[i]}: {text}" for i, text in zip(found.labels, found.texts)], trainer)
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if begin is not None:
        begins = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, made.token_to_id(begin))])
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    return made


def save(name: str, made: Tokenizer, model: transformers.PreTrainedModel) -> None:
    directory = HERE / name
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()  # says no more than config.json
    made.save(str(directory / "tokenizer.json"))
    print(f"{name}: {model.num_parameters():,} parameters, {made.get_vocab_size()} tokens")


def main() -> None:
    made = tokenizer("<|begin_of_text|>", "<|end_of_text|>")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=POSITIONS,
        initializer_range=SPREAD,
        bos_token_id=made.token_to_id("<|begin_of_text|>"),
        eos_token_id=made.token_to_id("<|end_of_text|>"),
    )
    torch.manual_seed(0)
    save("llama", made, transformers.LlamaForCausalLM(config))

    made = tokenizer(None, "<|endoftext|>")
    end = made.token_to_id("<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=SPREAD,
        bos_token_id=end,
        eos_token_id=end,
    )
    torch.manual_seed(0)
    save("gpt2", made, transformers.GPT2LMHeadModel(config))


if __name__ == "__main__":
    main()
