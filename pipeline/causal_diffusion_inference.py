"""Words in, video out: the causal pipeline, few-step or many-step, whole or as a stream."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path as FilePath

import torch
from torch import Tensor

from pipeline.driving import DrivingVideo, latents_for, skipped_steps, whole_blocks
from pipeline.graphs import CapturedPasses, Recorder
from pipeline.image import ImageCondition, choose_image_mode, encode_image
from pipeline.overlap import decoded_meanwhile, with_first_frame_alone
from pipeline.pose import DrivingPose, PoseSteering, load_pose_networks, prepare_drawings
from pipeline.rollout import FrameBlock, Path, guided, plan_blocks, rollout
from pipeline.samplers import SampleNoise, few_step, few_step_times, multi_step
from pipeline.teacache import TeaCache
from utils.conditioning import Conditioning
from utils.memory import available, pass_bytes
from utils.solvers import make_solver
from utils.video_ranks import VideoRanks
from utils.wan_wrapper import CLIPModel, WanDiffusionWrapper, WanTextEncoder, WanVAEWrapper, latent_shape
from wan.modules.kv_cache import KVCache
from wan.modules.lora import merge_lora
from wan.modules.pose import DWPoseEmbedding, RandomRefPoseEmbedding, fold_pose_proj
from wan.modules.weights import read_tensors

logger = logging.getLogger(__name__)


class CausalDiffusionInferencePipeline:
    """Generates video block by block from a KV cache.

    denoising_step_list: times of a few-step (self-forcing) model on the unshifted 0-1000 grid, warped by the
    generator's shift unless warp_denoising_step is off; one pass each, no guidance. None: `sampling_steps` of `solver`
    with classifier-free guidance over two caches, kv_cache_pos and kv_cache_neg. context_noise: time in [0, 1000] at
    which finished blocks are remembered. clean_context: remember a block by one more pass over its clean latents; off
    (for models trained so) by the keys of its last denoising step, which saves that pass.

    guidance_passes: "one" takes both sides of guidance through the generator together: faster where one side leaves the
    GPU idle, for twice a pass's memory. kv_cache_pos then holds both sides, the guided one first, and kv_cache_neg is
    None. "two": one after the other. "auto": together on a GPU that has the room.

    teacache: leave out denoising steps that change little (many steps only).

    ranks: the processes that make a video together, each of which makes the same calls. The generator is to share its
    passes over the same ranks (WanModel.share_passes). All have the latents; the first rank has the pictures, on the
    others videos have none ([B, 0, 3, height, width]).

    vae_overlap: a block is decoded while the next one is denoised, for which the walk goes one block ahead; not on a
    CPU, and not after a live driver (an iterable), whose next block may depend on this one's pictures. A VAE on another
    GPU always works so. The pictures are the same.

    The caches are kept from call to call; one pipeline runs one stream at a time, and starting another ends the first.
    """

    def __init__(
        self,
        generator: WanDiffusionWrapper,
        text_encoder: WanTextEncoder | Callable[[Sequence[str]], Tensor],
        vae: WanVAEWrapper,
        *,
        clip: CLIPModel | Callable[[Tensor], Tensor] | None = None,
        guidance_scale: float = 3.0,
        negative_prompt: str = "",
        num_frame_per_block: int = 3,
        denoising_step_list: Sequence[float] | None = None,
        warp_denoising_step: bool = True,
        solver: str = "unipc",
        sampling_steps: int = 50,
        context_noise: float = 0.0,
        clean_context: bool = True,
        independent_first_frame: bool = False,
        guidance_passes: str = "auto",
        teacache: TeaCache | None = None,
        ranks: VideoRanks | None = None,
        vae_overlap: bool = False,
    ):
        self.generator = generator
        self.denoiser: WanDiffusionWrapper | CapturedPasses = generator  # what makes the passes, see record_passes
        self.text_encoder = text_encoder
        self.vae = vae
        self.clip = clip
        self.guidance_scale = guidance_scale
        self.negative_prompt = negative_prompt
        self.num_frame_per_block = num_frame_per_block
        self.solver = solver
        self.sampling_steps = sampling_steps
        self.context_noise = context_noise
        self.clean_context = clean_context
        self.independent_first_frame = independent_first_frame
        if guidance_passes not in ("auto", "one", "two"):
            raise ValueError(f"guidance_passes {guidance_passes!r} is unknown; use 'auto', 'one' or 'two'")
        self.guidance_passes = guidance_passes
        self.kv_cache_pos: KVCache | None = None
        self.kv_cache_neg: KVCache | None = None
        self.kv_cache_ref: KVCache | None = None  # with a guidance of the pose's own: prompt and image, no pose
        self.dwpose_embedding: DWPoseEmbedding | None = None
        self.randomref_embedding_pose: RandomRefPoseEmbedding | None = None
        self.teacache = teacache
        self.ranks = ranks or VideoRanks()
        self._plans: dict[tuple, tuple[bool, ...]] = {}
        self._streams = 0
        self._walk_stream: torch.cuda.Stream | None = None  # of denoising, where decoding overlaps it
        alone = self.ranks.together is None  # ranks that decode together wait for each other as it is
        if self.device.type == "cuda" and alone and (vae_overlap or vae.device != self.device):
            self._walk_stream = torch.cuda.Stream(self.device)
        self.timesteps: list[float] | None = None
        if denoising_step_list:
            self.timesteps = few_step_times(denoising_step_list, generator.scheduler, warp=warp_denoising_step)
            if teacache is not None:
                raise ValueError(
                    "teacache leaves out steps of a many-step model, a few-step one needs all; set it to 0"
                )

    @property
    def device(self) -> torch.device:
        return self.generator.model.device

    def record_passes(self, recorder: Recorder) -> None:
        """From now on passes over a cache are recorded and replayed, see pipeline.graphs."""
        self.denoiser = CapturedPasses(self.generator, recorder)

    @torch.no_grad()
    def stream(self, noise: Tensor | None = None, text_prompts: Sequence[str] = (), **options) -> Iterator[Tensor]:
        """Yield pixels [B, f_px, 3, height, width] in [0, 1], float32, one block at a time as it is made.

        noise [B, F, C, H, W]: start noise of the frames to generate. Without it, `seeds` (one int per prompt), `height`
        and `width` (pixels, divisible by 16) and `num_frames` (latents in all, given ones included; None: without end)
        are needed. initial_latent [B, n, C, H, W]: given frames that the video goes on from; they are decoded and
        yielded too. input_image [B, 3, height, width] in [-1, 1]: by image_mode (pipeline.image; auto: what the
        checkpoint can) the first frame, the image of an i2v model, or a reference that is remembered and not shown.
        video: one to make this one after, [B, F_px, 3, height, width] in [-1, 1] or an iterable of such pieces as they
        come; as many frames are made. strength in (0, 1]: the share of the denoising steps that is taken.
        dwpose_data: drawings of a moving skeleton [B or 1, F_px, 3, h, w], uint8 or in [0, 1], or an iterable of such
        pieces; a video without num_frames is as long. random_ref_dwpose [B or 1, 3, h, w]: the same of the image's own
        pose. pose_strength, pose_start, pose_end, pose_lookahead, pose_guidance_scale: see PoseSteering.
        first_frame_alone: yield the first frame before the others of its block are decoded, for who waits to see one.
        Raises ValueError for what does not fit, before anything is made.
        """
        for _, pixels in self._decoded(noise, text_prompts, **options):
            yield pixels

    @torch.no_grad()
    def inference(
        self, noise: Tensor | None = None, text_prompts: Sequence[str] = (), *, return_latents: bool = False, **options
    ) -> Tensor | tuple[Tensor, Tensor]:
        """A whole video [B, F_px, 3, height, width] in [0, 1]; with return_latents also its latents [B, F, C, H, W].

        Arguments are `stream`'s; the video must have an end.
        """
        if noise is None and all(options.get(name) is None for name in ("num_frames", "video", "dwpose_data")):
            raise ValueError("inference() needs num_frames or noise; use stream() for a video without end")
        latents, pixels = zip(*self._decoded(noise, text_prompts, **options), strict=True)
        video = torch.cat(pixels, dim=1)
        return (video, torch.cat(latents, dim=1)) if return_latents else video

    def _decoded(
        self,
        noise: Tensor | None,
        text_prompts: Sequence[str],
        *,
        video: Tensor | Iterable[Tensor] | None = None,
        first_frame_alone: bool = False,
        **options,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and pixels of every block; after a driving video, as many frames as it has."""
        vae_cache, num_made = self.vae.make_cache(), 0

        def decode(latents: Tensor, driving: DrivingVideo | None) -> Tensor:
            nonlocal num_made
            pixels = self.ranks.decode(self.vae, latents, vae_cache)
            if driving is not None:
                pixels = pixels[:, : driving.num_frames - num_made]
            num_made += pixels.shape[1]
            return pixels

        walk = self._walk(noise, text_prompts, video=video, **options)
        if first_frame_alone:
            walk = with_first_frame_alone(walk)
        drivers = [driver for driver in (video, options.get("dwpose_data")) if driver is not None]
        if self._walk_stream is None or not all(isinstance(driver, Tensor) for driver in drivers):
            for latents, driving in walk:
                yield latents, decode(latents, driving)
        else:
            yield from decoded_meanwhile(walk, decode, self._walk_stream)

    @torch.no_grad()
    def encode_image(
        self, input_image: Tensor, num_frames: int | None, ref_pose: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What an i2v model reads of images [B, 3, height, width] in [-1, 1]: {"clip_feature", "y"}.

        num_frames: latents of the video; None: as many as are not repeated for ever. See pipeline.image.encode_image.
        """
        return encode_image(self.generator, self.vae, self.clip, input_image, num_frames, ref_pose)

    def load_pose_embedding_weights(self, path: str | FilePath) -> dict[str, int]:
        """Both pose networks (and a trained pose_proj) from a checkpoint of many things; {network: tensors} found.

        The networks' names are found anywhere in a key; a network's tensors must be all there and fit. A model without
        pose is made to take it: see WanModel.add_pose_proj for what that is worth without training.
        """
        networks = load_pose_networks(path, self.generator.model, self.device)
        self.dwpose_embedding, self.randomref_embedding_pose = networks.video, networks.reference
        return networks.found

    def load_unianimate_lora(self, path: str | FilePath, alpha: float = 1.0) -> dict[str, int]:
        """Merge a checkpoint's LoRA into the generator; {module: rank}. See wan.modules.lora.merge_lora."""
        return merge_lora(self.generator.model, read_tensors(path), alpha)

    def _walk(
        self,
        noise: Tensor | None,
        text_prompts: Sequence[str],
        *,
        initial_latent: Tensor | None = None,
        input_image: Tensor | None = None,
        image_mode: str = "auto",
        video: Tensor | Iterable[Tensor] | None = None,
        strength: float = 0.6,
        dwpose_data: Tensor | Iterable[Tensor] | None = None,
        random_ref_dwpose: Tensor | None = None,
        pose_strength: float = 1.0,
        pose_start: float = 0.0,
        pose_end: float = 1.0,
        pose_lookahead: str = "exact",
        pose_guidance_scale: float | None = None,
        seeds: Sequence[int] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Iterator[tuple[Tensor, DrivingVideo | None]]:
        """Latents of every block, given ones included, and what drives them."""
        if isinstance(text_prompts, str):
            text_prompts = [text_prompts]
        if not text_prompts:
            raise ValueError("no prompt came; give one text per video in text_prompts")
        batch = len(text_prompts)
        if noise is not None:
            shape = tuple(noise.shape[2:])
        else:
            shape = latent_shape(self.generator, self.vae, height, width)
        steering = PoseSteering(pose_strength, pose_start, pose_end, pose_lookahead, pose_guidance_scale)
        drawing = self._reference_drawing(random_ref_dwpose, input_image, (batch, *shape))
        image = self._image_condition(input_image, image_mode, (batch, *shape), drawing)
        if image.given is not None:
            rest = [] if initial_latent is None else [initial_latent.to(image.given)]
            initial_latent = torch.cat([image.given, *rest], dim=1)
        num_given = 0 if initial_latent is None else initial_latent.shape[1]
        if noise is not None:
            num_frames = num_given + noise.shape[1]
        elif num_frames is not None:
            num_frames += image.num_hidden
        driving, skip = None, 0
        leader = dwpose_data if video is None else video
        if num_frames is None and isinstance(leader, Tensor):
            length = image.num_hidden + latents_for(leader.shape[1], self.vae.model.temporal_stride)
            first = num_given or int(self.independent_first_frame)
            num_frames = whole_blocks(length, (first, self.num_frame_per_block))
        if video is not None:
            skip = skipped_steps(self.num_steps, strength)
            stride = self.vae.model.spatial_stride
            driving = DrivingVideo(self.vae, video, (batch, shape[1] * stride, shape[2] * stride))
        pose = self._driving_pose(dwpose_data, steering, (batch, *shape), num_frames, image, drawing)
        if self.ranks.guidance is not None and pose is not None and num_frames is None:
            raise ValueError(
                "guidance_parallel: the rank of the unguided side reads no pose and cannot tell when one ends; give "
                "num_frames"
            )
        for name, tensor in (("noise", noise), ("initial_latent", initial_latent)):
            if tensor is not None and (tensor.shape[0], *tensor.shape[2:]) != (batch, *shape):
                raise ValueError(
                    f"{name} is {list(tensor.shape)}, {batch} prompts of latents {list(shape)} need "
                    f"[{batch}, frames, {', '.join(map(str, shape))}]"
                )
        draw = SampleNoise(range(batch) if seeds is None else seeds, self.device)
        blocks = plan_blocks(num_frames, self.num_frame_per_block, self.independent_first_frame, num_given)
        if num_frames is not None:
            blocks = list(blocks)  # a length that does not split is refused here, before anything is made
        if driving is not None:
            blocks = driving.follow(blocks, image.num_hidden)
        elif pose is not None and num_frames is None:
            blocks = pose.follow(blocks)
        paths = self._paths(text_prompts, shape, num_frames, image, pose)

        def sample(block: FrameBlock, paths: list[Path]) -> Tensor:
            if noise is None:
                start = draw((batch, block.num_frames, *shape))
            else:
                start = noise[:, block.start - num_given : block.stop - num_given].float()
            after = None if driving is None else driving.latents.to(self.device)
            return self.sample_block(start.to(self.device), block, paths, draw, after, skip, steering)

        if initial_latent is not None:
            initial_latent = initial_latent.to(self.device)
        self._streams += 1
        stream = self._streams
        walk = rollout(
            self.denoiser,
            paths,
            blocks,
            sample,
            initial_latent=initial_latent,
            context_noise=self.context_noise,
            clean_context=self.clean_context,
            draw=draw,
        )
        for block, latents in walk:
            shown = latents[:, max(0, image.num_hidden - block.start) :]
            if shown.shape[1]:
                yield shown, driving
            if stream != self._streams:
                raise RuntimeError(
                    "a newer stream of the same pipeline took over its caches; make one pipeline per stream"
                )

    def _pixel_size(self, shape: tuple[int, int, int, int]) -> tuple[int, int, int]:
        """(B, height, width) of the pixels of latents [B, C, H, W]."""
        stride = self.vae.model.spatial_stride
        return shape[0], shape[2] * stride, shape[3] * stride

    def _reference_drawing(
        self, drawing: Tensor | None, images: Tensor | None, shape: tuple[int, int, int, int]
    ) -> Tensor | None:
        """The reference's skeleton as the networks take it, [B, 3, 1, height, width] in [0, 1]."""
        if drawing is None:
            return None
        if images is None:
            raise ValueError("random_ref_dwpose is the pose of a reference image; give input_image too")
        batch, *size = self._pixel_size(shape)
        if drawing.ndim != 4 or drawing.shape[1] != 3 or drawing.shape[0] not in (1, batch):
            raise ValueError(f"random_ref_dwpose is {list(drawing.shape)}; [{batch}, 3, height, width] is needed")
        return prepare_drawings(drawing[:, None], size).to(self.device).expand(batch, -1, -1, -1, -1)

    def _driving_pose(
        self,
        drawings: Tensor | Iterable[Tensor] | None,
        steering: PoseSteering,
        shape: tuple[int, int, int, int],
        num_frames: int | None,
        image: ImageCondition,
        drawing: Tensor | None,
    ) -> DrivingPose | None:
        """What brings the pose of a walk over num_frames latents; ValueError where there are no weights for it."""
        if drawings is None:
            return None
        if self.dwpose_embedding is None:
            raise ValueError(
                "a pose came, but no pose weights are loaded; call load_pose_embedding_weights(path), or name them in "
                "the config as pose_ckpt"
            )
        if steering.strength == 0:
            return None
        hidden = None
        if image.num_hidden and drawing is not None:
            hidden = self.dwpose_embedding.features(drawing)
        if num_frames is not None:
            num_frames = 1 + self.vae.model.temporal_stride * (num_frames - image.num_hidden - 1)
        return DrivingPose(
            self.dwpose_embedding,
            fold_pose_proj(self.dwpose_embedding, self.generator.model.pose_proj),
            drawings,
            self._pixel_size(shape),
            num_frames=num_frames,
            steering=steering,
            num_hidden=image.num_hidden,
            hidden=hidden,
        )

    def _image_condition(
        self, images: Tensor | None, mode: str, shape: tuple[int, int, int, int], drawing: Tensor | None = None
    ) -> ImageCondition:
        """What the images put into a walk over latents [B, C, H, W]; ValueError where the model cannot take them so.

        drawing [B, 3, 1, height, width]: the image's own pose.
        """
        model = self.generator.model
        if images is None:
            if model.config.model_type == "i2v":
                raise ValueError("an i2v model makes a video of an image; give input_image, or use a t2v model")
            return ImageCondition()
        mode = choose_image_mode(mode, model.config)
        stride = self.vae.model.spatial_stride
        wanted = [shape[0], 3, shape[2] * stride, shape[3] * stride]
        if list(images.shape) != wanted:
            raise ValueError(
                f"input_image is {list(images.shape)}, the video needs {wanted}: one per prompt, of its size"
            )
        windowed = model.local_attn_size != -1 and not model.sink_size
        if mode == "concat":
            if windowed:
                logger.warning("the image leaves the window of %d latents; sink_size=1 keeps it", model.local_attn_size)
            ref_pose = None
            if drawing is not None:
                if self.randomref_embedding_pose is None:
                    raise ValueError(
                        "random_ref_dwpose came, but no weights of randomref_embedding_pose are loaded; leave it out, "
                        "or load a checkpoint that has them"
                    )
                ref_pose = self.randomref_embedding_pose(drawing[:, :, 0])
            return ImageCondition(**self.encode_image(images, None, ref_pose))
        if mode == "ref_sink" and windowed:
            raise ValueError(
                f"image_mode ref_sink keeps the reference in the attention sink, but sink_size is 0 in a window of "
                f"{model.local_attn_size} latents; set model_kwargs.sink_size=1"
            )
        given = self.vae.encode_to_latent(images[:, None]).to(self.device)
        return ImageCondition(given=given, num_hidden=int(mode == "ref_sink"))

    def _paths(
        self,
        text_prompts: Sequence[str],
        shape: tuple[int, int, int],
        num_frames: int | None,
        image: ImageCondition,
        pose: DrivingPose | None = None,
    ) -> list[Path]:
        """The guided path, with a guidance of the pose's own the one without pose, and with guidance the unguided."""
        batch, guided = len(text_prompts), self.timesteps is None and self.guidance_scale != 1
        pose_guided = pose is not None and pose.steering.guidance_scale not in (None, 1)
        together = guided and pose is None and self._guides_in_one_pass(batch, shape, num_frames)
        sides = 1 + together
        alone = self.ranks.guidance is None
        self._prepare_caches(sides * batch, shape, num_frames, alone and guided and not together, alone and pose_guided)
        embeds = self.text_encoder(text_prompts).to(self.device)
        positive = Conditioning(embeds, image.clip_feature, image.y, pose)
        paths = [Path(positive, self.kv_cache_pos)]
        if pose_guided:
            paths.append(Path(positive, self.kv_cache_ref).without_pose())
        if not guided:
            return self._own_paths(paths)
        negative = positive.negative(self.text_encoder([self.negative_prompt] * batch).to(self.device))
        if together:
            return [Path(positive.beside(negative), self.kv_cache_pos, sides)]
        return self._own_paths([*paths, Path(negative, self.kv_cache_neg)])

    def _own_paths(self, paths: list[Path]) -> list[Path]:
        """All, or the one that is walked on this rank and remembers in its only cache."""
        if self.ranks.guidance is None:
            return paths
        return [replace(path, kv_cache=self.kv_cache_pos) for path in self.ranks.own_sides(paths)]

    def _guides_in_one_pass(self, batch: int, shape: tuple[int, int, int], num_frames: int | None) -> bool:
        if self.ranks.guidance is not None:
            return False
        if self.guidance_passes != "auto" or self.device.type != "cuda":
            return self.guidance_passes == "one"
        model, (_, height, width) = self.generator.model, shape
        tokens = 2 * batch * self.num_frame_per_block * model.config.tokens_per_frame(height, width)
        wanted = pass_bytes(model.config, tokens, model.dtype)
        if self.kv_cache_pos is None:
            frames = model.cache_capacity(num_frames)
            wanted += model.kv_cache_bytes(2 * batch, height, width, frames)
        return self.ranks.all_agree(wanted < available(self.device), self.device)

    def _prepare_caches(
        self,
        batch: int,
        shape: tuple[int, int, int],
        num_frames: int | None,
        negative: bool = False,
        without_pose: bool = False,
    ) -> None:
        """Empty caches for latents [batch, num_frames, *shape], in the old memory if it fits.

        negative, without_pose: whether there are such sides, with a cache of their own.
        """
        model, (_, height, width) = self.generator.model, shape
        wanted = (model.cache_capacity(num_frames), model.config.tokens_per_frame(height, width))
        if self.kv_cache_pos is None or not self.kv_cache_pos.fits(batch, *wanted, model.dtype, model.device):
            self.kv_cache_pos = self.kv_cache_neg = self.kv_cache_ref = None  # one shape; old memory goes before new
            self.kv_cache_pos = model.make_kv_cache(batch, height, width, num_frames)
            sizes = self.kv_cache_pos.capacity, self.kv_cache_pos.num_bytes / 1e9, 1 + negative + without_pose
            logger.info("KV cache of %d latent frames: %.2f GB, times %d", *sizes)
        if negative and self.kv_cache_neg is None:
            self.kv_cache_neg = model.make_kv_cache(batch, height, width, num_frames)
        if without_pose and self.kv_cache_ref is None:
            self.kv_cache_ref = model.make_kv_cache(batch, height, width, num_frames)
        for cache in filter(None, (self.kv_cache_pos, self.kv_cache_neg, self.kv_cache_ref)):
            cache.reset()

    @property
    def num_steps(self) -> int:
        """Denoising steps of a block."""
        return self.sampling_steps if self.timesteps is None else len(self.timesteps)

    def _steps_computed(self, skip: int) -> tuple[bool, ...] | None:
        """TeaCache's plan of the steps after `skip`; it is the same for every block."""
        if self.teacache is None:
            return None
        schedule = (self.solver, self.sampling_steps, self.generator.scheduler.shift)
        key = (self.teacache, *schedule, skip)
        plan = self._plans.get(key)
        if plan is None:
            timesteps = make_solver(*schedule, "cpu").timesteps[skip:]
            plan = self._plans[key] = self.teacache.plan(self.generator.model, timesteps)
        return plan

    def sample_block(
        self,
        noise: Tensor,
        block: FrameBlock,
        paths: list[Path],
        draw: SampleNoise,
        after: Tensor | None = None,
        skip: int = 0,
        steering: PoseSteering | None = None,
    ) -> Tensor:
        """Clean latents of one block from its start noise [B, f, C, H, W] float32.

        after: latents to be changed rather than made up, from the noise level that `skip` steps leave.
        """
        scales, sees_pose = [], None
        if steering is not None:
            if steering.guidance_scale not in (None, 1):
                scales.append(steering.guidance_scale)
            if (steering.start, steering.end) != (0, 1):

                def sees_pose(call: int) -> bool:
                    return steering.sees(skip + call, self.num_steps)

        scales = [*scales, self.guidance_scale][: max(1, sum(path.sides for path in paths) - 1)]
        computed = self._steps_computed(skip)
        denoise = guided(self.denoiser, paths, block, scales, computed, sees_pose, self.ranks.all_sides)
        if self.timesteps is not None:
            return few_step(denoise, noise, self.timesteps, self.generator.scheduler, draw, start=after, skip=skip)
        shift = self.generator.scheduler.shift
        return multi_step(denoise, noise, self.solver, self.sampling_steps, shift, start=after, skip=skip)
