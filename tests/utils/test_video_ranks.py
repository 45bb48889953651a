"""Many ranks make the video that one makes: its tokens and heads shared, or the sides of its guidance, or both."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import inference
from benchmarks import usp
from pipeline import BidirectionalInferencePipeline, CausalDiffusionInferencePipeline
from pipeline.build import build_pipeline
from pipeline.rollout import FrameBlock, Path, guided, plan_blocks, rollout
from pipeline.samplers import SampleNoise, few_step
from pipeline.teacache import TeaCache
from tests import ranks as gloo
from tests.test_inference import MANY_STEPS
from utils.conditioning import Conditioning
from utils.config import ConfigError, load_config
from utils.distributed import init_distributed
from utils.video import read_video
from utils.video_ranks import VideoRanks, check_world, share_videos
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WAN_CONFIGS, WanConfig
from wan.modules.pose import DWPoseEmbedding
from wan.modules.sequence_parallel import Ulysses, check_heads

SIZES = WanConfig(
    dim=48, ffn_dim=64, num_heads=6, num_layers=2, in_dim=4, out_dim=4, text_dim=12, text_len=5, freq_dim=16, pose_dim=8
)
SIDE = 10  # latent cells: 25 tokens a frame, which divide by neither 2 nor 3
BATCH, FRAMES = 2, 7
SEEN = {"local_attn_size": 5, "sink_size": 1, "num_frame_per_block": 2}


class LatentsAsPixels:
    """A VAE whose pictures are the latents."""

    model = SimpleNamespace(spatial_stride=8, temporal_stride=4)
    make_cache = list
    splits = False

    def decode_to_pixel(self, latents: Tensor, cache: list) -> Tensor:
        return 2 * latents - 1


def embed(prompts: list[str]) -> Tensor:
    seeds = [sum(map(ord, prompt)) for prompt in prompts]
    return torch.stack([torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def network(is_causal: bool = True, **options) -> WanDiffusionWrapper:
    torch.manual_seed(0)
    generator = WanDiffusionWrapper(is_causal=is_causal, from_scratch=True, model_config=SIZES, **options)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return generator.eval()


# --- cases: each makes something with a generator that may share its passes ---


def few_steps_with_pose_and_a_new_prompt(generator: WanDiffusionWrapper, ranks: VideoRanks) -> Tensor:
    draw = SampleNoise(range(BATCH))
    pose = draw((BATCH, 8, FRAMES, SIDE // 2, SIDE // 2))
    cache = generator.model.make_kv_cache(BATCH, SIDE, SIDE, FRAMES)
    shared = generator.model.sequence_parallel
    assert cache.keys[0].shape[2] == 6 // (shared.size if shared else 1)
    assert cache.num_bytes == generator.model.kv_cache_bytes(BATCH, SIDE, SIDE, cache.capacity)
    path = Path(Conditioning(embed(["a", "b"]), pose=pose), cache)

    def sample(block: FrameBlock, paths: list[Path]) -> Tensor:
        if block.start == 5:
            paths[0].conditioning = Conditioning(embed(["c", "d"]), pose=pose)
            cache.forget_prompt()
        noise = draw((BATCH, block.num_frames, 4, SIDE, SIDE))
        return few_step(guided(generator, paths, block), noise, [1000, 600], generator.scheduler, draw)

    blocks = plan_blocks(FRAMES, 2, independent_first_frame=True)
    walk = rollout(generator, [path], blocks, sample, context_noise=50.0, draw=draw)
    return torch.cat([latents for _, latents in walk], dim=1)


def many_steps(generator: WanDiffusionWrapper, ranks: VideoRanks, **options) -> Tensor:
    options = {"negative_prompt": "n", "num_frame_per_block": 2, "sampling_steps": 2, "ranks": ranks} | options
    pipeline = CausalDiffusionInferencePipeline(generator, embed, LatentsAsPixels(), **options)
    wanted = {"num_frames": 6, "height": 8 * SIDE, "width": 8 * SIDE}
    if pipeline.guidance_passes != "one":
        torch.manual_seed(1)
        pipeline.dwpose_embedding = DWPoseEmbedding(SIZES.pose_dim)
        wanted["dwpose_data"] = torch.rand(1, 21, 3, 8 * SIDE, 8 * SIDE)
    video, latents = pipeline.inference(text_prompts=["a", "b"], seeds=[1, 2], return_latents=True, **wanted)
    if ranks.is_first:
        torch.testing.assert_close(video, latents)
    else:
        assert video.shape == (BATCH, 0, 3, 8 * SIDE, 8 * SIDE)
    return latents


def many_steps_in_one_pass(generator: WanDiffusionWrapper, ranks: VideoRanks) -> Tensor:
    return many_steps(generator, ranks, guidance_passes="one", sampling_steps=3, teacache=TeaCache((0.0,), 1.0))


def under_a_mask(generator: WanDiffusionWrapper, ranks: VideoRanks) -> Tensor:
    """One pass over a whole clip, noisy blocks after clean ones."""
    draw = SampleNoise(range(BATCH))
    x, clean = (draw((BATCH, 4, 4, SIDE, SIDE)) for _ in range(2))
    return generator(x, Conditioning(embed(["a", "b"])), torch.full((BATCH, 4), 500.0), clean_x=clean)[0]


def bidirectional(generator: WanDiffusionWrapper, ranks: VideoRanks) -> Tensor:
    pipeline = BidirectionalInferencePipeline(generator, embed, LatentsAsPixels(), sampling_steps=2, ranks=ranks)
    noise = SampleNoise(range(BATCH))((BATCH, 3, 4, SIDE, SIDE))
    return pipeline.inference(noise, ["a", "b"], return_latents=True)[1]


CASES: list[tuple[Callable[[WanDiffusionWrapper, VideoRanks], Tensor], dict]] = [
    (few_steps_with_pose_and_a_new_prompt, SEEN),
    (many_steps, SEEN | {"rope_base": "window"}),
    (many_steps_in_one_pass, {"num_frame_per_block": 2}),
    (under_a_mask, SEEN),
    (bidirectional, {"is_causal": False}),
]
GUIDED = [1, 4]  # those that have two sides, one pass each


@torch.no_grad()
def make(number: int, ranks: VideoRanks) -> Tensor:
    case, options = CASES[number]
    generator = network(**options)
    if ranks.sequence is not None:
        generator.model.share_passes(Ulysses(ranks.sequence))
    return case(generator, ranks)


def check(ranks: VideoRanks, alone: list[Tensor], numbers: Sequence[int] = range(len(CASES))) -> None:
    for number in numbers:
        torch.testing.assert_close(make(number, ranks), alone[number], rtol=0, atol=1e-5)


def work(alone: list[Tensor], arguments: list[str]) -> None:
    """Four ranks: in pairs, three of them, two by two; the benchmark; inference.py with two videos at a time."""
    ranks = init_distributed("cpu")
    pairs = share_videos(ranks, 2)
    assert (pairs.video, pairs.num_videos, pairs.is_first) == (ranks.rank // 2, 2, ranks.rank % 2 == 0)
    check(pairs, alone)
    three = dist.new_group([0, 1, 2])
    if ranks.rank < 3:
        check(VideoRanks(together=three, sequence=three), alone)
    guided_pairs = share_videos(ranks, guidance_parallel=True)
    check(guided_pairs, alone, GUIDED)
    both = share_videos(ranks, 2, guidance_parallel=True)
    assert (both.num_videos, both.is_first) == (1, ranks.rank == 0)
    check(both, alone, GUIDED)
    assert not pairs.all_agree(ranks.rank != 1, ranks.device) or ranks.rank > 1

    with torch.no_grad():
        model = network().model
        with pytest.raises(ValueError, match="6 attention heads do not divide over 4 ranks; use one of 1, 2, 3, 6"):
            model.share_passes(Ulysses(dist.group.WORLD))
        model.share_passes(Ulysses(pairs.sequence))
        tokens = torch.zeros(1, 3, 48)
        with pytest.raises(ValueError, match="a frame has 1 tokens, too few for 2 ranks"):
            model.sequence_parallel.split(tokens, 3)
    with pytest.raises(ValueError, match="for inference"):
        model.sequence_parallel.split(tokens, 1)
    with pytest.raises(ValueError, match="two sides of guidance on two ranks, this video has 1"):
        both.own_sides([0])
    settings = [argument for argument in arguments if "=" in argument]
    config = load_config("configs/puppet_many_steps.yaml", [*settings, "num_output_frames=6", "device=cpu"])
    config = usp.choose_ranks(replace(config, guidance_parallel=True), [], ranks.size)
    usp.report(config, ranks, usp.parse_arguments(["--repeats", "1", "--out", "usp.json"]))

    assert inference.main(["--output_folder", "shared", *arguments, "sequence_parallel=2"]) == 0


def test_many_ranks_are_one_process(tiny_model_folder, tmp_path):
    settings = ["--device", "cpu", "--num_output_frames", "6", "--prompt", "a red puppet", "--prompt", "a blue puppet"]
    settings += [f"model_name={tiny_model_folder}", "height=48", "width=80", *MANY_STEPS]
    done = gloo.run(__file__, 4, str(tmp_path), *settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 videos made, 0 kept") == 2
    figures = json.loads((tmp_path / "usp.json").read_text())
    assert figures["settings"]["gpus"] == 4 and figures["settings"]["sequence_parallel"] == 2
    assert all(figures[name] > 0 for name in ("usp_fps", "usp_fps_with_vae", "speedup", "messages_s_per_block"))
    assert figures["flow_error"] < 1e-5 and figures["latents_error"] < 1e-5
    assert figures["one_gpu"]["kv_cache_gb"] == pytest.approx(2 * figures["usp"]["kv_cache_gb"])
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    assert len(list(shared.glob("*.mp4"))) == len((shared / "metadata.jsonl").read_text().splitlines()) == 2
    for path in alone.glob("*.mp4"):
        (expected, _), (found, _) = read_video(path), read_video(shared / path.name)
        assert (found - expected).abs().mean() < 1e-3, path.name  # x264 makes much of one pixel's last bit


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(tmp_path):
    """Messages through NCCL, and in float32, so that an error is no rounding."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "benchmarks/usp.py"]
    command += ["--preset", "embedded", "--repeats", "1", "--out", str(tmp_path / "usp.json")]
    subprocess.run([*command, "dtype=float32", "num_output_frames=6"], cwd=gloo.ROOT, check=True, timeout=120)
    figures = json.loads((tmp_path / "usp.json").read_text())
    assert figures["flow_error"] < 1e-4 and figures["latents_error"] < 1e-3


