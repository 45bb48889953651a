"""What recipes on latents share: model folder, generator, text encoder, VAE, data, samples and the export."""

import logging
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from model.base import Batch, Loss, Player
from pipeline.build import assemble_pipeline, generator_options, merge_lora_of
from trainer.base import Trainer
from trainer.data import DataSource, check_calls, text_encoder_home
from trainer.plan import activation_bytes
from utils.checkpoint import load_generator
from utils.conditioning import Conditioning
from utils.config import ConfigError
from utils.dataset import Samples, TrainingData
from utils.distributed import Rngs, SampleRngs, barrier
from utils.flops import pass_flops
from utils.sharding import gathered, whole_state
from utils.text_cache import TextEncoderFiles
from utils.training_state import has_training_state
from utils.video import contact_sheet, write_video
from utils.wan_wrapper import WanDiffusionWrapper, WanVAEWrapper
from wan.configs import (
    POSE_FILES,
    TEXT_ENCODER_FILES,
    TOKENIZER_FOLDERS,
    VAE_FILES,
    WAN_CONFIGS,
    WanConfig,
    find_model_file,
    find_model_folder,
    pose_file,
)
from wan.modules.masks import BlockCausalMask
from wan.modules.pose import DWPoseEmbedding, pose_weights
from wan.modules.text_encoder import TextTokenizer, encode, load_umt5, new_umt5, save_umt5
from wan.modules.vae import load_vae
from wan.modules.weights import assign_weights, read_tensors, save_safetensors
from world.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

NUM_SAMPLES = 4  # videos on the contact sheet
NUM_EVAL_SAMPLES = 16  # held-out clips that the loss is measured on, rounded up to whole batches
EVAL_STEP = 2**40  # the held-out loss draws its noise as this step: no training step ever


