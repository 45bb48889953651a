"""Recipes of the one loop in `trainer/base.py`: which networks, which data, which objective."""

from trainer.base import Trainer
from trainer.consistency import ConsistencyTrainer
from trainer.diffusion import DiffusionTrainer
from trainer.distillation import ScoreDistillationTrainer
from trainer.gan import GANTrainer
from trainer.ode import ODETrainer
from trainer.text import TextTrainer
from trainer.tiny_vae import TinyVAETrainer
from trainer.vae import VAETrainer

TRAINERS: dict[str, type[Trainer]] = {
    "vae": VAETrainer,
    "tiny_vae": TinyVAETrainer,
    "text": TextTrainer,
    "diffusion": DiffusionTrainer,
    "ode": ODETrainer,
    "consistency": ConsistencyTrainer,
    "score_distillation": ScoreDistillationTrainer,
    "gan": GANTrainer,
}
