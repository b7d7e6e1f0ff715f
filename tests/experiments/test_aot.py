"""What is counted in compiled programs, against what is known by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from experiments.aot import hlo, traffic
from experiments.aot.cost import UNCOUNTED, Exchange, cost
from experiments.aot.groups import pairs, replica_groups
from experiments.training import chips

M, K, N = 8, 16, 32
PRODUCT = 2 * M * K * N


def counted(function, *arguments, **options):
    compiled = jax.jit(function, **options).lower(*arguments).compile()
    return cost(hlo.parse(compiled.as_text()))


def floats(*shape, sharding=None):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def test_a_product():
    assert counted(jnp.dot, floats(M, K), floats(K, N)).dots == PRODUCT


def test_a_batch_of_products():
    costs = counted(lambda x, y: jnp.einsum("bmk,bkn->bmn", x, y), floats(3, M, K), floats(3, K, N))
    assert costs.dots == 3 * PRODUCT


def test_the_body_of_a_scan_counts_as_often_as_it_runs():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    assert counted(layers, floats(M, K), floats(7, K, K)).dots == 7 * 2 * M * K * K


def test_scans_in_scans():
    def inner(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    def outer(x, ws):
        return jax.lax.scan(lambda x, ws: (inner(x, ws), None), x, ws)[0]

    assert counted(outer, floats(M, K), floats(5, 3, K, K)).dots == 15 * 2 * M * K * K


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_and_rematerialization(remat):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w)

    def loss(ws, x):
        body = jax.checkpoint(layer) if remat else layer
        return jnp.sum(jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0] ** 2)

    # Of each of the two products the forward pass has one and the backward pass two; the last one of a layer need not
    # be computed again, for tanh's derivative is from its result, which is.
    products = 2 * 3 + (2 if remat else 0)
    assert counted(jax.grad(loss), floats(4, K, K), floats(M, K)).dots == 4 * products * 2 * M * K * K


def test_of_branches_the_larger_counts():
    def choose(small, x, w):
        return jax.lax.cond(small, lambda: x, lambda: jnp.tanh(x @ w) @ w)

    costs = counted(choose, jax.ShapeDtypeStruct((), jnp.bool), floats(M, K), floats(K, K))
    assert costs.dots == 2 * 2 * M * K * K


def test_a_loop_that_runs_until_a_value_is_reached_is_named():
    def until(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 1e6, lambda x: x @ w, x)

    with pytest.raises(ValueError, match=r"The trip count of the loop %while\S* in %main\S* is unknown"):
        counted(until, floats(M, K), floats(K, K))


def test_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = floats(8 * M, K, sharding=NamedSharding(mesh, jax.P(("data", "fsdp"))))
    w = floats(K, N, sharding=NamedSharding(mesh, jax.P("fsdp")))
    out = NamedSharding(mesh, jax.P())

    def loss(w, x):
        return jnp.sum((x @ w) ** 2)

    costs = counted(jax.grad(loss), w, x, out_shardings=w.sharding)
    assert costs.dots == 2 * PRODUCT  # forward, and the gradient of w, of an eighth of the batch
    sent = costs.sent()
    assert sent["all-gather"] == K * N * 4 * 3 / 4
    # The gradient is summed over all eight; a CPU has no reduce-scatter of its own here.
    assert sent["all-reduce"] + sent["reduce-scatter"] >= K * N * 4 * 3 / 4
    assert counted(lambda x: x, x, out_shardings=out).sent()["all-gather"] == 8 * M * K * 4 * 7 / 8


def test_groups_in_every_form():
    expected = [[0, 2], [1, 3], [4, 6], [5, 7]]
    for form in (
        "replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}",
        "replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={0}",
        "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={0}",
        "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, dimensions={0}",
    ):
        assert replica_groups(form, 8).tolist() == expected, form
    transposed = "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}"
    assert replica_groups(transposed, 8).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert replica_groups("replica_groups={}", 4).tolist() == [[0, 1, 2, 3]]
    assert pairs("source_target_pairs={{0,1},{1,0}}").tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="have an unknown form"):
        replica_groups("replica_groups=hypercube(3)", 8)


def test_what_a_ring_sends():
    four = np.arange(8).reshape(2, 4)
    sends = {"all-gather": 75, "reduce-scatter": 75, "all-to-all": 75, "all-reduce": 150}
    for kind, sent in sends.items():
        assert Exchange(kind, 100, four, 1, "").sent == sent
    assert Exchange("collective-permute", 100, np.array([[0, 1], [1, 0]]), 1, "").sent == 100
    assert Exchange("collective-permute", 100, np.array([[0, 0], [1, 1]]), 1, "").sent == 0


TPU = """HloModule jit_f, is_scheduled=true, num_partitions=4

