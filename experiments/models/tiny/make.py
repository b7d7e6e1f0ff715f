"""Makes the tiny checkpoints next to this file: random weights, as transformers initializes them, and real tokenizers.

    pip install torch transformers
    python -m experiments.models.tiny.make

Each directory is written by `save_pretrained` of an untrained model. The tokenizer is a byte-level BPE, trained on the
shipped Debian synopses (training split only) as `SECTION: SYNOPSIS`. As with the real models, Llama's tokenizer puts a
token before every text and GPT-2's does not.
"""

from pathlib import Path

import torch  # pyrefly: ignore[missing-import]
import transformers  # pyrefly: ignore[missing-import]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from experiments.tasks import examples

HERE = Path(__file__).parent
VOCABULARY, POSITIONS, WIDTH, LAYERS, HEADS = 512, 128, 64, 2, 4
SPREAD = 0.1  # the standard deviation of the random weights


def tokenizer(begin: str | None, end: str) -> Tokenizer:
    """Trains a byte-level BPE, which puts `begin` before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [token for token in (begin, end) if token is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    train = examples.load("debian_sections", "train")
    bpe.train_from_iterator([f"{train.names[i]}: {text}" for i, text in zip(train.labels, train.texts)], trainer)
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    if begin is not None:
        begins = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, bpe.token_to_id(begin))])
        bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begins])
    return bpe


def save(name: str, bpe: Tokenizer, model: transformers.PreTrainedModel) -> None:
    directory = HERE / name
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink()  # repeats config.json
    bpe.save(str(directory / "tokenizer.json"))
    print(f"{name}: {model.num_parameters():,} parameters, {bpe.get_vocab_size()} tokens")


def main() -> None:
    bpe = tokenizer("<|begin_of_text|>", "<|end_of_text|>")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=POSITIONS,
        initializer_range=SPREAD,
        bos_token_id=bpe.token_to_id("<|begin_of_text|>"),
        eos_token_id=bpe.token_to_id("<|end_of_text|>"),
    )
    torch.manual_seed(0)
    save("llama", bpe, transformers.LlamaForCausalLM(config))

    bpe = tokenizer(None, "<|endoftext|>")
    end = bpe.token_to_id("<|endoftext|>")
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
    save("gpt2", bpe, transformers.GPT2LMHeadModel(config))


if __name__ == "__main__":
    main()
