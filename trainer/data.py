"""Which data a run learns from, by `data.kind`, and how its words reach the network."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.samplers import few_step_times
from utils.clip_poses import ClipPoses, find_tracks
from utils.config import Config, ConfigError
from utils.dataset import Samples, TrainingData, upload
from utils.distributed import Ranks
from utils.fingerprint import fingerprint
from utils.latent_folder import LatentFolder, ODEPairs
from utils.pose.keypoints import Keypoints
from utils.prompts import read_prompts
from utils.puppet_latents import PuppetLatents, skeletons, who
from utils.scheduler import FlowMatchScheduler
from utils.shards import Shards, read_about
from utils.text_cache import TextCache, TextEncoderFiles, fill_text_cache
from utils.text_dataset import PuppetCaptions, TextDataset
from utils.video_folder import ClipShape, about, encode_videos, scan_videos
from utils.wan_wrapper import WanVAEWrapper
from wan.configs import TEXT_ENCODER_FILES, VAE_FILES, find_model_file, find_model_folder
from wan.modules.text_encoder import TextTokenizer
from wan.modules.vae import WanVAE
from world.captions import captions
from world.puppet import Scenes, sample_scenes

logger = logging.getLogger(__name__)

SAMPLE_SCENES_FROM = 32  # the first held-out scene that contact sheets show

# What an objective can learn from -> the kinds of data that hold it.
KINDS = {
    "clips": ("puppet", "videos", "latents"),
    "words": ("puppet", "prompts", "videos", "latents"),
    "trajectories": ("ode_pairs",),
}


class DataSource:
    """Opens what `data.kind` names. Nothing is read, encoded or embedded before `open`: an export needs no data."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        tokenizer: TextTokenizer,
        encoder: TextEncoderFiles | None,
        *,
        vae: WanVAE,
        vae_folder: Path,
        dtype: torch.dtype,
        learns_from: str,
    ):
        """encoder: what fills data.text_cache, if set. vae: makes latents of `dtype`; its file is in vae_folder.

        learns_from: what the objective needs, a key of KINDS.
        """
        kind = config.data.kind
        if kind not in KINDS[learns_from]:
            raise ConfigError(
                f"data.kind is {kind}, but this objective learns from {learns_from}; set data.kind to "
                f"{' or '.join(KINDS[learns_from])}"
            )
        if kind == "puppet" and learns_from == "clips" and config.height != config.width:
            raise ConfigError(f"puppet clips are square; height is {config.height} and width {config.width}")
        self.config, self.ranks, self.vae, self.vae_folder, self.dtype = config, ranks, vae, vae_folder, dtype
        self.tokenizer, self.encoder, self.learns_from = tokenizer, encoder, learns_from
        self.cache: TextCache | None = None
        self.prompts: list[str] | None = None  # of the data, where they are a list
        self.captions: dict[str, str] | None = None  # of videos, as they stand beside them now
        self.tracks: dict[str, Keypoints] | None = None  # of videos, where the config steers by poses
        total = config.total_batch_size or config.batch_size * ranks.size
        self.walk = {"seed": config.seed, "samples_per_step": total}

    def open(self) -> TrainingData:
        """The training data, after making what its caches of latents and words lack; all ranks call this together."""
        config, settings = self.config, self.config.data
        if settings.kind == "videos":
            if config.control.pose_dim:  # before hours of encoding
                names = [video.name for video in scan_videos(settings.path)[0]]
                self.tracks = find_tracks(settings.path, names, config.fps, skip=settings.skip_broken)
            self.captions = fill_latent_cache(config, self.vae_folder, self.ranks, self.dtype)
        data = self._open("train")
        self.prompts = getattr(data, "prompts", None)
        if settings.text_cache:
            fill_text_cache(settings.text_cache, run_prompts(config), self.encoder, self.ranks)
            self.cache = TextCache(settings.text_cache, self.encoder.text_len, self.ranks.device)
        return data

    def open_heldout(self, num_samples: int) -> TrainingData | None:
        """Data that training never sees, on any rank the same; None where there is none."""
        settings = self.config.data
        if settings.kind == "puppet":
            whole_chunks = -(-num_samples // settings.encode_batch_size) * settings.encode_batch_size
            return self._puppets("heldout", 0, whole_chunks, whole_chunks)
        if settings.kind == "prompts":
            return None
        data = self._open("heldout")
        return data if data.clips else None

    def words(self, prompts: Sequence[str]) -> Samples:
        """Prompts as the trainer takes them: embeddings of the cache, or tokens."""
        if self.cache is not None:
            return self.cache(prompts)
        ids, mask = self.tokenizer(list(prompts))
        return Samples(upload(ids, self.ranks.device), upload(mask, self.ranks.device))

    def sample_prompts(self, count: int) -> list[str]:
        """At most so many prompts for contact sheets, the same ones all through a run."""
        config = self.config
        if config.data.sample_prompts:
            return [prompt.text for prompt in read_prompts(config.data.sample_prompts)][:count]
        if self.prompts is not None:
            return self.prompts[:count]
        return captions(self._sample_scenes(count), config.seed, full=True)

    def sample_drawings(self, count: int) -> Tensor | None:
        """What the puppets of `sample_prompts` do, uint8 [count, F_px, 3, H, W]; None where the prompts are others."""
        if self.config.data.sample_prompts or self.prompts is not None:
            return None
        num_frames = 1 + 4 * (self.config.num_training_frames - 1)
        return skeletons(self._sample_scenes(count).to(self.ranks.device), num_frames, size=self.config.height)

    def _sample_scenes(self, count: int) -> Scenes:
        return sample_scenes(count, self.config.seed, "heldout", start=SAMPLE_SCENES_FROM)

    def _open(self, split: str) -> TrainingData:
        config, settings = self.config, self.config.data
        if settings.kind == "prompts":
            return TextDataset.from_file(settings.path, self.words, extended_path=settings.extended_path, **self.walk)
        if settings.kind == "puppet" and self.learns_from == "words":
            return PuppetCaptions(self.words, **self.walk, split=split)
        if settings.kind == "puppet":
            return self._puppets(split, self.ranks.rank, settings.pool_size, settings.min_fill)
        if settings.kind == "ode_pairs":
            folder, dataset = Path(settings.path), ODEPairs
            weights = find_model_file(text_encoder_home(config), TEXT_ENCODER_FILES)
            causal = read_about(folder, ODEPairs.kind)["causal_teacher"]
            if causal != config.teacher_forcing:
                raise ConfigError(
                    f"{folder} holds trajectories of a {'causal' if causal else 'bidirectional'} teacher; "
                    f"set teacher_forcing: {str(causal).lower()}"
                )
            expected = trajectories_about(config, causal=causal)
            expected["text_encoder"] = fingerprint(weights)  # words of another one mean something else
        else:
            folder, dataset = Path(settings.path) if settings.kind == "latents" else latent_cache(config), LatentFolder
            expected = latents_about(config, self.vae_folder)
        return dataset(
            folder,
            self.words,
            expected=expected,
            num_latent_frames=config.num_training_frames,
            device=self.ranks.device,
            dtype=self.dtype,
            split=split,
            num_heldout=settings.num_eval_clips,
            captions=self.captions,
            poses=None if self.tracks is None else self._clip_poses(folder),
            **self.walk,
        )

    def _clip_poses(self, folder: Path) -> ClipPoses:
        config, stored = self.config, read_about(folder, LatentFolder.kind)["num_frames"]
        return ClipPoses(
            self.tracks,
            config.control,
            profile=config.drawing_profile,
            size=(config.height, config.width),
            num_frames=_clip_shape(config).num_pixel_frames,
            clip_frames=replace(_clip_shape(config), num_frames=stored).num_pixel_frames,
            seed=config.seed,
            device=self.ranks.device,
        )

    def _puppets(self, split: str, rank: int, pool_size: int, min_fill: int) -> PuppetLatents:
        config = self.config
        return PuppetLatents(
            lambda pixels: self.vae.encode(pixels.transpose(1, 2).to(self.dtype)).transpose(1, 2),
            self.tokenizer,
            seed=config.seed,
            rank=rank,
            num_latent_frames=config.num_training_frames,
            size=config.height,
            pool_size=pool_size,
            min_fill=min_fill,
            refresh_per_step=config.data.refresh_per_step,
            chunk_size=config.data.encode_batch_size,
            device=self.ranks.device,
            dtype=self.dtype,
            split=split,
            control=config.control if config.control.pose_dim else None,
        )


def check_calls(config: Config, num_samples: int) -> None:
    """Refuse batches that call a sharded network unequally often: once for clips with an image, once for those without.

    num_samples: of a step. Ranks that wait for weights which another does not ask for would wait for ever.
    """
    size = config.batch_size
    batches = [who(range(start, start + size), config.control) for start in range(0, num_samples, size)]
    if len({bool(len(plain)) + bool(len(imaged)) for _, plain, imaged in batches}) > 1:
        raise ConfigError(
            f"control.image_dropout is {config.control.image_dropout} and batch_size {size}: some batches hold images "
            "and clips without, others one kind only, and a sharded network must be called equally often on every GPU; "
            "set batch_size: 1, or sharding_strategy: no_shard"
        )


def text_encoder_home(config: Config) -> Path:
    """The folder whose text encoder a run starts from."""
    if config.from_scratch and config.data.text_encoder_folder:
        return Path(config.data.text_encoder_folder)
    return find_model_folder(config.model_name)


def run_prompts(config: Config) -> list[str]:
    """All that a run on files reads out to its text encoder: its data's prompts, the negative one, those it samples."""
    settings = config.data
    if settings.kind == "prompts":
        prompts = [prompt.text for prompt in read_prompts(settings.path, settings.extended_path)]
    elif settings.kind == "videos":
        prompts = [video.prompt for video in scan_videos(settings.path)[0]]
    else:
        kind = ODEPairs.kind if settings.kind == "ode_pairs" else LatentFolder.kind
        prompts = [item.row["prompt"] for item in Shards(settings.path, kind).items]
    shown = read_prompts(settings.sample_prompts) if settings.sample_prompts else []
    return [config.negative_prompt, *prompts, *(prompt.text for prompt in shown)]


def latent_cache(config: Config) -> Path:
    """Where the latents of a folder of videos lie."""
    return Path(config.data.latent_cache or Path(config.data.path) / "latents")


def latents_about(config: Config, vae_folder: Path) -> dict[str, Any]:
    """What latents must have been made with to be this run's; their clips may be longer."""
    wanted = about(_clip_shape(config), vae_fingerprint(vae_folder))
    del wanted["num_frames"]
    return wanted


def trajectories_about(config: Config, *, causal: bool) -> dict[str, Any]:
    """What a teacher's trajectories must have been made with so that a student of this config can learn from them.

    causal: whether the teacher goes block by block; then its blocks are the student's.
    """
    scheduler = FlowMatchScheduler(config.timestep_shift)
    times = few_step_times(config.denoising_step_list, scheduler, warp=config.warp_denoising_step)
    wanted = {"kind": ODEPairs.kind, "causal_teacher": causal, "shift": config.timestep_shift, "timesteps": times}
    if causal:
        wanted |= {name: getattr(config, name) for name in ("num_frame_per_block", "independent_first_frame")}
    return wanted | {"height": config.height, "width": config.width}


def fill_latent_cache(config: Config, vae_folder: Path, ranks: Ranks, dtype: torch.dtype) -> dict[str, str]:
    """Encode the videos in data.path that the latent cache lacks, each rank its share; return the captions by name."""
    vae = WanVAEWrapper(str(vae_folder), device=ranks.device, dtype=dtype)
    return encode_videos(
        config.data.path,
        latent_cache(config),
        vae.encode_to_latent,
        _clip_shape(config),
        vae=vae_fingerprint(vae_folder),
        ranks=ranks,
        skip=config.data.skip_broken,
    )


def vae_fingerprint(folder: Path) -> str:
    weights = find_model_file(folder, VAE_FILES)
    return fingerprint(*(file for file in (weights, weights.with_suffix(".json")) if file.is_file()))


def _clip_shape(config: Config) -> ClipShape:
    return ClipShape(config.height, config.width, config.fps, config.num_training_frames)
