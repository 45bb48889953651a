"""The undistilled teacher's pipeline: one pass sees the whole clip."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pipeline.image import choose_image_mode, encode_image
from pipeline.rollout import FrameBlock, Path, guided
from pipeline.samplers import SampleNoise, multi_step
from pipeline.teacache import TeaCache
from utils.conditioning import Conditioning
from utils.solvers import make_solver
from utils.video_ranks import VideoRanks
from utils.wan_wrapper import CLIPModel, WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper, latent_shape


class BidirectionalInferencePipeline:
    """Many-step generation of a whole clip with classifier-free guidance. The interface is the causal pipeline's."""

    def __init__(
        self,
        generator: WanDiffusionWrapper,
        text_encoder: WanTextEncoder | Callable[[Sequence[str]], Tensor],
        vae: WanVAEWrapper,
        *,
        clip: CLIPModel | Callable[[Tensor], Tensor] | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        solver: str = "unipc",
        sampling_steps: int = 50,
        teacache: TeaCache | None = None,
        ranks: VideoRanks | None = None,
    ):
        self.generator = generator
        self.text_encoder = text_encoder
        self.vae = vae
        self.clip = clip
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.solver = solver
        self.sampling_steps = sampling_steps
        self.teacache = teacache
        self.ranks = ranks or VideoRanks()

    @property
    def device(self) -> torch.device:
        return self.generator.model.device

    def stream(self, noise: Tensor | None = None, text_prompts: Sequence[str] = (), **options) -> Iterator[Tensor]:
        """Yield the whole video [B, F_px, 3, height, width] in [0, 1] at once: this model knows no blocks, and no
        first_frame_alone.
        """
        options.pop("first_frame_alone", None)
        yield self.inference(noise, text_prompts, **options)

    @torch.no_grad()
    def inference(
        self,
        noise: Tensor | None = None,
        text_prompts: Sequence[str] = (),
        *,
        seeds: Sequence[int] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        initial_latent: Tensor | None = None,
        input_image: Tensor | None = None,
        image_mode: str = "auto",
        return_latents: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Video [B, F_px, 3, height, width] in [0, 1]; arguments as in CausalDiffusionInferencePipeline."""
        is_i2v = self.generator.model.config.model_type == "i2v"
        if initial_latent is not None or (input_image is not None and not is_i2v):
            raise ValueError("a bidirectional t2v model cannot go on from given frames; set causal=true")
        if input_image is None and is_i2v:
            raise ValueError("an i2v model makes a video of an image; give input_image, or use a t2v model")
        if isinstance(text_prompts, str):
            text_prompts = [text_prompts]
        if not text_prompts:
            raise ValueError("no prompt came; give one text per video in text_prompts")
        if noise is None:
            if num_frames is None:
                raise ValueError(
                    "a bidirectional model needs num_frames or noise; only a causal one streams without end"
                )
            draw = SampleNoise(range(len(text_prompts)) if seeds is None else seeds, self.device)
            noise = draw((len(text_prompts), num_frames, *latent_shape(self.generator, self.vae, height, width)))
        noise = noise.to(self.device).float()
        embeds = [self.text_encoder(text_prompts)]
        if self.guidance_scale != 1:
            embeds.append(self.text_encoder([self.negative_prompt] * len(text_prompts)))
        image = {}
        if input_image is not None:
            choose_image_mode(image_mode, self.generator.model.config)
            image = encode_image(self.generator, self.vae, self.clip, input_image, noise.shape[1])
        paths = [Path(Conditioning(embed.to(self.device), **image), None) for embed in self.ranks.own_sides(embeds)]
        schedule = (self.solver, self.sampling_steps, self.generator.scheduler.shift)
        computed = None
        if self.teacache is not None:
            computed = self.teacache.plan(self.generator.model, make_solver(*schedule, "cpu").timesteps)
        block = FrameBlock(0, noise.shape[1])
        denoise = guided(self.generator, paths, block, self.guidance_scale, computed, all_sides=self.ranks.all_sides)
        latents = multi_step(denoise, noise, *schedule)
        video = self.ranks.decode(self.vae, latents)
        return (video, latents) if return_latents else video
