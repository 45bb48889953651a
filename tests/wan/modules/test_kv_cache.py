import pytest
import torch

from tests.wan.modules.test_causal_model import toy_model
from wan.modules.kv_cache import KVCache


def frame_cache(capacity: int, per_block: int, window: int, sink: int) -> KVCache:
    """One layer, one token per frame, one number per token: the number is the frame's index."""
    slab = [torch.full((1, capacity, 1, 1), -1.0)]
    return KVCache(
        slab, [slab[0].clone()], frame_seqlen=1, num_frame_per_block=per_block, local_attn_size=window, sink_size=sink
    )


@pytest.mark.parametrize("keep_all", [False, True])
@pytest.mark.parametrize("per_block, window, sink", [(2, 6, 1), (3, 7, 2), (3, 6, 0), (1, 4, 3), (3, 3, 0), (2, 5, 3)])
def test_a_block_sees_the_sink_and_the_newest_frames(per_block, window, sink, keep_all):
    cache = frame_cache(60 if keep_all else window, per_block, window, sink)
    for start in range(0, 42, per_block):
        block = torch.arange(start, start + per_block, dtype=torch.float32).view(1, -1, 1, 1)
        stop = start + per_block
        expected = set(range(stop)) if stop <= window else {*range(sink), *range(stop - (window - sink), stop)}
        context = cache.context(per_block)
        with_gradient, _ = context.extend(0, block, block)
        assert set(with_gradient.flatten().int().tolist()) == expected
        with torch.no_grad():
            for _ in range(2):  # denoising steps overwrite the block in place
                keys, values = context.extend(0, block, block)
            assert keys.flatten().int().tolist() == context.frames
            assert set(context.frames) == expected and len(context.frames) == len(expected)
            assert torch.equal(keys, values)
            if not keep_all:
                assert keys.data_ptr() == cache.keys[0].data_ptr(), "a full ring is read in place"
        cache.commit(per_block)


def test_three_hundred_blocks_in_constant_memory():
    model = toy_model(num_frame_per_block=3, local_attn_size=6, sink_size=1)
    cache = model.make_kv_cache(1, 4, 4)
    pointers = [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)]
    size = cache.num_bytes
    x = torch.randn(1, 4, 3, 4, 4)
    with torch.no_grad():
        for _ in range(300):
            out = model(x, torch.zeros(1, 3), torch.ones(1, 5, 12), kv_cache=cache)
            cache.commit(3)
    assert out.isfinite().all() and cache.start_frame == 900
    assert [tensor.data_ptr() for tensor in (*cache.keys, *cache.values)] == pointers and cache.num_bytes == size


@pytest.mark.parametrize("window, rope_base", [(-1, "absolute"), (6, "absolute"), (6, "window")])
def test_a_pass_that_only_remembers_leaves_what_a_whole_one_does(window: int, rope_base: str):
    slabs = []
    for keys_only in (False, True):
        model = toy_model(num_frame_per_block=2, local_attn_size=window, sink_size=2 if window > 0 else 0)
        model.rope_base = rope_base
        cache, torch_seed = model.make_kv_cache(1, 4, 4, 8), torch.manual_seed(0)
        with torch.no_grad():
            for _ in range(4):
                x = torch.randn(1, 4, 2, 4, 4, generator=torch_seed)
                model(x, torch.zeros(1, 2), torch.ones(1, 5, 12), kv_cache=cache, keys_only=keys_only)
                cache.commit(2)
        slabs.append((*cache.keys, *cache.values))
    assert all(torch.equal(one, other) for one, other in zip(*slabs, strict=True))


def test_reset_forgets_the_video_and_keeps_the_memory():
    model = toy_model(num_frame_per_block=2)
    cache = model.make_kv_cache(1, 4, 4, 4)
    x, context = torch.randn(1, 4, 2, 4, 4), torch.randn(1, 5, 12)
    with torch.no_grad():
        first = model(x, torch.zeros(1, 2), context, kv_cache=cache)
        cache.commit(2)
        second = model(x, torch.zeros(1, 2), context, kv_cache=cache)
        cache.reset()
        assert torch.equal(model(x, torch.zeros(1, 2), context, kv_cache=cache), first)
    assert not torch.equal(first, second)


def test_a_batch_of_two_is_two_batches_of_one():
    model = toy_model(num_frame_per_block=2, local_attn_size=4)
    x, context = torch.randn(3, 2, 4, 2, 4, 4), torch.randn(2, 5, 12)

    def walk(rows: slice):
        cache = model.make_kv_cache(len(x[0, rows]), 4, 4)
        outputs = []
        for block in x[:, rows]:
            outputs.append(model(block, torch.zeros(len(block), 2), context[rows], kv_cache=cache))
            cache.commit(2)
        return torch.stack(outputs)

    with torch.no_grad():
        both = walk(slice(0, 2))
        torch.testing.assert_close(both[:, :1], walk(slice(0, 1)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(both[:, 1:], walk(slice(1, 2)), atol=1e-5, rtol=1e-4)


def test_mistakes_name_both_numbers():
    model = toy_model(num_frame_per_block=2)
    with pytest.raises(ValueError, match="needs num_frames"):
        model.make_kv_cache(1, 4, 4)
    cache = model.make_kv_cache(1, 4, 4, 2)
    x, t, context = torch.randn(2, 4, 2, 4, 4), torch.zeros(2, 2), torch.ones(2, 5, 12)
    with torch.no_grad(), pytest.raises(ValueError, match="batch 1, this pass has batch 2"):
        model(x, t, context, kv_cache=cache)
    cache.commit(2)
    with torch.no_grad(), pytest.raises(ValueError, match="room for 2 latent frames, frame 3 does not fit"):
        model(x[:1], t[:1], context[:1], kv_cache=cache)
