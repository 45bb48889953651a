"""The networks under the names the rest of the house uses, loaded from a model folder."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn as nn
from torch import Tensor

from utils.conditioning import Conditioning
from utils.scheduler import FlowMatchScheduler
from wan.configs import (
    CLIP_FILES,
    TEXT_ENCODER_FILES,
    TINY_VAE_FILES,
    TOKENIZER_FOLDERS,
    VAE_FILES,
    WanConfig,
    find_model_file,
    find_model_folder,
)
from wan.modules.causal_model import CausalWanModel
from wan.modules.clip import load_clip_vision
from wan.modules.kv_cache import KVCache
from wan.modules.model import Features, Shortcut, WanModel, allow_graphs
from wan.modules.text_encoder import TextTokenizer, encode, load_umt5
from wan.modules.tiny_vae import TinyVAE, load_tiny_vae
from wan.modules.vae import Strip, VAECache, WanVAE, load_vae

logger = logging.getLogger(__name__)


class WanDiffusionWrapper(nn.Module):
    """A Wan transformer and its clock: noisy latents in, flow and clean latents out.

    model_name: a folder in `wan_models/`, or a path. is_causal: block-causal with a KV cache, else bidirectional.
    from_scratch: random weights, sizes from `model_config` or the folder's config.json. The window, sink and block
    sizes are CausalWanModel's.
    """

    def __init__(
        self,
        model_name: str = "Wan2.1-T2V-1.3B",
        is_causal: bool = False,
        *,
        timestep_shift: float = 5.0,
        num_frame_per_block: int = 3,
        local_attn_size: int = -1,
        sink_size: int = 0,
        independent_first_frame: bool = False,
        rope_base: str = "absolute",
        attention_backend: str = "auto",
        from_scratch: bool = False,
        model_config: WanConfig | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.is_causal = is_causal
        self.scheduler = FlowMatchScheduler(shift=timestep_shift)
        network = WanModel
        options = {"attention_backend": attention_backend}
        if is_causal:
            network = CausalWanModel
            options |= {
                "num_frame_per_block": num_frame_per_block,
                "local_attn_size": local_attn_size,
                "sink_size": sink_size,
                "independent_first_frame": independent_first_frame,
                "rope_base": rope_base,
            }
        if from_scratch:
            config = model_config or WanConfig.from_folder(find_model_folder(model_name))
            with torch.device(device):
                self.model = network(config, **options).to(dtype)
        else:
            folder = find_model_folder(model_name)
            self.model = network.from_pretrained(folder, device=device, dtype=dtype, **options)

    def forward(
        self,
        noisy_image_or_video: Tensor,
        conditioning: Conditioning,
        timestep: Tensor,
        *,
        kv_cache: KVCache | None = None,
        clean_x: Tensor | None = None,
        aug_t: Tensor | None = None,
        add_condition: Tensor | None = None,
        image_first: bool = False,
        taps: Sequence[int] = (),
        shortcut: Shortcut | None = None,
        keys_only: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Features]:
        """Flow and x0, both [B, F, C, H, W] float32, of noisy latents [B, F, C, H, W] at timestep [B, F] in [0, 1000].

        conditioning covers just these frames (see Conditioning.frames). kv_cache, clean_x (also [B, F, C, H, W]),
        aug_t, image_first and keys_only are CausalWanModel.forward's; taps, which adds a third output, and shortcut are
        WanModel.forward's. add_condition overrides conditioning's pose.
        """
        options = {"taps": taps} if taps else {}
        if self.is_causal:
            options = {
                "kv_cache": kv_cache,
                "clean_x": None if clean_x is None else clean_x.transpose(1, 2),
                "aug_t": aug_t,
                "image_first": image_first,
                "keys_only": keys_only,
            }
        if shortcut is not None:
            options["shortcut"] = shortcut
        out = self.model(
            noisy_image_or_video.transpose(1, 2),
            timestep,
            conditioning.prompt_embeds,
            conditioning.clip_feature,
            conditioning.y,
            add_condition=conditioning.add_condition if add_condition is None else add_condition,
            **options,
        )
        flow, *features = out if taps else (out,)
        flow = flow.transpose(1, 2).float()
        return flow, self.scheduler.flow_to_x0(flow, noisy_image_or_video, timestep), *features


MEMO_SIZE = 64  # prompts whose embeddings are kept, 4 MB each at full size in bf16


class WanTextEncoder(nn.Module):
    """umT5: prompts -> embeddings [B, T, text_dim]; `forward` remembers those of the last prompts.

    offload: leave the GPU after encoding ("always"), stay ("never"), or leave when the GPU holds less than 48 GB
    ("auto"): at full size the encoder takes 11.4 GB in bf16, four times the 1.3B transformer.
    """

    def __init__(
        self,
        model_name: str = "Wan2.1-T2V-1.3B",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        offload: str = "auto",
    ):
        super().__init__()
        folder = find_model_folder(model_name)
        text_len = WanConfig.from_folder(folder).text_len
        self.tokenizer = TextTokenizer(find_model_file(folder, TOKENIZER_FOLDERS), text_len)
        self.device = torch.device(device)
        self.offload = should_offload(offload, self.device)
        weights = find_model_file(folder, TEXT_ENCODER_FILES)
        self.model = load_umt5(weights, device="cpu" if self.offload else self.device, dtype=dtype).eval()
        self._memo: dict[str, Tensor] = {}

    def tokenize(self, text_prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, int64 [B, T] each, on the CPU."""
        return self.tokenizer(text_prompts)

    def encode_ids(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[B, T] ids and mask -> [B, T, text_dim], rows beyond the length zero; differentiable, not memoised."""
        return encode(self.model, ids, mask)

    @torch.no_grad()
    def forward(self, text_prompts: Sequence[str]) -> Tensor:
        """[B, T, text_dim] on the encoder's device; rows beyond a prompt's length are zero."""
        new = [prompt for prompt in dict.fromkeys(text_prompts) if prompt not in self._memo]
        if new:
            self.model.to(self.device)
            for prompt in new:  # one by one: a prompt's embedding does not depend on its neighbours
                ids, mask = self.tokenize([prompt])
                self._memo[prompt] = self.encode_ids(ids.to(self.device), mask.to(self.device))[0]
            if self.offload:
                self.model.to("cpu")
                torch.cuda.empty_cache()
        for prompt in text_prompts:  # the newest at the end: the negative prompt, always asked for, never leaves
            self._memo[prompt] = self._memo.pop(prompt)
        embeds = torch.stack([self._memo[prompt] for prompt in text_prompts])
        for prompt in list(self._memo)[:-MEMO_SIZE]:
            del self._memo[prompt]
        return embeds


def should_offload(offload: str, device: torch.device) -> bool:
    """Whether a part that is used once per video should wait in main memory."""
    if offload not in ("auto", "always", "never"):
        raise ValueError(f"offload {offload!r} is unknown; use 'auto', 'always' or 'never'")
    if device.type != "cuda" or offload == "never":
        return False
    return offload == "always" or torch.cuda.get_device_properties(device).total_memory < 48e9


NO_TINY_VAE = (
    "use vae_decoder=full, or put a decoder of these latents there: for Wan 2.1 taew2_1.pth from "
    "https://github.com/madebyollin/taehv, for the embedded model one made by configs/puppet_tiny_vae.yaml"
)


class WanVAEWrapper(nn.Module):
    """Pixels <-> latents in the layout upstairs, a few latents at a time so that memory does not grow with the clip.

    decoder: "full" is Wan's own; "tiny" makes pictures with the folder's `taew2_1` file, softer and many times faster.
    Encoding is always Wan's own: a generator's latents are what it knows. compile: decode by compiled graphs, one for
    each number of latents that comes, of a video's beginning and of its rest; cuDNN measures which of its convolutions
    are the fastest.

    Use `reset_cache` before the first `decode_to_pixel(..., use_cache=True)` of a new video.
    """

    def __init__(
        self,
        model_name: str = "Wan2.1-T2V-1.3B",
        *,
        decoder: str = "full",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        latents_per_chunk: int = 4,
        compile: bool = False,
    ):
        super().__init__()
        if decoder not in ("full", "tiny"):
            raise ValueError(f"decoder {decoder!r} is unknown; use 'full' or 'tiny'")
        folder = find_model_folder(model_name)
        tiny_file = find_model_file(folder, TINY_VAE_FILES, NO_TINY_VAE) if decoder == "tiny" else None
        self.model = load_vae(find_model_file(folder, VAE_FILES), device=device, dtype=dtype)
        self.tiny = None if tiny_file is None else load_tiny_vae(tiny_file, device=device, dtype=dtype)
        if self.tiny is not None and latents_of(self.tiny) != latents_of(self.model):
            raise ValueError(
                f"{tiny_file} is of another VAE: (channels, pixels and frames per latent) are {latents_of(self.tiny)}, "
                f"those of this folder's VAE {latents_of(self.model)}; use vae_decoder=full"
            )
        self.latents_per_chunk = latents_per_chunk
        self.cache: VAECache | None = None
        self._decode = self.decoder.decode
        self._measures = compile
        if compile:
            allow_graphs()
            self._decode = torch.compile(self.decoder.decode, dynamic=False, fullgraph=True)

    def _to_model(self, x: Tensor) -> Tensor:
        """[B, F, C, H, W] -> [B, C, F, H, W], on the VAE's device and in its dtype."""
        weight = next(self.model.parameters())
        return x.transpose(1, 2).to(weight.device, weight.dtype)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def decoder(self) -> WanVAE | TinyVAE:
        """What makes the pictures."""
        return self.model if self.tiny is None else self.tiny

    @property
    def splits(self) -> bool:
        """Whether several ranks can each make a strip of the pictures; the tiny decoder is too fast to be worth it."""
        return self.tiny is None

    def make_cache(self) -> VAECache:
        """Memory for decoding a new video."""
        return self.decoder.make_cache()

    def reset_cache(self) -> None:
        """Forget the video that `decode_to_pixel(..., use_cache=True)` is in the middle of."""
        self.cache = None

    def make_encoder_cache(self) -> VAECache:
        """Memory for encoding a new video piece by piece."""
        return self.model.make_cache()

    @torch.no_grad()
    def encode_to_latent(self, pixels: Tensor, cache: VAECache | None = None) -> Tensor:
        """Pixels [B, 1 + 4n, 3, 8H, 8W] in [-1, 1] -> normalised latents [B, 1 + n, C, H, W], float32.

        The pixels may lie on another device: they come over chunk by chunk. With a `cache` of `make_encoder_cache` they
        go on where its last ones stopped: after a video's first piece, 4n pixel frames make n latents.
        """
        cache, num_frames = cache or self.make_encoder_cache(), pixels.shape[1]
        begun = cache.encoder[0] is not None
        starts = range(0 if begun else 1, num_frames, self.model.temporal_stride * self.latents_per_chunk)
        bounds = [*([] if begun else [0]), *starts, num_frames]
        latents = [self.model.encode(self._to_model(pixels[:, start:stop]), cache) for start, stop in pairwise(bounds)]
        return torch.cat(latents, dim=2).transpose(1, 2).float()

    @torch.no_grad()
    def decode_to_pixel(
        self,
        latents: Tensor,
        use_cache: bool = False,
        cache: VAECache | None = None,
        strip: Strip | None = None,
    ) -> Tensor:
        """Normalised latents [B, F, C, H, W] -> pixels [B, F_px, 3, 8H, 8W] in [-1, 1], float32.

        A video's first latent gives 1 frame, every other one 4. These latents go on where the last call with the same
        `cache` stopped, or, with use_cache, where the last call with use_cache stopped. strip: these columns of the
        pictures only (where the decoder `splits`), the same ones all through a video.
        """
        if cache is None:
            cache = (self.cache if use_cache else None) or self.make_cache()
        latents, chunks = self._to_model(latents), []
        if cache.decoder[0] is None:  # alone, so that a video is the same whether its first frame is asked for first
            chunks, latents = [latents[:, :, :1]], latents[:, :, 1:]
        chunks += latents.split(self.latents_per_chunk, dim=2) if latents.shape[2] else []
        options = {} if strip is None else {"strip": strip}
        with measured_convolutions(self._measures):
            pixels = torch.cat([self._decode(chunk, cache, **options).float() for chunk in chunks], dim=2)
        if use_cache:
            self.cache = cache
        return pixels.transpose(1, 2).clamp_(-1, 1)


@contextmanager
def measured_convolutions(wanted: bool) -> Iterator[None]:
    """Let cuDNN try its kernels on every new shape, if wanted; what it found stays for the process."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def latents_of(vae: WanVAE | TinyVAE) -> tuple[int, int, int]:
    """(channels, pixels per side, frames) of one latent."""
    return vae.latent_channels, vae.spatial_stride, vae.temporal_stride


def latent_shape(
    generator: WanDiffusionWrapper, vae: WanVAEWrapper, height: int | None, width: int | None
) -> tuple[int, int, int]:
    """(C, H, W) of a video of height x width pixels; ValueError where it does not split into latents and patches."""
    config, stride = generator.model.config, vae.model.spatial_stride
    rows, columns = stride * config.patch_size[1], stride * config.patch_size[2]
    if height is None or width is None or height % rows or width % columns:
        raise ValueError(f"height {height} and width {width} must be multiples of {rows} and {columns}")
    return config.out_dim, height // stride, width // stride


class CLIPModel(nn.Module):
    """Image tower of open-clip's XLM-RoBERTa ViT-H/14: pixels in [-1, 1] -> tokens [B, 257, 1280] for i2v models."""

    def __init__(
        self,
        model_name: str = "Wan2.1-I2V-14B-480P",
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float16,
    ):
        super().__init__()
        self.model = load_clip_vision(
            find_model_file(find_model_folder(model_name), CLIP_FILES), device=device, dtype=dtype
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] in [-1, 1], any size -> [B, 257, 1280]."""
        return self.model(images)
