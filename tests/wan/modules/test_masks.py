import pytest
import torch

from tests.golden_data import below, load_golden
from wan.modules.attention import masked_attention
from wan.modules.masks import BlockCausalMask, block_starts, visible_ranges


def draw(mask: BlockCausalMask) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask.frame_mask.tolist()]


def test_the_picture_in_the_docstring():
    assert draw(BlockCausalMask(6, num_frame_per_block=2)) == [
        "xx....",
        "xx....",
        "xxxx..",
        "xxxx..",
        "xxxxxx",
        "xxxxxx",
    ]
    windowed = BlockCausalMask(6, num_frame_per_block=2, local_attn_size=4, sink_size=1)
    assert draw(windowed) == ["xx....", "xx....", "xxxx..", "xxxx..", "x..xxx", "x..xxx"]


def test_teacher_forcing_never_shows_a_block_its_own_clean_frames():
    mask = BlockCausalMask(4, num_frame_per_block=2, teacher_forcing=True)
    assert draw(mask) == [
        "xx......",
        "xx......",
        "xxxx....",
        "xxxx....",
        "....xx..",
        "....xx..",
        "xx....xx",
        "xx....xx",
    ]


@pytest.mark.parametrize("case", load_golden("a_causal_forward")[1]["subcases"])
def test_frame_mask_equals_the_reference(case):
    tensors, config = load_golden("a_causal_forward")
    settings = config["subcases"][case]
    mask = BlockCausalMask(
        settings["F"],
        num_frame_per_block=settings["nfpb"],
        local_attn_size=settings.get("local", -1),
        independent_first_frame=settings.get("indep", False),
        teacher_forcing=settings.get("tf", False),
    )
    assert torch.equal(mask.frame_mask, below(tensors, case)["frame_mask"])


def test_every_query_sees_something_and_dense_repeats_per_token():
    mask = BlockCausalMask(
        6, frame_seqlen=3, num_frame_per_block=2, local_attn_size=4, sink_size=2, teacher_forcing=True
    )
    dense = mask.dense()
    assert dense.shape == (36, 36) and dense.any(dim=1).all()
    assert torch.equal(dense[::3, ::3], mask.frame_mask)
    assert torch.equal(dense[1::3, 2::3], mask.frame_mask)


def test_flex_block_mask_is_the_same_pattern():
    from torch.nn.attention.flex_attention import create_mask

    mask = BlockCausalMask(9, frame_seqlen=50, num_frame_per_block=3, local_attn_size=6, sink_size=1)
    flex = mask.block_mask("cpu")
    assert flex.seq_lengths == (450, 450)
    assert torch.equal(create_mask(flex.mask_mod, None, None, 450, 450, device="cpu")[0, 0], mask.dense())


def test_a_mask_that_hides_nothing_is_none():
    one_block, two_blocks = BlockCausalMask(3, 4, 3, local_attn_size=6), BlockCausalMask(6, 4, 3)
    assert one_block.prepare("cpu") is None and two_blocks.prepare("cpu") is not None
    assert BlockCausalMask(3, 4, 3, teacher_forcing=True).prepare("cpu") is not None
    q, k, v = torch.randn(3, 2, 12, 2, 4).unbind(0)
    torch.testing.assert_close(masked_attention(q, k, v, None), masked_attention(q, k, v, one_block.dense()))


def test_blocks():
    assert block_starts(9, 3) == [0, 3, 6, 9]
    assert block_starts(7, 3, independent_first_frame=True) == [0, 1, 4, 7]
    assert visible_ranges(12, 6, 2) == [(0, 2), (8, 12)]
    assert visible_ranges(6, 6, 2) == [(0, 6)]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_frames": 10, "num_frame_per_block": 3}, "10 latent frames do not split into blocks of 3; use 9 or 12"),
        ({"num_frames": 9, "num_frame_per_block": 3, "independent_first_frame": True}, "use 7 or 10"),
        ({"num_frames": 2, "num_frame_per_block": 3}, "use 3 or 3"),
        ({"num_frames": 9, "num_frame_per_block": 3, "local_attn_size": 4, "sink_size": 2}, "use at least 5"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockCausalMask(**arguments)
