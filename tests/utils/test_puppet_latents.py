"""utils/puppet_latents.py: the pool is what its picture says, and a resumed run finds it again."""

import pytest
import torch
from torch import Tensor

from utils.config import ControlConfig
from utils.distributed import Rngs, SampleRngs
from utils.puppet_latents import PuppetLatents, skeletons, who
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


STEERED = {
    "control": ControlConfig(pose_dropout=0.25, image_dropout=0.5, hidden_joints=0),
    "chunk_size": 4,
    "num_latent_frames": 3,
}


def test_controls_change_nothing_else():
    plain, steered = make_pool(chunk_size=4, num_latent_frames=3), make_pool(**STEERED)
    for pool in (plain, steered):
        pool.fill(0)
    assert torch.equal(plain.latents, steered.latents)
    assert torch.equal(plain.tokens, steered.tokens[:, : plain.tokens.shape[1]])
    assert plain.draw(draws(0, range(2))).controls is None


def test_controls_are_those_of_their_clips():
    pool = make_pool(**STEERED, pool_size=4)
    pool.fill(0)
    scenes = sample_scenes(4, 1)
    assert torch.equal(pool.drawings, skeletons(scenes, 9, size=16))
    drawn = pool.draw(draws(0, range(16)))
    controls = drawn.controls
    clips = [next(i for i in range(4) if torch.equal(pool.latents[i], clip)) for clip in drawn.latents]
    assert torch.equal(controls.drawings, pool.drawings[[clips[i] for i in controls.posed]])
    shown = [clips[i] for i in controls.imaged]
    assert torch.equal(controls.references, pool.references[shown])
    assert torch.equal(controls.reference_drawings, pool.reference_drawings[shown])
    unposed = [n for n, place in enumerate(controls.imaged) if place not in controls.posed]
    assert unposed and controls.reference_posed[unposed].all()
    look = [(still - clip[:1]).abs().mean() for still in pool.references for clip in pool.latents]
    own = torch.stack(look).view(4, 4)
    assert (own.argmin(1) == torch.arange(4)).all() and own.min() > 0  # the same puppet, at another moment


def test_words_of_steered_samples():
    pool = make_pool(
        control=ControlConfig(pose_dropout=0, image_dropout=0.5, wrong_action=1, unsaid_looks=1),
        chunk_size=4,
        pool_size=4,
    )
    pool.fill(0)
    drawn, scenes = pool.draw(draws(0, range(32))), sample_scenes(4, 1)
    for place, (ids, clip) in enumerate(zip(drawn.ids, drawn.latents, strict=True)):
        said = claims(read(ids))
        true = ACTIONS[scenes.action[next(i for i in range(4) if torch.equal(pool.latents[i], clip))]]
        if place in drawn.controls.imaged:
            assert said.keys() <= {"action"} and said.get("action", true) == true
        else:
            assert said.get("action") != true


def test_a_resumed_run_finds_the_same_controls():
    walked, resumed = make_pool(**STEERED), make_pool(**STEERED)
    walked.fill(0)
    for step in range(1, 6):
        walked.advance(step)
    resumed.fill(5)
    for name in ("drawings", "references", "reference_drawings"):
        assert torch.equal(getattr(walked, name), getattr(resumed, name))
    whole = walked.draw(draws(5, range(8))).controls
    parts = [resumed.draw(draws(5, part)).controls for part in (range(4), range(4, 8))]
    assert torch.equal(whole.posed, torch.cat([parts[0].posed, 4 + parts[1].posed]))
    for name in ("drawings", "references", "reference_posed", "first_frame"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


def test_some_skeletons_lack_joints():
    whole, lacking = (make_pool(control=ControlConfig(hidden_joints=share)) for share in (0, 1))
    for pool in (whole, lacking):
        pool.fill(0)
    shown = lacking._shown_joints(0)
    assert 0.5 < shown.float().mean() < 1 and not torch.equal(shown[0], shown[1])
    assert (lacking.drawings > 0).sum() < (whole.drawings > 0).sum()
    assert torch.equal(whole.reference_drawings, lacking.reference_drawings)


def test_pose_and_image_come_in_all_combinations_and_equal_shares():
    control = ControlConfig(pose_dropout=0.5, image_dropout=0.8)
    for first in (0, 40, 77):
        posed, plain, imaged = (set(places.tolist()) for places in who(range(first, first + 40), control))
        assert len(posed) == 20 and len(imaged) == 8 and len(posed & imaged) == 4
        assert plain | imaged == set(range(40)) and not plain & imaged
    assert [len(places) for places in who(range(5), ControlConfig(pose_dropout=1, image_dropout=1))] == [0, 5, 0]
