"""A tiny BERT in Hugging Face layout and a tiny data set that it can learn."""

import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import lora_jax as lora
from experiments import run, user_cache
from experiments.models import location

WORDS = {
    "games": ["chess", "puzzle", "arcade"],
    "mail": ["inbox", "spam", "letter"],
    "sound": ["synth", "tune", "drum"],
}
FILLERS = ["a", "tool", "for", "the", "new", "simple", "fast"]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "vocab_size": 20,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 24,
}


def bert_tensors(config=CONFIG, seed=0):
    """Random weights under the names and in the shapes of a Hugging Face BERT."""
    rng = np.random.default_rng(seed)
    width, hidden = config["hidden_size"], config["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], width),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (2, width),
        "embeddings.LayerNorm.weight": (width,),
        "embeddings.LayerNorm.bias": (width,),
    }
    linears = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "intermediate.dense": (hidden, width),
        "output.dense": (width, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes |= {
                f"encoder.layer.{layer}.{name}.weight": shape,
                f"encoder.layer.{layer}.{name}.bias": shape[:1],
            }
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{layer}.{name}.{part}": (width,) for part in ("weight", "bias")}
    tensors = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: 1 + 0.1 * x if "LayerNorm.weight" in name else x for name, x in tensors.items()}


def write_model(directory, tensors, config=CONFIG):
    """Writes a directory in Hugging Face layout."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *itertools.chain(*WORDS.values()), *FILLERS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Tests, and the processes that they start, do not use the user's cache of tokens."""
    os.environ[user_cache.VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), bert_tensors())


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    (directory / "labels.txt").write_text("games\nmail\nsound\n")
    rng = np.random.default_rng(0)
    for split, count in (("train", 90), ("validation", 30), ("test", 30)):
        rows = ["label\ttext"]
        for _ in range(count):
            label = str(rng.choice(list(WORDS)))
            words = [str(rng.choice(FILLERS)) for _ in range(rng.integers(1, 6))]
            words += [str(rng.choice(WORDS[label])) for _ in range(2)]
            rng.shuffle(words)
            rows.append(f"{label}\t{' '.join(words)}")
        (directory / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return directory


@pytest.fixture
def interrupt_at(monkeypatch):
    """A function that makes the next training run stop at a step, by a signal or by an exception."""
    real = lora.train_step

    def at(number, what):
        def train_step(loss, tx, **options):
            step = real(loss, tx, **options)

            def stepping(state, batch):
                if int(state.step) + 1 == number:
                    what()
                return step(state, batch)

            return stepping

        monkeypatch.setattr(lora, "train_step", train_step)

    yield at
    monkeypatch.setattr(lora, "train_step", real)


@pytest.fixture
def interrupt_many_at(monkeypatch):
    """A function that makes a step of joint training call `what()` before it; returns the list of runs that begin.

    Its arguments are the index of the run, from 1 on, the number of the step, from 1 on, and `what`.
    """
    real = lora.train_many

    def at(run, number, what):
        begun = []

        def train_many(*args, **options):
            step = real(*args, **options)
            begun.append(len(begun) + 1)

            def stepping(states, batch):
                if len(begun) == run and int(states.step[0]) + 1 == number:
                    what()
                return step(states, batch)

            return stepping

        monkeypatch.setattr(lora, "train_many", train_many)
        return begun

    return at


CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SYSTEM = "Add."


@pytest.fixture(scope="session")
def tuned(tmp_path_factory, cache):
    """A tiny Llama with a chat template, conversations in three splits, and runs of two methods of two steps each."""
    directory = tmp_path_factory.mktemp("tuned")
    shutil.copytree(location.find("tiny-llama"), directory / "model")
    (directory / "model" / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    shape = json.loads((directory / "model" / "config.json").read_text())
    (directory / "model" / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 512}))
    (directory / "data").mkdir()
    for split, first, count in (("train", 0, 16), ("validation", 20, 4), ("test", 30, 7)):
        rows = [
            [("system", SYSTEM), ("user", f"{i} + {i}?"), ("assistant", f"It is {2 * i}.")]
            for i in range(first, first + count)
        ]
        messages = [[{"role": role, "content": content} for role, content in row] for row in rows]
        lines = [json.dumps({"messages": one}) + "\n" for one in messages]
        (directory / "data" / f"{split}.jsonl").write_text("".join(lines))
    args = ["--model", directory / "model", "--data", directory / "data", "--out", directory / "out"]
    args += ["--methods", "lora,dora", "--fast", "--samples", "0", "--test-examples", "5", "--length", "64"]
    args += ["--rank", "2", "--new-tokens", "6", "--batch.global", "4", "--lr", "0.05"]
    with jax.numpy_dtype_promotion("standard"):
        assert run.main(["sft", *map(str, args)]) == 0
    return directory
