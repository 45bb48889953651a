"""Recipes of the one loop in `trainer/base.py`: which networks, which data, which objective."""

from trainer.base import Trainer
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.text import TextTrainer
from trainer.vae import VAETrainer

TRAINERS: dict[str, type[Trainer]] = {
    "vae": VAETrainer,
    "text": TextTrainer,
    "diffusion": DiffusionTrainer,
    "score_distillation": ScoreDistillationTrainer,
}
