"""A transformer of a few thousand numbers and the settings that train it in a second."""

from pathlib import Path

import torch
from torch import Tensor

from trainer.base import Trainer
from utils.config import load_config
from utils.dataset import Samples, TrainingData
from utils.distributed import Ranks, SampleRngs
from utils.tracking import Tracker
from utils.training_state import load_training_state
from wan.configs import WanConfig

ALONE = Ranks(torch.device("cpu"))
SIZES = WanConfig(
    dim=16, ffn_dim=32, num_heads=1, num_layers=2, in_dim=4, out_dim=4, freq_dim=16, text_dim=16, text_len=24
)
TOY = [
    "model_name=toy", "from_scratch=true", "train_text_encoder=true",
    "sharding_strategy=no_shard", "height=32", "width=32", "num_training_frames=6", "model_kwargs.local_attn_size=6",
    "text_encoder.d_model=16", "text_encoder.num_layers=1", "text_encoder.num_heads=2", "text_encoder.d_kv=8",
    "text_encoder.d_ff=16", "data.pool_size=8", "data.min_fill=4", "data.refresh_per_step=2",
    "data.encode_batch_size=2", "batch_size=2", "optimizer.warmup_steps=1", "optimizer.schedule=constant",
    "logging.log_iters=1", "sampling_steps=2", "noise_augmentation_max_timestep=100", "ema.weight=0.5",
]  # fmt: skip
FEW_STEPS = ["from_scratch=false", "train_text_encoder=false", "denoising_step_list=[1000,500]"]
FEW_STEPS += ["distillation.dfake_gen_update_ratio=2", "optimizer.lr=1e-3", "data.min_fill=2", "max_steps=3"]


def make(trainer: type[Trainer], folder: Path, vae_folder: Path, *overrides: str, ranks: Ranks = ALONE) -> Trainer:
    """A trainer of a fresh toy model on latents of the toy VAE."""
    settings = [*TOY, f"trainer={trainer.name}", f"data.vae_folder={vae_folder}", *overrides]
    return trainer(load_config(overrides=settings), ranks, folder, Tracker(folder) if ranks.is_main else None)


def make_student(
    trainer: type[Trainer], folder: Path, folders: tuple[Path, Path], *overrides: str, ranks: Ranks = ALONE
) -> Trainer:
    """A trainer of a few-step student. folders: the causal model it starts from, and its bidirectional teacher."""
    causal, teacher = folders
    names = [f"model_name={causal}", f"distillation.real_name={teacher}"]
    return make(trainer, folder, causal, *FEW_STEPS, *names, *overrides, ranks=ranks)


class DrawnData(TrainingData):
    """Latents and words that are a function of the sample, whoever draws it.

    states: of a trajectory in front of each clip; none for plain clips.
    """

    def __init__(self, *states: int):
        self.states = states

    def draw(self, rngs: SampleRngs) -> Samples:
        ids = (100 * rngs.rand(SIZES.text_len)).long()
        return Samples(ids, torch.ones_like(ids), latents=rngs.randn(*self.states, 6, 4, 4, 4))


def state(folder: Path) -> dict[str, Tensor]:
    """What a run saved, by name."""
    return load_training_state(folder).tensors


def small_tokenizer(folder: Path, max_length: int) -> int:
    from world.tokenizer import train_tokenizer

    return train_tokenizer(folder, num_sentences=500, max_length=max_length)