class LatentTrainer(Trainer):
    """A recipe whose student paints latents from words; it says its players, and by that its objective.

    The run folder's `export/` is a model folder from the first step on: sizes, VAE and tokenizer are known; the
    transformer and, if it learns too, the text encoder join at the end.
    """

    can_shard = True
    can_graph = True
    pose_embedding: DWPoseEmbedding | None = None  # only where the config steers by poses

    @property
    def learns_from(self) -> str:
        """What the objective needs of its data: clips, words (alone) or trajectories."""
        return "clips"

    @property
    def learns_pose(self) -> bool:
        """Whether pose networks learn too, where there are any; else a model's own say what they have learned."""
        return False

    def build(self) -> list[Player]:
        config = self.config
        self.model_config = _model_config(config.model_name)
        if config.control.pose_dim:
            self.model_config = replace(self.model_config, pose_dim=config.control.pose_dim)
            if self.sharding.mesh is not None:
                check_calls(config, config.total_batch_size or config.batch_size * self.ranks.size)
        self.folder = self.run_dir / "export"
        if self.ranks.is_main:
            self.begin_folder()
        barrier(self.ranks)
        self.generator = self.build_generator()
        if config.control.pose_dim:
            self.pose_embedding = self.build_pose_embedding()
        self.tokenizer = TextTokenizer(find_model_file(self.folder, TOKENIZER_FOLDERS), self.model_config.text_len)
        self.text_encoder = None if config.data.text_cache else self.build_text_encoder()
        vae = find_model_file(self.folder, VAE_FILES)
        self.latent_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.vae = load_vae(vae, device=self.device, dtype=self.latent_dtype)
        self.source = self.make_source()
        self.heldout_data: TrainingData | None = None
        return self.make_players()

    @abstractmethod
    def make_players(self) -> list[Player]:
        """Who learns, once generator, text encoder, VAE and data are there."""

    def student(self, loss: Loss) -> Player:
        """The player that is exported: the generator, and text encoder and pose networks if they learn too."""
        learners = {"generator": self.generator}
        if self.pose_embedding is not None and self.learns_pose:
            learners["dwpose_embedding"] = self.pose_embedding
        if self.config.train_text_encoder:
            learners["text_encoder"] = self.text_encoder
        return Player("student", nn.ModuleDict(learners), loss)

    # --- networks and data ---

    def begin_folder(self) -> None:
        """Write what is known of the exported model before training: sizes, VAE, tokenizer."""
        config, data = self.config, self.config.data
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(self.model_config.to_json(), encoding="utf-8")
        resuming = has_training_state(self.run_dir)  # then latents and tokens must go on meaning what they meant
        if not (resuming and any((self.folder / name).is_file() for name in VAE_FILES)):
            vae = find_model_file(data.vae_folder or find_model_folder(config.model_name), VAE_FILES)
            for file in (vae, vae.with_suffix(".json")):
                if file.is_file():
                    shutil.copyfile(file, self.folder / file.name)
        tokenizer = self.folder / TOKENIZER_FOLDERS[0]
        if resuming and tokenizer.is_dir():
            return
        if config.from_scratch and data.text_encoder_folder:
            source = find_model_file(Path(data.text_encoder_folder), TOKENIZER_FOLDERS)
            shutil.copytree(source, tokenizer, dirs_exist_ok=True)
        elif data.tokenizer_folder:
            shutil.copytree(data.tokenizer_folder, tokenizer, dirs_exist_ok=True)
        elif config.from_scratch:
            train_tokenizer(tokenizer, max_length=self.model_config.text_len)
        else:
            source = find_model_file(find_model_folder(config.model_name), TOKENIZER_FOLDERS)
            shutil.copytree(source, tokenizer, dirs_exist_ok=True)

    def build_generator(self) -> WanDiffusionWrapper:
        config = self.config
        generator = self.build_network(
            config.model_name,
            self.starting_point,
            use_ema=config.use_ema,
            from_scratch=config.from_scratch,
            **generator_options(config),
        )
        if generator.model.device.type != "meta" and not config.from_scratch:
            merge_lora_of(config, generator)
        if config.control.pose_dim:
            generator.model.add_pose_proj(config.control.pose_dim)
        return generator

    def build_pose_embedding(self) -> DWPoseEmbedding:
        """The model folder's pose network, or a new one where pose is learned."""
        embedding = DWPoseEmbedding(self.config.control.pose_dim).init_weights()
        known = None if self.config.from_scratch else pose_file(self.config.model_name)
        if known is None and not self.learns_pose:
            raise ConfigError(
                f"control.pose_dim is set, but {self.config.model_name} has no {POSE_FILES[0]} for the {self.name} "
                "trainer to go by; start from a model that has learned poses (configs/puppet_pose.yaml)"
            )
        if known is not None:
            own = {name: t.float() for name, t in pose_weights(read_tensors(known), "dwpose_embedding").items()}
            assign_weights(embedding, own, f"{known} (dwpose_embedding)")
        return embedding.to(self.device).requires_grad_(self.learns_pose)

    @property
    def starting_point(self) -> str | None:
        """The checkpoint that training starts from; None: the model folder's weights."""
        return self.config.generator_ckpt

    def build_network(
        self,
        model_name: str,
        checkpoint: str | None = None,
        *,
        use_ema: bool = False,
        from_scratch: bool = False,
        dtype: torch.dtype = torch.float32,
        **options,
    ) -> WanDiffusionWrapper:
        """A transformer where it can be cut (Sharding.build_device), ready to learn."""
        config, device = self.config, self.sharding.build_device
        reads = device.type != "meta"  # a rank that gets its weights from rank 0 reads none
        network = WanDiffusionWrapper(
            model_name,
            from_scratch=from_scratch or not reads,
            model_config=_model_config(model_name),
            device=device,
            dtype=dtype,
            **options,
        )
        if checkpoint and reads:
            load_generator(network, checkpoint, use_ema=use_ema)
        network.requires_grad_(True)
        network.model.gradient_checkpointing = config.gradient_checkpointing
        if config.compiles:
            network.model.compile_blocks()
        return network

    def build_text_encoder(self) -> nn.Module:
        config, sizes = self.config, self.config.text_encoder
        if not config.from_scratch or config.data.text_encoder_folder:
            weights = find_model_file(text_encoder_home(self.config), TEXT_ENCODER_FILES)
            dtype = torch.float32 if config.train_text_encoder else torch.bfloat16
            model = load_umt5(weights, device=self.device, dtype=dtype)
        elif not config.train_text_encoder:
            raise ConfigError(
                "from_scratch makes a new text encoder too, which must learn; set train_text_encoder: true, or "
                "data.text_encoder_folder to one that is trained"
            )
        else:
            model = new_umt5(vocab_size=len(self.tokenizer.tokenizer), **vars(sizes)).to(self.device)
        return model.requires_grad_(config.train_text_encoder)

    def make_source(self) -> DataSource:
        encoder, tokenizer = None, find_model_file(self.folder, TOKENIZER_FOLDERS)
        if self.config.data.text_cache:
            weights = find_model_file(text_encoder_home(self.config), TEXT_ENCODER_FILES)
            encoder = TextEncoderFiles(weights, tokenizer, self.model_config.text_len)
        return DataSource(
            self.config,
            self.ranks,
            self.tokenizer,
            encoder,
            vae=self.vae,
            vae_folder=self.folder,
            dtype=self.latent_dtype,
            learns_from=self.learns_from,
        )

    # --- a step ---

    def start(self) -> None:
        self.open_data()
        self.data.fill(self.step, whole=not self.config.checkpoint.compact)

    def open_data(self) -> None:
        """Data, and with it the words that the text side knows."""
        self.data = self.source.open()
        self.negative_words = self.source.words([self.config.negative_prompt])

    def after_step(self) -> None:
        self.data.advance(self.step)

    def prepare(self, rngs: SampleRngs) -> Batch:
        drawn = self.data.draw(rngs)
        return self.batch(drawn, rngs.rand(1) < self.config.data.text_dropout)

    def batch(self, drawn: Samples, dropped: Tensor | None = None) -> Batch:
        """Samples as an objective takes them; dropped: see embed_words."""
        return Batch(drawn.latents, Conditioning(self.embed_words(drawn, dropped)), controls=drawn.controls)

    def embed_words(self, drawn: Samples, dropped: Tensor | None = None) -> Tensor:
        """prompt_embeds [B, T, text_dim] of samples; those that are dropped, [B, 1], say the negative prompt.

        The host does not wait for the device.
        """
        none = self.negative_words
        if drawn.prompt_embeds is not None:
            embeds = drawn.prompt_embeds
            return embeds if dropped is None else torch.where(dropped[..., None], none.prompt_embeds, embeds)
        ids, mask = drawn.ids, drawn.mask
        if dropped is not None:
            ids, mask = torch.where(dropped, none.ids, ids), torch.where(dropped, none.mask, mask)
        return encode(self.text_encoder, ids, mask, longest=ids.shape[1])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, T, text_dim], with the text encoder as it is now, or from the cache."""
        words = self.source.words(prompts)
        if words.prompt_embeds is not None:
            return words.prompt_embeds
        return encode(self.text_encoder, words.ids, words.mask)

    # --- what a step takes ---

    @property
    def tokens_per_frame(self) -> int:
        stride = self.vae.spatial_stride
        return self.model_config.tokens_per_frame(self.config.height // stride, self.config.width // stride)

    def clip_flops(self, sizes: WanConfig, *, is_causal: bool, teacher_forcing: bool = False) -> float:
        """FLOPs of one pass over a training clip, under teacher forcing with its clean copy."""
        config, frames = self.config, self.config.num_training_frames
        tokens = frames * self.tokens_per_frame
        if not is_causal:
            return pass_flops(sizes, tokens)
        block, first = config.num_frame_per_block, config.independent_first_frame
        window, sink = config.model_kwargs.local_attn_size, config.model_kwargs.sink_size
        mask = BlockCausalMask(frames, 1, block, window, sink, first, teacher_forcing)
        seen = mask.frame_mask.sum(1).float().mean().item()
        return pass_flops(sizes, mask.num_tokens * self.tokens_per_frame, seen * self.tokens_per_frame)

    def learning_flops(self, forward: float) -> float:
        """Of a pass that learns: forward, twice that backward, and forward again where blocks are recomputed."""
        return forward * (4 if self.config.gradient_checkpointing else 3)

    def activation_bytes(self) -> int:
        """Of a pass over whole clips, clean ones beside them under teacher forcing."""
        config, tokens = self.config, self.config.num_training_frames * self.tokens_per_frame
        tokens *= config.batch_size * (2 if config.teacher_forcing else 1)
        return activation_bytes(self.model_config, tokens, checkpointing=config.gradient_checkpointing)

    # --- how it is judged and handed over ---

    def evaluate(self) -> dict[str, Tensor]:
        """Metrics of a recipe; here a contact sheet of samples in the run folder, and no number."""
        self.sample(self.run_dir / "samples" / f"step_{self.step:06d}.png")
        return {}

    def held_out(self, loss: Loss) -> dict[str, Tensor]:
        """A loss on held-out clips with fixed noise; nothing where no clips are held out."""
        if self.heldout_data is None:
            self.heldout_data = self.source.open_heldout(NUM_EVAL_SAMPLES)
            if self.heldout_data is None:
                return {}
            self.heldout_data.fill(0)
        batch_size, rngs = self.config.batch_size, Rngs(self.config.seed, EVAL_STEP, self.device)
        batches = [range(i, i + batch_size) for i in range(0, NUM_EVAL_SAMPLES, batch_size)]
        metrics: dict[str, Tensor] = {}
        for samples in batches:
            for name, value in self._held_out_pass(loss, SampleRngs(rngs, samples)).items():
                metrics[name] = metrics.get(name, 0) + value / len(batches)
        return metrics

    @torch.enable_grad()
    def _held_out_pass(self, loss: Loss, rngs: SampleRngs) -> dict[str, Tensor]:
        """Loss of one batch. In shape and with gradient as in training: what was compiled for that serves here too."""
        drawn = self.heldout_data.draw(rngs)
        with self.autocast():
            value, details = loss(self.batch(drawn), rngs)
        return {"loss": value.detach(), **details}

    @property
    def num_sample_frames(self) -> int:
        """Latents of a sample video."""
        return self.config.num_training_frames

    def sample(self, path: Path) -> None:
        """Videos and a contact sheet of the same prompts and seeds all through the run, with the inference pipeline."""
        config = self.config
        prompts = self.source.sample_prompts(NUM_SAMPLES)
        vae = WanVAEWrapper(str(self.folder), device=self.device)
        pipeline = assemble_pipeline(config, self.generator, self.embed, vae)
        drawings = None
        if self.pose_embedding is not None and self.sharding.mesh is None:
            pipeline.dwpose_embedding = self.pose_embedding
            drawings = self.source.sample_drawings(len(prompts))
        options = {} if drawings is None else {"dwpose_data": drawings}
        # Sampling has other shapes: compiling them costs more.
        with torch.compiler.set_stance("force_eager"), gathered(self.generator):
            videos = pipeline.inference(
                text_prompts=prompts,
                seeds=[config.seed + i for i in range(len(prompts))],
                num_frames=self.num_sample_frames,
                height=config.height,
                width=config.width,
                **options,
            )
        if self.ranks.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(path, list(videos), prompts)
            for number, video in enumerate(videos):
                write_video(path.with_name(f"{path.stem}_{number}.mp4"), video, config.fps)
            if self.tracker is not None:
                self.tracker.show(sorted(path.parent.glob(f"{path.stem}*")), self.step)

    def export(self, folder: Path) -> None:
        """The rest of the model folder, in bfloat16 and under Wan's names."""
        transformer = whole_state(self.generator.model, self.ranks)
        if not self.ranks.is_main:
            return
        if folder.resolve() != self.folder.resolve():
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        self.generator.model.save_pretrained(folder, torch.bfloat16, transformer)
        self.export_pose(folder)
        if self.config.train_text_encoder:
            save_umt5(self.text_encoder, folder / TEXT_ENCODER_FILES[-1], torch.bfloat16)
            return
        weights = find_model_file(text_encoder_home(self.config), TEXT_ENCODER_FILES)
        for file in (weights, weights.with_suffix(".json")):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)

    def export_pose(self, folder: Path) -> None:
        """The pose network that learned, in float32 as it runs; else the one that belongs to the model's pose_proj."""
        if self.pose_embedding is not None:
            tensors = {f"dwpose_embedding.{name}": t for name, t in self.pose_embedding.state_dict().items()}
            save_safetensors(tensors, folder / POSE_FILES[0], torch.float32)
        elif self.generator.model.config.pose_dim and (known := pose_file(self.config.model_name)) is not None:
            shutil.copyfile(known, folder / known.name)


def _model_config(model_name: str) -> WanConfig:
    return WAN_CONFIGS.get(model_name) or WanConfig.from_folder(find_model_folder(model_name))
