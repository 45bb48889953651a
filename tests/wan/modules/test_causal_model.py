"""The causal transformer against the golden vectors, and the equivalences that define it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.golden_data import below, load_golden, wan_config
from wan.configs import WanConfig
from wan.modules.causal_model import CausalWanModel
from wan.modules.weights import assign_weights

TOLERANCE = 1e-4
TOY = WanConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=12, text_len=5, freq_dim=16
)

FORWARD, FORWARD_CONFIG = load_golden("a_causal_forward")
CACHED = [
    "a_causal_kvcache",
    "a_causal_local6_sink0_first1",
    "a_causal_local6_sink1",
    "a_causal_local6_sink3",
    "a_causal_local7_sink2",
]


def golden_model(config: dict, **kwargs) -> CausalWanModel:
    model = CausalWanModel(wan_config(config), **kwargs)
    assign_weights(model, below(FORWARD, "w"), "golden")
    return model.eval()


def toy_model(seed: int = 0, config: WanConfig = TOY, **kwargs) -> CausalWanModel:
    """Random weights everywhere, zero-initialised layers included, so that nothing is invisible."""
    torch.manual_seed(seed)
    model = CausalWanModel(config, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("case", FORWARD_CONFIG["subcases"])
def test_masked_forward_reproduces_the_reference(case):
    settings, tensors = FORWARD_CONFIG["subcases"][case], below(FORWARD, case)
    model = golden_model(
        FORWARD_CONFIG,
        num_frame_per_block=settings["nfpb"],
        local_attn_size=settings.get("local", -1),
        independent_first_frame=settings.get("indep", False),
    )
    with torch.no_grad():
        out = model(
            tensors["x"],
            tensors["t"],
            tensors["context"],
            clean_x=tensors.get("clean_x"),
            aug_t=tensors.get("aug_t"),
        )
    torch.testing.assert_close(out, tensors["out"], atol=TOLERANCE, rtol=TOLERANCE)


def run_golden_plan(name: str, cache_frames: int | None = None):
    """All calls of a cached case: [(our output, the reference's)], and the cache."""
    tensors, config = load_golden(name)
    model = golden_model(
        config,
        num_frame_per_block=3,
        local_attn_size=config.get("local_attn_size", -1),
        sink_size=config.get("sink_size", 0),
    )
    frames = cache_frames or config["cache_tokens"] // config["frame_seqlen"]
    cache = model.make_kv_cache(config["batch"], *config["latent_hw"], frames, keep_all=cache_frames is not None)
    outputs = []
    with torch.no_grad():
        for i, (_, start_frame, _, _, _) in enumerate(config["plan"]):
            cache.commit(start_frame - cache.start_frame)
            call = below(tensors, f"call{i:02d}")
            outputs.append((model(call["x"], call["t"], tensors["context"], kv_cache=cache), call["out"]))
    last = max(key.split(".")[0] for key in tensors if key.startswith("cache_after"))
    return outputs, cache, below(tensors, last), config


@pytest.mark.parametrize("name", CACHED)
def test_cached_calls_reproduce_the_reference(name):
    outputs, cache, reference, config = run_golden_plan(name)
    for out, expected in outputs:
        torch.testing.assert_close(out, expected, atol=TOLERANCE, rtol=TOLERANCE)
    # The reference shifts its cache, ours is a ring: compare frame by frame. Keys show a shifted RoPE, outputs don't.
    size, end = config["frame_seqlen"], config["plan"][-1][1] + config["plan"][-1][2]
    for layer in range(config["num_layers"]):
        theirs = reference[f"L{layer}.k"]
        held = min(end, theirs.shape[1] // size)
        sink = config.get("sink_size", 0) if end > held else 0
        for position, frame in enumerate([*range(sink), *range(end - (held - sink), end)]):
            slot = cache.slot(frame)
            torch.testing.assert_close(
                cache.keys[layer][:, slot * size : (slot + 1) * size],
                theirs[:, position * size : (position + 1) * size],
                atol=TOLERANCE,
                rtol=TOLERANCE,
            )


def test_a_cache_larger_than_the_window_keeps_its_sink():
    """The reference loses its sink there (0.3 off); ours gives what the window-sized cache gives on the same inputs."""
    tensors, config = load_golden("a_causal_local6_sink1_cache15")
    outputs, _, _, _ = run_golden_plan("a_causal_local6_sink1", cache_frames=15)
    assert config["cache_tokens"] == 15 * config["frame_seqlen"]
    lost_sink = 0.0
    for i, (ours, window_sized) in enumerate(outputs):
        torch.testing.assert_close(ours, window_sized, atol=TOLERANCE, rtol=TOLERANCE)
        lost_sink = max(lost_sink, (ours - tensors[f"call{i:02d}.out"]).abs().max().item())
    assert lost_sink > 0.1, "the stored reference case no longer shows the lost sink"


def clean_walk(model: CausalWanModel, x, clean, t, context, blocks, cache):
    """Each block noisy in the context of the clean ones before it, as a stream computes it."""
    outputs = []
    for start, stop in blocks:
        outputs.append(model(x[:, :, start:stop], t[:, start:stop], context, kv_cache=cache))
        with torch.no_grad():
            model(clean[:, :, start:stop], torch.zeros(len(x), stop - start), context, kv_cache=cache)
        cache.commit(stop - start)
    return torch.cat(outputs, dim=2)


@pytest.mark.parametrize("size", [(4, 4), (2, 6)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("window, sink", [(-1, 0), (4, 0), (4, 1), (5, 2)])
@pytest.mark.parametrize("per_block", [1, 2, 3])
def test_cache_equals_mask(per_block, window, sink, first, size):
    """Teacher forcing in one masked pass = a walk over clean context, with and without gradient, ring or full slab."""
    blocks_after_first = 4
    num_frames = first + blocks_after_first * per_block
    if window != -1:
        window = max(window, per_block + sink)
    model = toy_model(
        num_frame_per_block=per_block, local_attn_size=window, sink_size=sink, independent_first_frame=first
    )
    torch.manual_seed(1)
    x, clean = torch.randn(2, 2, 4, num_frames, *size)
    t = torch.rand(2, num_frames) * 1000
    context = torch.randn(2, 5, 12)
    bounds = [0, 1] if first else [0]
    while bounds[-1] < num_frames:
        bounds.append(bounds[-1] + per_block)
    blocks = list(pairwise(bounds))
    with torch.no_grad():
        masked = model(x, t, context, clean_x=clean)
        ring = clean_walk(model, x, clean, t, context, blocks, model.make_kv_cache(2, *size, num_frames))
    kept = model.make_kv_cache(2, *size, num_frames, keep_all=True)
    with_gradient = clean_walk(model, x, clean, t, context, blocks, kept)
    torch.testing.assert_close(ring, masked, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(with_gradient, masked, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("per_block, window, sink", [(3, -1, 0), (2, 5, 1)])
def test_block_causal_mask_equals_noisy_walk(per_block, window, sink):
    """Without clean_x the context is what was denoised: a walk that remembers each block as it came."""
    model = toy_model(num_frame_per_block=per_block, local_attn_size=window, sink_size=sink)
    x, t, context = torch.randn(1, 4, 6, 4, 4), torch.rand(1, 6) * 1000, torch.randn(1, 5, 12)
    cache = model.make_kv_cache(1, 4, 4, 6)
    with torch.no_grad():
        masked = model(x, t, context)
        outputs = []
        for start in range(0, 6, per_block):
            outputs.append(
                model(x[:, :, start : start + per_block], t[:, start : start + per_block], context, kv_cache=cache)
            )
            cache.commit(per_block)
    torch.testing.assert_close(torch.cat(outputs, 2), masked, atol=2e-5, rtol=1e-4)


def gradients(checkpointing: bool, window: int, sink: int):
    model = toy_model(num_frame_per_block=2, local_attn_size=window, sink_size=sink)
    model.gradient_checkpointing = checkpointing
    torch.manual_seed(2)
    x, clean = torch.randn(2, 1, 4, 8, 4, 4)
    x.requires_grad_(True)
    cache = model.make_kv_cache(1, 4, 4, 8, keep_all=True)
    blocks = [(i, i + 2) for i in range(0, 8, 2)]
    out = clean_walk(model, x, clean, torch.full((1, 8), 500.0), torch.randn(1, 5, 12), blocks, cache)
    return model, x, out


@pytest.mark.parametrize("window, sink", [(-1, 0), (4, 0), (5, 1)])
def test_checkpointing_is_exactly_neutral(window, sink):
    results = []
    for checkpointing in (False, True):
        model, x, out = gradients(checkpointing, window, sink)
        out.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 60
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_no_gradient_crosses_blocks():
    _, x, out = gradients(checkpointing=False, window=-1, sink=0)
    out[:, :, 6:].square().sum().backward()
    assert x.grad[:, :, :6].abs().max() == 0
    assert x.grad[:, :, 6:].abs().max() > 0


def test_window_rope_equals_absolute_rope_without_a_sink():
    """Attention sees differences of positions only, so without a sink the base does not matter."""
    outputs = []
    for base in ("absolute", "window"):
        model = toy_model(num_frame_per_block=2, local_attn_size=4, rope_base=base)
        cache = model.make_kv_cache(1, 4, 4)
        torch.manual_seed(3)
        blocks = torch.randn(5, 1, 4, 2, 4, 4)
        with torch.no_grad():
            for block in blocks:
                out = model(block, torch.zeros(1, 2), torch.ones(1, 5, 12), kv_cache=cache)
                cache.commit(2)
        outputs.append(out)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


def test_window_rope_holds_the_sink_near_for_ever():
    """With a sink, a late block sees exactly what an early one sees: the same input gives the same output."""
    model = toy_model(num_frame_per_block=2, local_attn_size=6, sink_size=2, rope_base="window")
    torch.manual_seed(4)
    sink, block = torch.randn(2, 1, 4, 2, 4, 4)

    def after(num_blocks: int):
        cache = model.make_kv_cache(1, 4, 4)
        for latents in [sink] + [block] * num_blocks:
            out = model(latents, torch.zeros(1, 2), torch.ones(1, 5, 12), kv_cache=cache)
            cache.commit(2)
        return out

    with torch.no_grad():
        early, late = after(6), after(700)  # frame 1402: past the reference's table of 1024
    torch.testing.assert_close(early, late, atol=1e-5, rtol=1e-4)


def test_window_rope_with_a_sink_is_refused_for_masked_training():
    model = toy_model(num_frame_per_block=2, local_attn_size=6, sink_size=2, rope_base="window")
    with pytest.raises(ValueError, match="rope_base"):
        model(torch.randn(1, 4, 4, 4, 4), torch.zeros(1, 4), torch.ones(1, 5, 12))


def test_text_keys_are_remembered_and_forgotten():
    model = toy_model(num_frame_per_block=1)
    cache = model.make_kv_cache(1, 4, 4, 2)
    x, t = torch.randn(1, 4, 1, 4, 4), torch.zeros(1, 1)
    one, other = torch.randn(2, 1, 5, 12)
    with torch.no_grad():
        first = model(x, t, one, kv_cache=cache)
        assert torch.equal(model(x, t, other, kv_cache=cache), first)
        cache.forget_prompt()
        assert not torch.allclose(model(x, t, other, kv_cache=cache), first)


def test_pose_tokens_reach_every_path():
    config = WanConfig(
        dim=48,
        ffn_dim=64,
        num_heads=2,
        num_layers=2,
        in_dim=4,
        out_dim=4,
        text_dim=12,
        text_len=5,
        freq_dim=16,
        pose_dim=7,
    )
    model = toy_model(config=config, num_frame_per_block=2)
    x, t, context, pose = torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 2), torch.randn(1, 5, 12), torch.randn(1, 8, 7)
    with torch.no_grad():
        masked = model(x, t, context, add_condition=pose)
        assert not torch.allclose(masked, model(x, t, context))
        cached = model(x, t, context, add_condition=pose, kv_cache=model.make_kv_cache(1, 4, 4, 2))
        torch.testing.assert_close(cached, masked, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"\(7, 7\).*\(8, 7\)"):
        model(x, t, context, add_condition=pose[:, 1:])
    with pytest.raises(ValueError, match="pose_dim"):
        toy_model(num_frame_per_block=2)(x, t, context, add_condition=pose)


def test_a_new_model_predicts_zero_and_takes_no_pose_into_account():
    torch.manual_seed(0)
    model = CausalWanModel(TOY, num_frame_per_block=2)
    assert model(torch.randn(1, 4, 2, 4, 4), torch.ones(1, 2), torch.randn(1, 5, 12)).abs().max() == 0


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(torch.randn(1, 6, 2, 4, 4), torch.zeros(1, 2), torch.ones(1, 5, 12)), "6 input channels.*takes 4"),
        (lambda m: m(torch.randn(1, 4, 2, 3, 4), torch.zeros(1, 2), torch.ones(1, 5, 12)), "3x4 does not split"),
        (lambda m: m(torch.randn(1, 4, 2, 4, 4), torch.zeros(1, 2), torch.ones(1, 5, 13)), "width 12"),
        (lambda m: m(torch.randn(1, 4, 3, 4, 4), torch.zeros(1, 3), torch.ones(1, 5, 12)), "blocks of 2; use 2 or 4"),
    ],
)
def test_what_does_not_fit_is_refused_with_both_numbers(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_model(num_frame_per_block=2))


@pytest.mark.gpu
def test_flex_attention_equals_its_dense_twin(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)  # a trainer's test before it may have set it
    model = toy_model(num_frame_per_block=3, local_attn_size=6, sink_size=1)
    x, clean = torch.randn(2, 2, 4, 12, 8, 8)
    t, context = torch.rand(2, 12) * 1000, torch.randn(2, 5, 12)
    with torch.no_grad():
        dense = model(x, t, context, clean_x=clean)
        flex = model.cuda()(x.cuda(), t.cuda(), context.cuda(), clean_x=clean.cuda())
    torch.testing.assert_close(flex.cpu(), dense, atol=2e-3, rtol=2e-3)  # flex multiplies in tf32


@pytest.mark.parametrize(("layers", "fused"), [(2, False), (3, False), (3, True)])
def test_compiled_blocks_share_their_graphs_over_layers_and_pasts(layers: int, fused: bool):
    """Without gradient a stream of three blocks, then a pass with one: a pair of graphs and a rotation each, and one
    that remembers, wherever that is."""

    def walk(model: CausalWanModel) -> list[torch.Tensor]:
        torch.manual_seed(1)
        cache, context = model.make_kv_cache(1, 4, 4, 4), torch.randn(1, 5, TOY.text_dim)
        flows = []
        for block in torch.randn(4, 1, TOY.in_dim, 1, 4, 4):
            with torch.set_grad_enabled(len(flows) == 3):
                flows.append(model(block, torch.full((1, 1), 500.0), context, kv_cache=cache))
            cache.commit(1)
        return flows

    torch._dynamo.reset()
    model, graphs = toy_model(config=replace(TOY, num_layers=layers), num_frame_per_block=1), []
    expected = walk(model)
    if fused:
        model.fuse_projections()
    model.compile_blocks(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for found, flow in zip(walk(model), expected, strict=True):
        torch.testing.assert_close(found, flow)
    assert len(graphs) == 7


def test_fused_projections_give_the_same_numbers_and_keep_their_names():
    plain, fused = (toy_model(num_frame_per_block=2) for _ in range(2))
    fused.fuse_projections()
    x, t, context = torch.randn(1, TOY.in_dim, 4, 4, 4), torch.full((1, 4), 500.0), torch.randn(1, 5, TOY.text_dim)

    def same() -> None:
        with torch.no_grad():
            torch.testing.assert_close(fused(x, t, context), plain(x, t, context), atol=1e-6, rtol=1e-6)
        assert list(fused.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(one, two) for one, two in zip(fused.parameters(), plain.parameters(), strict=True))

    same()
    for model in (plain, fused):  # as a LoRA is merged
        model.blocks[0].self_attn.k.weight.data.mul_(2)
    same()
    for model in (plain, fused):
        model.load_state_dict(toy_model(seed=3).state_dict())
        model.double().float()  # every weight has memory of its own again
        model.blocks[1].self_attn.v.weight.data.add_(1)
    same()


def test_another_prompt_comes_to_where_the_last_one_lay():
    model = toy_model(num_frame_per_block=1)
    cache, fresh = (model.make_kv_cache(1, 4, 4, 2) for _ in range(2))
    x, t = torch.randn(1, TOY.in_dim, 1, 4, 4), torch.full((1, 1), 500.0)
    first, second = torch.randn(2, 1, 5, TOY.text_dim)
    with torch.no_grad():
        model(x, t, first, kv_cache=cache)
        addresses = [tensor.data_ptr() for keys in cache.text for tensor in keys]
        cache.forget_prompt()
        model.read_prompt(second, None, cache)
        assert [tensor.data_ptr() for keys in cache.text for tensor in keys] == addresses
        assert torch.equal(model(x, t, None, kv_cache=cache), model(x, t, second, kv_cache=fresh))
