"""What recipes on latents share: model folder, generator, text encoder, VAE, data, samples and the export."""

import logging
import shutil
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from model.base import Batch, Loss, Player
from pipeline.build import assemble_pipeline, generator_options
from trainer.base import Trainer
from utils.checkpoint import load_generator
from utils.conditioning import Conditioning
from utils.config import ConfigError
from utils.dataset import Samples, TrainingData
from utils.distributed import Rngs, SampleRngs, barrier
from utils.puppet_latents import PuppetLatents
from utils.sharding import whole_state
from utils.training_state import has_training_state
from utils.video import contact_sheet
from utils.wan_wrapper import WanDiffusionWrapper, WanVAEWrapper
from wan.configs import (
    TEXT_ENCODER_FILES,
    TOKENIZER_FOLDERS,
    VAE_FILES,
    WAN_CONFIGS,
    WanConfig,
    find_model_file,
    find_model_folder,
)
from wan.modules.text_encoder import TextTokenizer, encode, load_umt5, new_umt5, save_umt5
from wan.modules.vae import load_vae
from world.captions import captions
from world.puppet import sample_scenes
from world.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

NUM_SAMPLES = 4  # videos on the contact sheet
SAMPLE_SCENES_FROM = 32  # their first held-out scene
NUM_EVAL_SAMPLES = 16  # held-out clips that the loss is measured on, rounded up to whole batches
EVAL_STEP = 2**40  # the held-out loss draws its noise as this step: no training step ever


