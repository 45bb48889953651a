"""Prompts in, videos out.

    python inference.py                                                 # the embedded model, prompts/puppet_world.txt
    python inference.py --prompt "a red puppet waves before a blue wall" --seed 7
    python inference.py --prompt "a red puppet waves" --input_image start.png
    python inference.py --prompt "a blue puppet waves" --video drive.mp4 --strength 0.7
    python inference.py --prompt "a man dances" --input_image man.png --pose dance.mp4 --pose_ckpt unianimate.ckpt
    python inference.py --data_path batch.jsonl                         # each line: prompt, image, pose, video, seed
    python inference.py --config_path configs/self_forcing_dmd.yaml --data_path prompts/cinematic.txt --use_ema
    torchrun --nproc_per_node=8 inference.py --config_path configs/self_forcing_dmd.yaml ...        # 8 videos at a time
    torchrun --nproc_per_node=4 inference.py sequence_parallel=2 ...    # 2 at a time, each on 2 GPUs (docs/parallel.md)

Any setting of utils/config.py can follow as key=value: `sampling_steps=8 model_kwargs.sink_size=3`. Every flag is
optional. Videos that exist are kept, so an interrupted run goes on where it stopped.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.batches import BATCH_SUFFIXES, read_batch
from utils.config import Config, config_hash, dump, load_config
from utils.distributed import init_distributed, resolve_device, shutdown
from utils.errors import plain_errors
from utils.memory import MemoryPlan, plan_inference
from utils.pose.source import is_keypoints, open_pose, open_reference_pose
from utils.prompts import Prompt, read_image_prompts, read_prompts, video_seed
from utils.video import (
    VideoWriter,
    contact_sheet,
    load_image,
    read_video,
    resize_cover,
    safe_name,
    video_length,
    video_pieces,
)
from utils.video_ranks import VideoRanks, check_world, share_videos

DEFAULT_CONFIG = "configs/puppet_tiny.yaml"
DEFAULT_PROMPTS = Path(__file__).parent / "prompts" / "puppet_world.txt"
TORCHRUN = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # what torchrun sets, and what holds without it
IMAGE_MODES = ("auto", "context", "concat", "ref_sink")
FILE_FLAGS = {"image": "input_image", "video": "video", "pose": "pose", "ref_pose": "ref_pose"}
CONTACT_SHEET_ROWS, CONTACT_SHEET_COLUMNS = 16, 6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """One video to make."""

    prompt: Prompt
    sample: int
    seed: int
    path: Path


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config_path", default=DEFAULT_CONFIG, help=f"YAML of settings (default: {DEFAULT_CONFIG})")
    add("--output_folder", type=Path, default=Path("videos"), help="where videos go (default: videos)")
    add("--checkpoint_path", help=".pt or .safetensors with the generator's weights; none: those of the model folder")
    add("--use_ema", action="store_true", help="take generator_ema from the checkpoint, not generator")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data_path",
        type=Path,
        help=".txt with one prompt per line; .jsonl or .csv with columns prompt, image, ref_pose, pose, video, seed; "
        "with --i2v: images + captions",
    )
    source.add_argument("--prompt", action="append", help="a prompt given here; may be repeated")
    add(
        "--extended_prompt_path",
        type=Path,
        help="twin of --data_path: its lines steer, those of --data_path name files",
    )
    add("--first", type=positive, metavar="N", help="only the first N prompts")
    add("--num_output_frames", type=int, help="latent frames of each video: n make 1 + 4 (n - 1) pictures")
    add("--num_samples", type=positive, default=1, help="videos per prompt, each with its own seed (default: 1)")
    add("--seed", type=int, help="with prompt and sample number it decides each video's noise (default: 0)")
    visual = parser.add_mutually_exclusive_group()
    visual.add_argument("--i2v", action="store_true", help="image to video: --data_path holds images with captions")
    visual.add_argument("--input_image", type=Path, metavar="IMAGE", help="image for every prompt without its own")
    visual.add_argument("--extend", type=Path, metavar="VIDEO", help="go on from the end of this video")
    add(
        "--image_mode",
        choices=IMAGE_MODES,
        help="the image is the first frame (context), what an i2v checkpoint reads (concat), or a reference not "
        "shown (ref_sink); default: auto, what the checkpoint can",
    )
    add("--video", type=Path, metavar="VIDEO", help="driving video for every prompt without its own: video to video")
    add("--strength", type=float, help="of the change to the driving video, in (0, 1] (default: 0.6)")
    add("--pose", type=Path, help="what to follow: keypoints (.npz, .json), or a video or folder of drawn ones")
    add("--ref_pose", type=Path, metavar="IMAGE", help="the skeleton of --input_image: drawn, or keypoints")
    add("--pose_strength", type=float, help="factor on the pose, in [0, 2] (default: 1, as trained)")
    add("--pose_guidance_scale", type=float, help="above 1: hold on to the pose, e.g. 3, for one more pass a step")
    add("--pose_ckpt", help="pose networks and LoRA: UniAnimate's checkpoint or one in its layout")
    add("--guidance_scale", type=float, help="how strongly many-step models follow words; 1: off, twice as fast")
    add("--save_with_index", action="store_true", help="name files <line>-<sample>_<regular|ema>.mp4, not by prompt")
    add("--overwrite", action="store_true", help="make videos again that exist already")
    add("--dry_run", action="store_true", help="print the resolved settings and stop")
    add("--device", help="auto, cpu, cuda or cuda:N (default: cuda where there is one)")
    add("overrides", nargs="*", metavar="key=value", help="any setting of utils/config.py")
    return parser.parse_intermixed_args(argv)


def resolve_config(arguments: argparse.Namespace) -> Config:
    """The run's settings: YAML, then key=value, then the flags that name a setting."""
    flags = {
        "generator_ckpt": arguments.checkpoint_path,
        "use_ema": arguments.use_ema or None,
        "num_output_frames": arguments.num_output_frames,
        "seed": arguments.seed,
        "device": arguments.device,
        "image_mode": arguments.image_mode,
        "strength": arguments.strength,
        "pose_strength": arguments.pose_strength,
        "pose_guidance_scale": arguments.pose_guidance_scale,
        "pose_ckpt": arguments.pose_ckpt,
        "guidance_scale": arguments.guidance_scale,
    }
    config = replace(
        load_config(arguments.config_path, arguments.overrides),
        **{name: value for name, value in flags.items() if value is not None},
    )
    config.check()
    return config


