"""utils/puppet_latents.py: the pool is what its picture says, and a resumed run finds it again."""

import pytest
import torch
from torch import Tensor

from utils.distributed import Rngs, SampleRngs
from utils.puppet_latents import PuppetLatents
from world.captions import claims
from world.puppet import ACTIONS, sample_scenes

CPU = torch.device("cpu")


def small_encode(pixels: Tensor) -> Tensor:
    """Every fourth frame, coarsely: [B, F, 3, 4, 4]."""
    return pixels[:, ::4, :, ::4, ::4]


def letters(texts: list[str]) -> tuple[Tensor, Tensor]:
    """A tokenizer: character codes, and where there are any."""
    ids = torch.tensor([[ord(letter) for letter in text.ljust(160, "\0")] for text in texts])
    return ids, (ids > 0).long()


def read(ids: Tensor) -> str:
    return "".join(map(chr, ids.tolist())).rstrip("\0")


def draws(step: int, samples: range) -> SampleRngs:
    return SampleRngs(Rngs(1, step, CPU), samples)


def make_pool(**options) -> PuppetLatents:
    settings = {"seed": 1, "rank": 0, "num_latent_frames": 2, "size": 16, "pool_size": 8, "min_fill": 4}
    settings |= {"refresh_per_step": 2, "chunk_size": 2, "device": CPU, "dtype": torch.float32}
    return PuppetLatents(small_encode, letters, **(settings | options))


def test_it_grows_then_renews_the_oldest():
    pool = make_pool()
    pool.fill(0)
    assert len(pool) == 4
    first = pool.latents[:2].clone()
    pool.advance(2)
    assert len(pool) == 8
    assert torch.equal(pool.latents[:2], first)
    pool.advance(3)
    assert len(pool) == 8
    assert not torch.equal(pool.latents[:2], first)


def test_a_resumed_run_finds_the_same_pool_and_draws():
    walked, resumed = make_pool(), make_pool()
    walked.fill(0)
    for step in range(1, 8):
        walked.advance(step)
    resumed.fill(7)
    assert torch.equal(walked.latents, resumed.latents)
    assert torch.equal(walked.tokens, resumed.tokens)
    whole, part = walked.draw(draws(7, range(6))), resumed.draw(draws(7, range(3, 6)))
    for name in ("latents", "ids", "mask"):
        assert torch.equal(getattr(whole, name)[3:], getattr(part, name))


def test_a_compact_resume_makes_only_the_minimum():
    pool = make_pool()
    pool.fill(7, whole=False)
    assert len(pool) == 4
    drawn = pool.draw(draws(7, range(20)))
    assert drawn.latents.abs().sum(dim=(1, 2, 3, 4)).min() > 0  # never an empty place
    assert drawn.mask.any(1).all()


def test_ranks_and_splits_see_different_clips():
    pools = [make_pool(), make_pool(rank=1), make_pool(split="heldout"), make_pool(seed=2)]
    for pool in pools:
        pool.fill(0)
    assert len({float(pool.latents[:4].sum()) for pool in pools}) == 4


def test_captions_belong_to_their_clips():
    pool = make_pool(pool_size=4)
    pool.fill(0)
    scenes = sample_scenes(4, 1)
    actions = [ACTIONS[action] for action in scenes.action]
    for place, variants in enumerate(pool.tokens[:, :, 0]):
        texts = {read(ids) for ids in variants}
        assert len(texts) > 1
        assert {claims(text).get("action") for text in texts} <= {actions[place], None}
    drawn = pool.draw(draws(0, range(8)))
    assert torch.equal(drawn.mask, (drawn.ids > 0).long())
    for clip, text in zip(drawn.latents, map(read, drawn.ids), strict=True):
        place = next(i for i in range(4) if torch.equal(pool.latents[i], clip))
        assert claims(text).get("action") in (actions[place], None)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="use 6"):
        make_pool(pool_size=7)
    with pytest.raises(ValueError, match="between 1 and"):
        make_pool(min_fill=9)
