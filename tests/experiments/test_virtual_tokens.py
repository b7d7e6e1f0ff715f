"""Prompt tuning, prefix-layer tuning and prefix tuning: what virtual tokens compute in decoders and encoders."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lora_jax as lora
from experiments import generation
from experiments.baselines import prefix_layer_tuning, prefix_tuning, prompt_tuning
from experiments.models import deberta, decoder_heads
from experiments.models.cache import make_context
from experiments.models.classifier import SentenceClassifier, mean_pool
from experiments.models.options import Options, Shards
from experiments.models.virtual import NO_VIRTUAL
from tests.experiments import encoders
from tests.experiments.decoders import FIXTURES, expected, load

BEGIN = np.array([7, 3, 11, 2], np.int32)
SCANNED = Options(scan=True)
NEW, SLOTS = 5, 22


def padded(name, side):
    """Three prompts of different lengths, and the mask."""
    arrays = expected(name)
    return jnp.asarray(arrays[f"prompts_{side}"]), jnp.asarray(arrays[f"mask_{side}"].astype(bool))


def with_beginning(tokens, mask):
    """The prompts after the same first tokens, with their padding on the left."""
    rows = [[*BEGIN, *row[keep]] for row, keep in zip(np.asarray(tokens), np.asarray(mask))]
    longest = max(map(len, rows))
    whole = np.array([[0] * (longest - len(row)) + row for row in rows], np.int32)
    return jnp.asarray(whole), jnp.asarray([[False] * (longest - len(row)) + [True] * len(row) for row in rows])


def entry(method, model):
    """A function and parameters in which virtual tokens stand for the tokens BEGIN."""
    if method is prompt_tuning:
        return {"prompt": prompt_tuning.from_tokens(model.base["token"]["embedding"], BEGIN)}
    cache = generation.prefill(model.step, model.base, BEGIN[None], cache=model.model.cache(1, len(BEGIN)))
    layers = cache.layers if model.model.options.scan else jax.tree.map(lambda *x: jnp.stack(x), *cache.layers)
    return {"prefix": dict(zip(("keys", "values"), (x[:, 0] for x in layers)))}


METHODS = {
    "prompt": (prompt_tuning, lambda key, model, base: prompt_tuning.init(key, base["token"]["embedding"], 3)),
    "layer_inputs": (prefix_layer_tuning, lambda key, model, base: prefix_layer_tuning.init(key, model.shape, 3)),
    "prefix": (prefix_tuning, lambda key, model, base: prefix_tuning.init(key, model.shape, 3, hidden=4)),
}

CASES = [("gpt2", "right", Options()), ("llama", "left", SCANNED), ("qwen2", "right", SCANNED)]


@pytest.mark.parametrize(("name", "side", "options"), CASES)
def test_virtual_tokens_of_real_ones_change_nothing(name, side, options):
    model = load(name, options)
    tokens, mask = padded(name, side)
    whole, whole_mask = with_beginning(tokens, mask)
    wanted = model.jitted(model.base, whole, whole_mask)
    scale = float(jnp.abs(wanted).max())
    continued = generation.greedy(
        model.step, model.base, whole, whole_mask, cache=model.model.cache(3, SLOTS), new_tokens=NEW
    )
    for method in (prompt_tuning, prefix_tuning):
        params, apply = model.base | entry(method, model), method.adapt(model.apply)
        logits = jax.jit(apply)(params, tokens, mask)
        assert logits.shape[:2] == tokens.shape
        for row in range(len(tokens)):
            want = wanted[row][whole_mask[row]][len(BEGIN) :]
            np.testing.assert_allclose(logits[row][mask[row]], want, atol=1e-4 * scale)
        cache, step = model.model.cache(3, SLOTS - len(BEGIN)), generation.make_step(apply)
        np.testing.assert_array_equal(
            generation.greedy(step, params, tokens, mask, cache=cache, new_tokens=NEW), continued
        )


def test_beams_sessions_and_prefilled_caches_have_the_virtual_tokens(getkey):
    model = load("llama", SCANNED)
    params = model.base | entry(prefix_tuning, model)
    step = generation.make_step(prefix_tuning.adapt(model.apply))
    tokens, mask = padded("llama", "left")
    whole = with_beginning(tokens, mask)
    cache = model.model.cache(3, SLOTS)
    want = generation.beam_search(model.step, model.base, *whole, cache=cache, new_tokens=NEW, beams=2)
    got = generation.beam_search(step, params, tokens, mask, cache=cache, new_tokens=NEW, beams=2)
    np.testing.assert_array_equal(got.tokens_BKN, want.tokens_BKN)
    first = generation.prefill(step, params, tokens[:1, -4:-1], cache=model.model.cache(1, SLOTS))
    assert (first.virtual, first.slots, int(first.used)) == (4, SLOTS, 7)
    want = generation.greedy(step, params, tokens[:1, -4:], cache=model.model.cache(1, SLOTS), new_tokens=NEW)
    np.testing.assert_array_equal(generation.greedy(step, params, tokens[:1, -1:], cache=first, new_tokens=NEW), want)
    session = generation.Session(model.model, step, params, virtual=4)
    text = tokens[0, -4:].tolist()
    assert session.longest == 32 - 4
    assert list(session.stream(text, new_tokens=NEW)) == want[0].tolist()
    assert list(session.stream([*text[:2], 5], new_tokens=2)) and session.tokens_read < 3 * len(text)
    assert list(session.stream(text, new_tokens=NEW)) == want[0].tolist()


@pytest.mark.parametrize("name", METHODS)
def test_they_run_on_a_mesh(name, getkey):
    method, init = METHODS[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    plain, sharded = load("gpt2", SCANNED), load("gpt2", Options(scan=True, shards=Shards("data")))
    params = plain.base | {name: init(getkey(), plain.model, plain.base)}
    tokens = jnp.tile(jnp.asarray(expected("gpt2")["tokens"][:1]), (4, 1))
    want = jax.jit(method.adapt(plain.apply))(params, tokens)
    with jax.set_mesh(mesh):
        got = jax.jit(method.adapt(sharded.apply), out_shardings=jax.P("data"))(params, tokens)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_packed_texts_see_the_prefix_and_themselves(getkey):
    model = load("gpt2")
    params, apply = model.base | entry(prefix_tuning, model), jax.jit(prefix_tuning.adapt(model.apply))
    tokens = jnp.asarray(expected("gpt2")["tokens"][:1])
    packed = apply(params, tokens, jnp.array([[1] * 5 + [2] * 7]))
    positions = jnp.array([[*range(5), *range(7)]])
    np.testing.assert_allclose(apply(params, tokens, jnp.array([[1] * 5 + [2] * 7]), positions), packed, atol=1e-5)
    np.testing.assert_allclose(packed[:, :5], apply(params, tokens[:, :5]), atol=1e-4)
    np.testing.assert_allclose(packed[:, 5:], apply(params, tokens[:, 5:]), atol=1e-4)


def test_inputs_of_layers_replace_what_layers_compute(getkey):
    model = load("gpt2").model
    inputs_NPD = prefix_layer_tuning.init(getkey(), model.shape, 3)
    tokens = jnp.asarray(expected("gpt2")["tokens"])
    context = make_context((3, 3 + tokens.shape[1]), None, None, None)
    x = model.token(jnp.pad(tokens, ((0, 0), (3, 0)))) + model.position(context.positions_BL)
    for layer, first in zip(model.layers, inputs_NPD):
        x, _ = layer(jnp.concatenate([jnp.repeat(first[None], 3, axis=0), x[:, 3:]], axis=1), None, context)
    want = model.head(model.norm(x))[:, 3:]
    for options in (Options(), SCANNED):
        stored = load("gpt2", options)
        params = stored.base | {"layer_inputs": inputs_NPD}
        logits = jax.jit(prefix_layer_tuning.adapt(stored.apply))(params, tokens)
        np.testing.assert_allclose(logits, want, atol=1e-4)


@functools.cache
def encoder(name, options=None):
    model = encoders.load(name, options or Options())
    return model.encoder, *lora.nnx.functional(model.encoder)


@pytest.mark.parametrize("name", ["roberta", "electra", "deberta_v2"])
def test_a_prompt_of_real_tokens_changes_no_encoder(name):
    _, apply_fn, base = encoder(name)
    tokens, mask, types = (x[:, :16] for x in encoders.fixture(name).inputs)
    prompt = prompt_tuning.from_tokens(base["embeddings"]["word"]["embedding"], BEGIN)
    whole = jnp.concatenate([jnp.tile(BEGIN[None], (len(tokens), 1)), tokens], axis=1)
    begin = ((0, 0), (len(BEGIN), 0))
    want = jax.jit(apply_fn)(base, whole, jnp.pad(mask, begin, constant_values=1), jnp.pad(types, begin))
    got = jax.jit(prompt_tuning.adapt(apply_fn))(base | {"prompt": prompt}, tokens, mask, types)
    real = np.pad(encoders.fixture(name).real[:, :16], begin, constant_values=True)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def attention_by_hand(attention, x, keys, values, mask, positions):
    """softmax([scores of prefix keys, scores of keys])·[prefix values, values], one row and one head at a time."""
    projections = (attention.query, attention.key, attention.value)
    q, k, v = (np.asarray(f(x)).reshape(*x.shape[:2], attention.heads, -1) for f in projections)
    kinds = len(attention.config.pos_att_type) if positions else 0
    scores, mixed = np.asarray(attention.scores(jnp.asarray(q), jnp.asarray(k), *positions)), np.zeros_like(q)
    for row in range(x.shape[0]):
        for head in range(attention.heads):
            before = q[row, :, head] @ np.asarray(keys)[:, head].T / np.sqrt(q.shape[-1] * (1 + kinds))
            text = np.where(mask[row][None], scores[row, head], -np.inf)
            weights = np.exp(np.concatenate([before, text], axis=1))
            weights /= weights.sum(axis=1, keepdims=True)
            mixed[row, :, head] = weights @ np.concatenate([np.asarray(values)[:, head], v[row, :, head]])
    return attention.output(jnp.asarray(mixed.reshape(x.shape)))


@pytest.mark.parametrize("name", ["bert", "deberta_v3"])
def test_a_prefix_is_more_keys_of_an_encoders_attention(name, getkey):
    model = encoder(name)[0]
    prefix = prefix_tuning.init(getkey(), model.shape, 3)
    tokens, mask, types = encoders.fixture(name).inputs
    x, positions = model.embeddings(tokens, types, NO_VIRTUAL), ()
    if name != "bert":
        relative = model.encoder.relative_norm(model.encoder.relative(jnp.arange(2 * model.config.span)))
        positions = (relative, jnp.asarray(deberta.relative_rows(tokens.shape[1], model.config)))
    for number, layer in enumerate(model.encoder.layers):
        keys, values = prefix["keys"][number], prefix["values"][number]
        mixed = attention_by_hand(layer.attention, x, keys, values, np.asarray(mask, bool), positions)
        x = layer.attention_norm(x + mixed)
        x = layer.feed_forward_norm(x + layer.feed_forward(x))
    real, gradients = encoders.fixture(name).real, []
    for options in (Options(), SCANNED):
        _, apply_fn, base = encoder(name, options)
        apply = prefix_tuning.adapt(apply_fn)

        def loss(prefix, apply=apply, base=base):
            hidden = apply(base | {"prefix": prefix}, tokens, mask, types)
            return jnp.sum(jnp.where(real[..., None], hidden, 0) ** 3), hidden

        gradient, hidden = jax.jit(jax.grad(loss, has_aux=True))(prefix)
        np.testing.assert_allclose(hidden[real], x[real], atol=1e-5)
        gradients.append(gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *gradients)
    assert all(np.abs(gradients[0][part]).max() > 1e-3 for part in prefix)


def test_inputs_of_an_encoders_layers(getkey):
    model, apply_fn, base = encoder("bert", SCANNED)
    unrolled = encoder("bert", Options())[0]
    inputs_NPD = prefix_layer_tuning.init(getkey(), model.shape, 2)
    tokens, mask, types = encoders.fixture("bert").inputs
    begin = ((0, 0), (2, 0))
    x = unrolled.embeddings(jnp.pad(tokens, begin), jnp.pad(types, begin), NO_VIRTUAL)
    for layer, first in zip(unrolled.encoder.layers, inputs_NPD):
        x = jnp.concatenate([jnp.repeat(first[None], len(x), axis=0), x[:, 2:]], axis=1)
        x, _ = layer(x, None, jnp.pad(mask, begin, constant_values=1).astype(bool))
    apply = jax.jit(prefix_layer_tuning.adapt(apply_fn))
    got = apply(base | {"layer_inputs": inputs_NPD}, tokens, mask, types)
    real = np.pad(encoders.fixture("bert").real, begin, constant_values=True)
    np.testing.assert_allclose(got[real], x[real], atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_it_trains_beside_lora_is_saved_and_runs_many(name, getkey, tmp_path):
    loaded, (method, init) = load("gpt2", Options(scan=True, remat="full")), METHODS[name]
    tokens = jnp.asarray(expected("gpt2")["tokens"])
    base = loaded.base | {name: init(getkey(), loaded.model, loaded.base)}
    apply = method.adapt(loaded.apply)
    spec = {f"^{name}": lora.Full(), "qkv/kernel": lora.LoRA(2)}
    adapted = lora.adapt(apply)

    def loss_fn(base, delta, batch, key):
        return jnp.mean(adapted(base, delta, batch, labels_BL=jnp.roll(batch, -1, axis=1)))

    deltas = [lora.init(getkey(), base, spec, apply, tokens) for _ in range(2)]
    step = lora.train_step(loss_fn, optax.sgd(0.5), donate=False)
    start = state = lora.TrainState.create(base, deltas[0], optax.sgd(0.5), getkey())
    losses = []
    for _ in range(3):
        state, metrics = step(state, tokens)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    trained = [jax.tree.leaves(lora.partition(each.delta)[0]) for each in (start, state)]
    assert all(np.abs(after - before).max() > 0 for before, after in zip(*trained))
    many = lora.TrainStates.create(base, deltas, optax.sgd(0.5), jax.random.split(getkey(), 2))
    many, metrics = lora.train_many(loss_fn, optax.sgd(0.5), batch_axes=None)(many, tokens)
    np.testing.assert_allclose(metrics["loss"], [losses[0]] * 2, rtol=1e-4)
    step = generation.make_step(adapted)
    how = {"cache": loaded.model.cache(3, 16), "new_tokens": 3}
    texts = generation.greedy(step, (base, state.delta), tokens, **how)
    lora.save(tmp_path / "delta", state.delta)
    delta = lora.load(tmp_path / "delta", base)
    logits = adapted(base, state.delta, tokens)
    np.testing.assert_array_equal(adapted(base, delta, tokens), logits)
    merged = lora.merge(base, delta)
    if name == "prefix":
        merged["prefix"] = prefix_tuning.fold(merged["prefix"])
    np.testing.assert_allclose(apply(merged, tokens), logits, atol=1e-4)
    np.testing.assert_array_equal(generation.greedy(generation.make_step(apply), merged, tokens, **how), texts)


def test_classifiers_read_the_text_or_the_first_virtual_token(getkey):
    model = encoders.load("bert")
    apply_fn, base = lora.nnx.functional(model)
    inputs = encoders.fixture("bert").inputs
    table = base["encoder"]["embeddings"]["word"]["embedding"]
    params = base | {"prompt": prompt_tuning.init(getkey(), table, 2)}
    hidden = prompt_tuning.adapt(lora.nnx.functional(model.encoder)[0])(
        base["encoder"] | {"prompt": params["prompt"]}, *inputs
    )
    want = model.classifier(model.activation(model.pooler(hidden[:, 0])))
    np.testing.assert_allclose(prompt_tuning.adapt(apply_fn)(params, *inputs), want, atol=1e-5)
    sentences = SentenceClassifier(model.encoder, 16, 3, rngs=nnx.Rngs(0))
    apply_fn, base = lora.nnx.functional(sentences)
    _, vectors = prompt_tuning.adapt(apply_fn)(base | {"prompt": params["prompt"]}, *inputs[:2])
    hidden = prompt_tuning.adapt(lora.nnx.functional(model.encoder)[0])(
        base["encoder"] | {"prompt": params["prompt"]}, *inputs[:2]
    )
    np.testing.assert_allclose(vectors, mean_pool(hidden[:, 2:], inputs[1]), atol=1e-5)


def test_a_classifier_on_a_decoder_reads_the_last_token():
    apply_fn, base = lora.nnx.functional(decoder_heads.load(FIXTURES / "gpt2_classifier"))
    tokens, mask = padded("gpt2", "left")
    prompt = prompt_tuning.from_tokens(base["decoder"]["token"]["embedding"], BEGIN)
    want = jax.jit(apply_fn)(base, *with_beginning(tokens, mask))
    got = jax.jit(prompt_tuning.adapt(apply_fn))(base | {"prompt": prompt}, tokens, mask)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_prompts_from_tables(getkey):
    table = np.asarray(jax.random.normal(getkey(), (7, 16)))
    prompt = prompt_tuning.init(getkey(), table, 5)
    rows = [int(np.flatnonzero((table == np.asarray(row)).all(axis=1))[0]) for row in prompt]
    assert len(set(rows)) == 5
    assert prompt_tuning.init(getkey(), table, 9).shape == (9, 16)
    np.testing.assert_array_equal(prompt_tuning.from_tokens(table, [3, 1], 5), table[[3, 1, 3, 1, 3]])
    np.testing.assert_array_equal(prompt_tuning.from_tokens(table, [3, 1, 2], 2), table[[3, 1]])
    quantized = lora.quantize({"table": jnp.asarray(table)}, {"table": lora.Int8(block=16, axes=("lookup", "out"))})[
        "table"
    ]
    np.testing.assert_allclose(prompt_tuning.from_tokens(quantized, [3]), table[3:4], atol=0.05)


def test_errors(getkey):
    model = load("gpt2")
    params = model.base | {"prefix": prefix_tuning.init(getkey(), model.model.shape, 4)}
    apply = prefix_tuning.adapt(model.apply)
    tokens = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=r"no 'prefix' but .*'token'; add it to the base"):
        apply(model.base, tokens)
    with pytest.raises(ValueError, match="33 tokens, 32 positions"):
        apply(params, jnp.ones((1, 29), jnp.int32))
    with pytest.raises(ValueError, match="36 tokens, 32 positions"):
        apply(params, tokens, cache=model.model.cache(1, 32))
    _, cache = apply(params, tokens, cache=model.model.cache(1, 8))
    shorter = model.base | {"prefix": prefix_tuning.init(getkey(), model.model.shape, 3)}
    with pytest.raises(ValueError, match="begins with 4 virtual tokens, expected 3"):
        apply(shorter, tokens, cache=cache)
    used = generation.prefill(model.step, model.base, tokens, cache=model.model.cache(1, 8))
    with pytest.raises(ValueError, match="does not begin with the 4 virtual tokens; start from an empty cache"):
        apply(params, tokens, cache=used)
    with pytest.raises(ValueError, match="'prompt' and virtual tokens of another form"):
        prefix_tuning.adapt(prompt_tuning.adapt(model.apply))(params | {"prompt": jnp.ones((2, 16))}, tokens)
    with pytest.raises(ValueError, match="length=0"):
        prefix_tuning.init(getkey(), model.model.shape, 0)
    with pytest.raises(ValueError, match=r"tokens=\[61\], expected at least one, each from 0 to 60"):
        prompt_tuning.from_tokens(model.base["token"]["embedding"], [61])


@pytest.mark.parametrize("method", [prompt_tuning, prefix_layer_tuning, prefix_tuning])
def test_the_examples(method, lenient):
    results = doctest.testmod(method)
    assert results.attempted and not results.failed