def test_what_does_not_divide_is_refused(tiny_model_folder, capsys):
    for model, numbers in (("Wan2.1-T2V-1.3B", (1, 2, 3, 4, 6)), ("Wan2.1-T2V-14B", (2, 4, 5, 8))):
        for number in numbers:
            check_heads(WAN_CONFIGS[model].num_heads, number)
    with pytest.raises(ValueError, match="12 attention heads do not divide over 8 ranks; use one of 1, 2, 3, 4, 6, 12"):
        check_heads(12, 8)
    check_world(8, 4, True)
    with pytest.raises(ValueError, match="sequence_parallel 3 needs 3 processes for a video, 4 processes came"):
        check_world(4, 3, False)
    with pytest.raises(ValueError, match=r"times 2 for guidance_parallel, needs 4 .*--nproc_per_node=8"):
        check_world(6, 2, True)
    folder = f"model_name={tiny_model_folder}"
    assert inference.main(["--prompt", "a", folder, "sequence_parallel=2"]) == 1
    assert "1 process came; start with torchrun --nproc_per_node=2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="this program makes it in one"):
        build_pipeline(load_config(None, [folder, "guidance_parallel=true"]), "cpu")
    for settings, message in (
        (["sequence_parallel=0"], "at least 1"),
        (["guidance_parallel=true", "guidance_scale=1"], "no guidance to share: guidance_scale 1"),
        (["guidance_parallel=true", "denoising_step_list=[1000,500]"], "few steps have none"),
        (["guidance_parallel=true", "guidance_passes=one"], "set one of them"),
        (["sequence_parallel=2", "vae_device=cuda:1"], "leave vae_device out"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(None, settings)


if __name__ == "__main__":  # what one process makes is made before there are more: they know it then
    os.chdir(sys.argv.pop(2))
    torch.set_num_threads(1)
    assert inference.main(["--output_folder", "alone", *sys.argv[2:]]) == 0
    gloo.main(partial(work, [make(number, VideoRanks()) for number in range(len(CASES))]))