def read_requested_prompts(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.i2v:
        if arguments.data_path is None:
            raise ValueError("--i2v needs --data_path: a folder of images with captions (boat.png + boat.txt)")
        prompts = read_image_prompts(arguments.data_path, arguments.extended_prompt_path)
    elif arguments.prompt is not None:
        prompts = [Prompt(text.strip(), text.strip()) for text in arguments.prompt]
        if not all(prompt.text for prompt in prompts):
            raise ValueError('--prompt is empty; say what is to be seen, e.g. --prompt "a red puppet waves"')
    elif arguments.data_path is not None and arguments.data_path.suffix.lower() in BATCH_SUFFIXES:
        if arguments.extended_prompt_path:
            raise ValueError("--extended_prompt_path extends a text file; in a list, write the prompt you mean")
        prompts = read_batch(arguments.data_path)
    else:
        prompts = read_prompts(arguments.data_path or DEFAULT_PROMPTS, arguments.extended_prompt_path)
    given = {name: getattr(arguments, flag) for name, flag in FILE_FLAGS.items()}
    for name, path in given.items():
        if path is not None and not (path.is_file() or (name == "pose" and path.is_dir())):
            raise FileNotFoundError(f"no file at {path}, which --{FILE_FLAGS[name]} names")
    return [
        replace(prompt, **{name: getattr(prompt, name) or path for name, path in given.items()})
        for prompt in prompts[: arguments.first]
    ]


def plan_requests(arguments: argparse.Namespace, config: Config, prompts: Sequence[Prompt]) -> list[Request]:
    """One request per prompt and sample, in the order of the list; lines that say the same share a file."""
    weights = "ema" if config.use_ema else "regular"
    requests: dict[Path, Request] = {}
    for index, prompt in enumerate(prompts):
        for sample in range(arguments.num_samples):
            seed = config.seed if prompt.seed is None else prompt.seed
            if arguments.save_with_index:
                name = f"{index}-{sample}_{weights}"
            else:
                name = f"{safe_name(prompt.name, key=prompt.key)}-seed{seed}-{sample}"
            path = arguments.output_folder / f"{name}.mp4"
            requests.setdefault(path, Request(prompt, sample, video_seed(seed, prompt.key, sample), path))
    return list(requests.values())


def prepare_folder(folder: Path, config: Config) -> None:
    """Make the output folder and leave the resolved settings in it; refuse now what would fail after an hour."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".yaml", mode="w", delete=False) as file:
            file.write(dump(config))
        Path(file.name).replace(folder / f"config-{config_hash(config)}.yaml")
    except OSError as error:
        raise PermissionError(
            f"cannot write into {folder} ({error.strerror}); choose another folder with --output_folder"
        ) from error


def recorded_hashes(folder: Path) -> dict[str, str]:
    """Config hash of every file that metadata.jsonl knows; the last line about a file counts."""
    path, hashes = folder / "metadata.jsonl", {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # a line cut short by a power failure
            known = json.loads(line)
            hashes[known["file"]] = known["config_hash"]
    return hashes


def record(folder: Path, metadata: dict) -> None:
    """Append one line to metadata.jsonl, in one write, so that lines of several processes do not mix."""
    line = json.dumps(metadata, ensure_ascii=False) + "\n"
    descriptor = os.open(folder / "metadata.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode("utf-8"))
    finally:
        os.close(descriptor)


def read_video_to_extend(path: Path, config: Config) -> Tensor:
    """The end of a video in the size of the run, `[1, 1 + 4 n, 3, H, W]` in [-1, 1], as the VAE takes it."""
    frames, _ = read_video(path)
    frames = frames[(len(frames) - 1) % 4 :]
    return resize_cover(frames, config.height, config.width).mul(2).sub(1)[None]


def count_latents(pipeline, prompt: Prompt, config: Config, asked: int | None, to_extend: Tensor | None) -> int:
    """Latents of one video in all.

    As many blocks as without, after what is given; after a driving video or pose as many as that has, if none are asked
    for.
    """
    from pipeline.driving import latents_for, whole_blocks

    given = 0 if to_extend is None else 1 + (to_extend.shape[1] - 1) // 4
    is_first_frame = config.image_mode in ("auto", "context") and pipeline.clip is None
    given += int(prompt.image is not None and is_first_frame)
    first = given or int(config.independent_first_frame)
    if asked is None and (prompt.video or prompt.pose):
        if prompt.video:
            num_pictures = video_length(prompt.video, config.fps)
        else:
            num_pictures = open_pose(prompt.pose, config.fps, (config.height, config.width)).num_frames
        return whole_blocks(latents_for(num_pictures, 4), (first, config.num_frame_per_block))
    return config.num_output_frames + first - int(config.independent_first_frame)


def make_video(
    pipeline, request: Request, config: Config, num_frames: int, to_extend: Tensor | None
) -> Iterator[Tensor]:
    """Pixels of one video, `[f, 3, H, W]` in [0, 1], block by block.

    num_frames: latents in all, given ones included. to_extend: its beginning, `[1, 1 + 4 n, 3, H, W]` in [-1, 1].
    """
    prompt, size, options = request.prompt, (config.height, config.width), {}
    if to_extend is not None:
        options["initial_latent"] = pipeline.vae.encode_to_latent(to_extend)
    if prompt.image is not None:
        options["input_image"] = load_image(prompt.image, config.height, config.width)[None]
        options["image_mode"] = config.image_mode
    if prompt.video is not None:
        pieces = video_pieces(prompt.video, config.fps, config.height, config.width)
        options |= {"video": (piece[None] for piece in pieces), "strength": config.strength}
    if prompt.pose is not None:
        source = open_pose(prompt.pose, config.fps, size, config.drawing_profile, prompt.ref_pose)
        options |= {"dwpose_data": (piece[None] for piece in source.pieces()), **pose_options(config)}
    if prompt.ref_pose is not None and (prompt.image is not None or not is_keypoints(prompt.ref_pose)):
        options["random_ref_dwpose"] = open_reference_pose(prompt.ref_pose, size, config.drawing_profile)[None]
    for pixels in pipeline.stream(
        text_prompts=[prompt.text],
        seeds=[request.seed],
        num_frames=num_frames,
        height=config.height,
        width=config.width,
        **options,
    ):
        yield pixels[0]


def make_videos(
    pipeline, requests: Sequence[tuple[Request, int]], folder: Path, config: Config, to_extend: Tensor | None
) -> list[str]:
    """Write every requested video of so many latents; returns one sentence for each that could not be made.

    Of ranks that make a video together the first one writes.
    """
    failures = []
    in_silence = not logger.isEnabledFor(logging.INFO)  # one bar for all processes of a run
    total = sum(1 + 4 * (num_frames - 1) for _, num_frames in requests)
    with tqdm(total=total, unit="frame", disable=in_silence) as bar:
        for number, (request, num_frames) in enumerate(requests, start=1):
            bar.set_description(f"video {number}/{len(requests)}")
            began = time.perf_counter()
            try:
                blocks = make_video(pipeline, request, config, num_frames, to_extend)
                if not pipeline.ranks.is_first:
                    for _ in blocks:  # this rank's share of the work is done by asking for them
                        pass
                    continue
                with VideoWriter(request.path, config.fps) as writer:
                    for frames in blocks:
                        writer.append(frames)
                        bar.update(len(frames))
            except ValueError as error:  # this prompt's fault; the others can still be made
                failures.append(f"{request.prompt.name[:60]!r}: {error}")
                continue
            seconds = time.perf_counter() - began
            record(folder, describe(request, config, writer, seconds))
    return failures


def pose_options(config: Config) -> dict[str, float]:
    """How a pose is followed, as `stream` takes it."""
    options = {"pose_strength": config.pose_strength}
    if config.pose_guidance_scale is not None:
        options["pose_guidance_scale"] = config.pose_guidance_scale
    return options


def describe(request: Request, config: Config, writer: VideoWriter, seconds: float) -> dict:
    """The line of metadata.jsonl that lets a video be made again."""
    prompt = request.prompt
    return {
        "file": request.path.name,
        "prompt": prompt.name,
        **({"extended_prompt": prompt.text} if prompt.text != prompt.name else {}),
        **({"image": str(prompt.image)} if prompt.image else {}),
        **({"pose": str(prompt.pose), **pose_options(config)} if prompt.pose else {}),
        **({"ref_pose": str(prompt.ref_pose)} if prompt.ref_pose else {}),
        **({"video": str(prompt.video), "strength": config.strength} if prompt.video else {}),
        "seed": config.seed if prompt.seed is None else prompt.seed,
        "sample": request.sample,
        "video_seed": request.seed,
        "config_hash": config_hash(config),
        "model": config.model_name,
        "checkpoint": config.generator_ckpt,
        "use_ema": config.use_ema,
        "num_frames": writer.num_frames,
        "fingerprint": writer.fingerprint,
        "fps": config.fps,
        "height": config.height,
        "width": config.width,
        "seconds": round(seconds, 3),
        "frames_per_second": round(writer.num_frames / seconds, 2),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def draw_contact_sheet(folder: Path, requests: Sequence[Request]) -> Path | None:
    """One row per video that exists, the first samples of the first prompts.

    Every process draws the sheet when its share is done; the last to finish finds all videos there.
    """
    shown = [request for request in requests if request.sample == 0 and request.path.exists()][:CONTACT_SHEET_ROWS]
    if not shown:
        return None
    videos = [read_video(request.path, num_frames=CONTACT_SHEET_COLUMNS)[0] for request in shown]
    return contact_sheet(folder / "contact_sheet.png", videos, [request.prompt.name for request in shown])


def load_pipeline(config: Config, device: torch.device, ranks: VideoRanks | None = None):
    """The pipeline a config describes; imported late, so that --dry_run and mistakes in flags answer at once."""
    from pipeline.build import build_pipeline

    return build_pipeline(config, device, ranks=ranks)


def plan_memory(pipeline, config: Config, num_frames: int) -> MemoryPlan:
    """What the pipeline, loaded, will hold while it makes `num_frames` latents."""
    guided = config.denoising_step_list is None and config.guidance_scale != 1
    decodes_here = pipeline.vae.device == pipeline.generator.model.device
    return plan_inference(
        pipeline.generator.model.config,
        height=config.height,
        width=config.width,
        num_frames=num_frames,
        dtype=pipeline.generator.model.dtype,
        num_paths=(2 if guided and not config.guidance_parallel else 1) if config.causal else 0,  # bidirectional: none
        local_attn_size=config.model_kwargs.local_attn_size if config.causal else -1,
        num_frame_per_block=config.num_frame_per_block if config.causal else num_frames,
        num_ranks=config.sequence_parallel,
        text_encoder=pipeline.text_encoder.model,
        offload_text_encoder=pipeline.text_encoder.offload,
        clip=pipeline.clip,
        vae=pipeline.vae if decodes_here else None,
        vae_dim=pipeline.vae.decoder.outer_channels,
        vae_patch_size=pipeline.vae.decoder.patch_size,
        latents_per_chunk=pipeline.vae.latents_per_chunk if decodes_here else 0,
    )


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in TORCHRUN)
    logging.basicConfig(format="%(message)s", level=logging.INFO if rank == 0 else logging.WARNING)
    config = resolve_config(arguments)
    prompts = read_requested_prompts(arguments)
    requests = plan_requests(arguments, config, prompts)
    if not config.causal and any(prompt.video or prompt.pose for prompt in prompts):
        raise ValueError(
            "a bidirectional model follows no driving video and no pose; set causal=true, or leave them out"
        )
    if arguments.dry_run:
        print(dump(config), end="")
        print(f"# {len(requests)} videos into {arguments.output_folder}/, nothing was made")
        return 0

    check_world(world_size, config.sequence_parallel, config.guidance_parallel)
    if config.sequence_parallel == 1 and not config.guidance_parallel:  # processes that need not know of each other
        device, ranks = resolve_device(config.device, local_rank), VideoRanks(video=rank, num_videos=world_size)
        return make_share(arguments, config, requests, device, ranks)
    everyone = init_distributed(config.device)
    try:
        ranks = share_videos(everyone, config.sequence_parallel, config.guidance_parallel)
        return make_share(arguments, config, requests, everyone.device, ranks)
    finally:
        shutdown()


def make_share(
    arguments: argparse.Namespace,
    config: Config,
    requests: Sequence[Request],
    device: torch.device,
    ranks: VideoRanks,
) -> int:
    """Make the videos that fall to this process, alone or with others; returns the exit code."""
    prepare_folder(arguments.output_folder, config)
    mine = requests[ranks.video :: ranks.num_videos]
    missing = [request for request in mine if arguments.overwrite or not request.path.exists()]
    ranks.wait()  # all that make a video together have looked what is missing before one makes any
    kept = [request for request in mine if request not in missing]
    if ranks.is_first:
        report_kept(arguments.output_folder, config, kept)
    failures = []
    if missing:
        to_extend = read_video_to_extend(arguments.extend, config) if arguments.extend else None
        pipeline = load_pipeline(config, device, ranks)
        lengths = [
            count_latents(pipeline, request.prompt, config, arguments.num_output_frames, to_extend)
            for request in missing
        ]
        plan = plan_memory(pipeline, config, max(lengths))
        logger.info("memory on %s: %s", device, plan)
        plan.check(device)
        pairs = list(zip(missing, lengths, strict=True))
        failures = make_videos(pipeline, pairs, arguments.output_folder, config, to_extend)
    if not ranks.is_first:
        return 1 if failures else 0
    sheet = draw_contact_sheet(arguments.output_folder, requests)
    who = f"process {ranks.video}: " if ranks.num_videos > 1 else ""
    counts = f"{len(missing) - len(failures)} videos made, {len(kept)} kept"
    print(f"{who}{counts}: {arguments.output_folder}/" + (f", overview in {sheet}" if sheet else ""))
    for failure in failures:
        print(f"error: no video of {failure}", file=sys.stderr)
    return 1 if failures else 0


def report_kept(folder: Path, config: Config, kept: Sequence[Request]) -> None:
    """Say so when videos that are kept were made with other settings than those asked for now."""
    hashes, wanted = recorded_hashes(folder), config_hash(config)
    other = [request for request in kept if hashes.get(request.path.name) != wanted]
    if other:
        logger.warning(
            "%d of %d videos that exist already were made with other settings (%s first); they are kept: "
            "--overwrite makes them again, another --output_folder leaves them",
            len(other),
            len(kept),
            other[0].path.name,
        )


if __name__ == "__main__":
    sys.exit(main())