%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %c = (bf16[8,128]{1,0}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%step (p0: bf16[8,128], p1: bf16[32,128], x: bf16[16,32]) -> (bf16[16,128], bf16[32,128]) {
  %p0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  %x = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(2)
  %all-gather.2 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p0), channel_id=1, replica_groups={{0,1,2,3}}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  %product = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} convolution(%x, %p1), dim_labels=bf_io->bf
  ROOT %t = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[32,128]{1,0:T(8,128)(2,1)}) tuple(%product, %all-gather.2)
}

%done (p2: bf16[8,128], p3: bf16[32,128]) -> bf16[32,128] {
  %p2 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %p3 = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %e = bf16[32,128]{1,0:T(8,128)(2,1)} custom-call(%p2, %p3), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter (q: f32[16,128]) -> f32[4,128] {
  %q = f32[16,128]{1,0:T(8,128)} parameter(0)
  %sum = f32[16,128]{1,0:T(8,128)} all-reduce(%q), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[4,128]{1,0:T(4,128)} dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={4,128}
}

%body (s: (s32[], s32[], bf16[8,128])) -> (s32[], s32[], bf16[8,128]) {
  %s = (s32[], s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %w = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%s), index=2
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  %x = bf16[16,32]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %f = (bf16[8,128]{1,0}, bf16[32,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%start, \
frontend_attributes={kernel_metadata={
"told": "on lines of its own (" }}
  %buffer = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%f), index=1
  %g = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/bf16[32,128]{1,0:T(8,128)(2,1)}) fusion(%w, %buffer, %x), \
kind=kOutput, calls=%step
  %gathered = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%g), index=1
  %whole = bf16[32,128]{1,0:T(8,128)(2,1)} fusion(%w, %gathered), kind=kCustom, calls=%done
  ROOT %r = (s32[], s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%next, %n, %w)
}