class LatentTrainer(Trainer):
    """A recipe whose student paints latents from words; it says its players, and by that its objective.

    The run folder's `export/` is a model folder from the first step on: sizes, VAE and tokenizer are known; the
    transformer and, if it learns too, the text encoder join at the end.
    """

    can_shard = True

    def build(self) -> list[Player]:
        config = self.config
        self.model_config = _model_config(config.model_name)
        self.folder = self.run_dir / "export"
        if self.ranks.is_main:
            self.begin_folder()
        barrier(self.ranks)
        self.generator = self.build_generator()
        self.tokenizer = TextTokenizer(find_model_file(self.folder, TOKENIZER_FOLDERS), self.model_config.text_len)
        self.text_encoder = self.build_text_encoder()
        self.negative_tokens = self.tokenize([config.negative_prompt])
        vae = find_model_file(self.folder, VAE_FILES)
        self.latent_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.vae = load_vae(vae, device=self.device, dtype=self.latent_dtype)
        self.data = self.build_data("train", self.ranks.rank, config.data.pool_size, config.data.min_fill)
        self.eval_data: TrainingData | None = None
        return self.make_players()

    @abstractmethod
    def make_players(self) -> list[Player]:
        """Who learns, once generator, text encoder, VAE and data are there."""

    def student(self, loss: Loss) -> Player:
        """The player that is exported: the generator, and the text encoder if it learns too."""
        learners = {"generator": self.generator}
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
        return self.build_network(
            config.model_name,
            self.starting_point,
            use_ema=config.use_ema,
            from_scratch=config.from_scratch,
            **generator_options(config),
        )

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
        if config.compile:
            network.model.compile_blocks()
        return network

    def build_text_encoder(self) -> nn.Module:
        config, sizes = self.config, self.config.text_encoder
        if not config.from_scratch or config.data.text_encoder_folder:
            weights = find_model_file(self.text_encoder_home(), TEXT_ENCODER_FILES)
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

    def text_encoder_home(self) -> Path:
        """The folder whose text encoder this run starts from."""
        config = self.config
        if config.from_scratch and config.data.text_encoder_folder:
            return Path(config.data.text_encoder_folder)
        return find_model_folder(config.model_name)

    def build_data(self, split: str, rank: int, pool_size: int, min_fill: int) -> TrainingData:
        config = self.config
        if config.height != config.width:
            raise ConfigError(f"puppet clips are square; height is {config.height} and width {config.width}")
        return PuppetLatents(
            lambda pixels: self.vae.encode(pixels.transpose(1, 2).to(self.latent_dtype)).transpose(1, 2),
            self.tokenizer,
            seed=config.seed,
            rank=rank,
            num_latent_frames=config.num_training_frames,
            size=config.height,
            pool_size=pool_size,
            min_fill=min_fill,
            refresh_per_step=config.data.refresh_per_step,
            chunk_size=config.data.encode_batch_size,
            device=self.device,
            dtype=self.latent_dtype,
            split=split,
        )

    # --- a step ---

    def start(self) -> None:
        self.data.fill(self.step, whole=not self.config.checkpoint.compact)

    def after_step(self) -> None:
        self.data.advance(self.step)

    def prepare(self, rngs: SampleRngs) -> Batch:
        drawn = self.data.draw(rngs)
        dropped = rngs.rand(1) < self.config.data.text_dropout
        pairs = zip(self.negative_tokens, (drawn.ids, drawn.mask), strict=True)
        ids, mask = (torch.where(dropped, none, some) for none, some in pairs)
        return Batch(drawn.latents, Conditioning(self.embed_words(Samples(ids, mask))))

    def embed_words(self, drawn: Samples) -> Tensor:
        """[B, T, text_dim] of a batch; the host does not wait for the device."""
        if drawn.prompt_embeds is not None:
            return drawn.prompt_embeds
        return encode(self.text_encoder, drawn.ids, drawn.mask, longest=drawn.ids.shape[1])

    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> [B, T, text_dim], with the text encoder as it is now."""
        return encode(self.text_encoder, *self.tokenize(prompts))

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, int64 [B, T] each, on the device."""
        ids, mask = self.tokenizer(list(prompts))
        return ids.to(self.device), mask.to(self.device)

    # --- how it is judged and handed over ---

    def evaluate(self) -> dict[str, Tensor]:
        """Metrics of a recipe; here a contact sheet of samples in the run folder, and no number."""
        self.sample(self.run_dir / "samples" / f"step_{self.step:06d}.png")
        return {}

    def held_out(self, loss: Loss) -> dict[str, Tensor]:
        """A loss on held-out puppets with fixed noise."""
        batch_size, chunk = self.config.batch_size, self.config.data.encode_batch_size
        if self.eval_data is None:
            wanted = -(-NUM_EVAL_SAMPLES // chunk) * chunk
            self.eval_data = self.build_data("heldout", 0, wanted, wanted)
            self.eval_data.fill(0)
        rngs = Rngs(self.config.seed, EVAL_STEP, self.device)
        batches = [range(i, i + batch_size) for i in range(0, NUM_EVAL_SAMPLES, batch_size)]
        metrics: dict[str, Tensor] = {}
        for samples in batches:
            for name, value in self._held_out_pass(loss, SampleRngs(rngs, samples)).items():
                metrics[name] = metrics.get(name, 0) + value / len(batches)
        return metrics

    @torch.enable_grad()
    def _held_out_pass(self, loss: Loss, rngs: SampleRngs) -> dict[str, Tensor]:
        """Loss of one batch. In shape and with gradient as in training: what was compiled for that serves here too."""
        drawn = self.eval_data.draw(rngs)
        with self.autocast():
            prompt_embeds = encode(self.text_encoder, drawn.ids, drawn.mask)
            value, details = loss(Batch(drawn.latents, Conditioning(prompt_embeds)), rngs)
        return {"loss": value.detach(), **details}

    @property
    def num_sample_frames(self) -> int:
        """Latents of a sample video."""
        return self.config.num_training_frames

    def sample(self, path: Path) -> None:
        """A contact sheet of held-out prompts, with the inference pipeline."""
        config = self.config
        scenes = sample_scenes(NUM_SAMPLES, config.seed, "heldout", start=SAMPLE_SCENES_FROM)
        prompts = captions(scenes, config.seed, full=True)
        vae = WanVAEWrapper(str(self.folder), device=self.device)
        pipeline = assemble_pipeline(config, self.generator, self.embed, vae)
        with torch.compiler.set_stance("force_eager"):  # sampling has other shapes: compiling them costs more
            videos = pipeline.inference(
                text_prompts=prompts,
                seeds=[config.seed + i for i in range(NUM_SAMPLES)],
                num_frames=self.num_sample_frames,
                height=config.height,
                width=config.width,
            )
        if self.ranks.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            contact_sheet(path, list(videos), prompts)

    def export(self, folder: Path) -> None:
        """The rest of the model folder, in bfloat16 and under Wan's names."""
        transformer = whole_state(self.generator.model, self.ranks)
        if not self.ranks.is_main:
            return
        if folder.resolve() != self.folder.resolve():
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        self.generator.model.save_pretrained(folder, torch.bfloat16, transformer)
        if self.config.train_text_encoder:
            save_umt5(self.text_encoder, folder / TEXT_ENCODER_FILES[-1], torch.bfloat16)
            return
        weights = find_model_file(self.text_encoder_home(), TEXT_ENCODER_FILES)
        for file in (weights, weights.with_suffix(".json")):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _model_config(model_name: str) -> WanConfig:
    return WAN_CONFIGS.get(model_name) or WanConfig.from_folder(find_model_folder(model_name))