%condition (s: (s32[], s32[], bf16[8,128])) -> pred[] {
  %s = (s32[], s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (w: bf16[8,128], y: f32[16,128]) -> f32[4,128] {
  %w = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %y = f32[16,128]{1,0:T(8,128)} parameter(1)
  %zero = s32[] constant(0)
  %ten = s32[] constant(10)
  %init = (s32[], s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) tuple(%zero, %ten, %w)
  %loop = (s32[], s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) while(%init), condition=%condition, body=%body
  ROOT %z = f32[4,128]{1,0:T(4,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_the_forms_that_are_a_tpus():
    """Loops without a stated count, exchanges in steps, reduce-scatters that are all-reduces, products as windows."""
    module = hlo.parse(TPU)
    assert module.partitions == 4
    costs = cost(module)
    assert costs.dots == 5 * 2 * 16 * 32 * 128  # from 0 to 10 by 2
    assert costs.runs() == dict.fromkeys(costs.runs(), 0) | {"all-gather": 5, "reduce-scatter": 1}
    assert costs.sent()["all-gather"] == 5 * 32 * 128 * 2 * 3 / 4
    assert costs.sent()["reduce-scatter"] == 16 * 128 * 4 * 3 / 4
    # The gather reads 8 and writes 32 rows; the product reads them and 16 rows of 32, padded to 128, and its result
    # stays on the chip; the scatter reads 16 and writes 4 rows of floats.
    rows, counter = 5 * (8 + 32 + 32 + 16) * 128 * 2, 5 * 3 * 4
    assert costs.traffic == traffic.Traffic(rows + counter + (16 + 4) * 128 * 4)


def test_what_goes_to_the_hosts_memory():
    """Offloaded activations: slices of a buffer there, asynchronously; only the slices move."""
    text = """HloModule m

ENTRY %main (x: bf16[1,8,128], n: s32[]) -> bf16[1,8,128] {
  %x = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %n = s32[]{:T(128)S(6)} parameter(1)
  %buffer = bf16[80,8,128]{2,1,0:T(8,128)(2,1)S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %put = ((bf16[80,8,128]{2,1,0:S(5)}, bf16[1,8,128]{2,1,0}, s32[]), bf16[80,8,128]{2,1,0:T(8,128)(2,1)S(5)}, u32[]) \
dynamic-update-slice-start(%buffer, %x, %n, %n, %n)
  %there = bf16[80,8,128]{2,1,0:T(8,128)(2,1)S(5)} dynamic-update-slice-done(%put)
  %get = ((bf16[80,8,128]{2,1,0:S(5)}, s32[]), bf16[1,8,128]{2,1,0:T(8,128)(2,1)}, u32[]) \
dynamic-slice-start(%there, %n, %n, %n), dynamic_slice_sizes={1,8,128}
  ROOT %here = bf16[1,8,128]{2,1,0:T(8,128)(2,1)} dynamic-slice-done(%get)
}
"""
    slice_ = 8 * 128 * 2
    assert cost(hlo.parse(text)).traffic == traffic.Traffic(2 * slice_, 2 * slice_)


def test_an_exchange_without_a_beginning_is_an_error():
    text = TPU.replace('custom_call_target="AsyncCollectiveStart"', 'custom_call_target="Another"')
    with pytest.raises(ValueError, match=r"channel 1 has a step, %all-gather.\d, but no start"):
        cost(hlo.parse(text))


def test_exchanges_that_are_not_counted_are_named():
    text = """HloModule m, num_partitions=4

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} collective-broadcast(%x), channel_id=1, replica_groups={{0,1,2,3}}
}
"""
    for kind in UNCOUNTED:
        costs = cost(hlo.parse(text.replace("collective-broadcast", kind)))
        assert costs.unknown == ((kind, 1),) and costs.exchanges == ()


def test_batches_as_dilated_windows():
    """XLA's form of a batched product on TPUs: a window over the batch axis that meets one element of each batch."""
    text = """HloModule m

ENTRY %main (x: f32[4,8,16], y: f32[4,16,32]) -> f32[4,8,32] {
  %x = f32[4,8,16]{2,1,0} parameter(0)
  %y = f32[4,16,32]{2,1,0} parameter(1)
  ROOT %z = f32[4,8,32]{2,1,0} convolution(%x, %y), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, \
dim_labels=0bf_0io->0bf
}
"""
    assert cost(hlo.parse(text)).dots == 4 * 2 * 8 * 16 * 32


def test_convolutions():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    assert counted(convolve, floats(2, 10, 4), floats(3, 4, 6)).dots == 2 * 2 * 8 * 3 * 4 * 6


def test_kernels():
    call = """HloModule m

ENTRY %main (x: f32[8,128]) -> f32[8,128] {{
  %x = f32[8,128]{{1,0}} parameter(0)
  ROOT %k = f32[8,128]{{1,0}} custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={{op_name="jit(f)/mine/pallas_call"}}, backend_config={{{}}}
}}
"""
    estimate = '"custom_call_config":{"cost_estimate":{"flops":"77","transcendentals":"0","bytes_accessed":"1000"}}'
    costs = cost(hlo.parse(call.format(estimate)))
    assert (costs.kernels, costs.traffic.device, costs.unknown) == (77, 1000, ())
    assert cost(hlo.parse(call.format(""))).unknown == (("tpu_custom_call mine", 1),)


def test_splash_attention_by_shapes():
    text = """HloModule m

ENTRY %main (b: s8[1,4,4], q: bf16[2,8,2048,128], k: bf16[2,2,2048,128]) -> bf16[2,8,2048,128] {
  %b = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[2,8,2048,128]{3,2,1,0} parameter(1)
  %k = bf16[2,2,2048,128]{3,2,1,0} parameter(2)
  ROOT %a = bf16[2,8,2048,128]{3,2,1,0} custom-call(%b, %q, %k, %k), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(f)/vmap(splash)/splash_mha_fwd_residuals/pallas_call"}
}
"""
    whole = 2 * 2 * 8 * 2048 * 2048 * 128
    assert cost(hlo.parse(text)).kernels == 2 * whole * 10 / 16  # blocks on and below the diagonal


def test_padding_of_tiles():
    for text, size in (
        ("f32[6,16]{1,0:T(8,128)}", 8 * 128 * 4),
        ("bf16[16,512]{0,1:T(8,128)(2,1)}", 512 * 128 * 2),
        ("s4[64,256]{1,0:T(64,128)(8,1)E(4)}", 64 * 256 // 2),
        ("s32[]{:T(128)}", 4),
        ("f32[3]", 12),
    ):
        module = hlo.parse(f"HloModule m\n\nENTRY %e (p: {text}) -> {text} {{\n  ROOT %p = {text} parameter(0)\n}}\n")
        assert module.entry.root.shape.padded == size, text


def test_no_hlo():
    with pytest.raises(ValueError, match="Not an HLO module"):
        hlo.parse("module @jit_f {}")


def test_chips_by_what_jax_calls_them():
    assert chips.find_chip("TPU v5").name == "v5p"
    assert chips.find_chip("NVIDIA H100 80GB HBM3").flops == 989e12
    assert chips.find_chip("cpu") is None
    kinds = [kind for chip in chips.CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))
