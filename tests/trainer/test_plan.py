"""trainer/plan.py: bytes as they lie, FLOPs as torch counts them."""

import logging
from pathlib import Path

import pytest
import torch

from tests.trainer.toy import SIZES, make, make_student
from trainer.consistency import ConsistencyTrainer
from trainer.diffusion import DiffusionTrainer
from trainer.gan import GANTrainer
from trainer.ode import ODETrainer
from trainer.plan import TrainingPlan, activation_bytes
from utils.flops import pass_flops
from wan.configs import WAN_CONFIGS
from wan.modules.attention import attention
from wan.modules.model import WanAttentionBlock


def test_flops_of_a_diffusion_step(tmp_path: Path, vae_folder: Path, toy_sizes):
    """6 frames in blocks of 3: under teacher forcing clean and noisy blocks alike see 3, then 6 frames."""
    per_frame = 4  # 32 x 32 pixels, a VAE of stride 8, patches of 2 x 2
    options = {
        "teacher_forcing=true": pass_flops(SIZES, 12 * per_frame, 4.5 * per_frame),
        "teacher_forcing=false": pass_flops(SIZES, 6 * per_frame, 4.5 * per_frame),
    }
    for number, (setting, forward) in enumerate(options.items()):
        folder = tmp_path / str(number)
        trainer = make(DiffusionTrainer, folder, vae_folder, setting, "total_batch_size=4")
        assert trainer.step_flops() == pytest.approx(forward * 3 * 4)
        trainer.config.gradient_checkpointing = True
        assert trainer.step_flops() == pytest.approx(forward * 4 * 4)
    trainer = make(DiffusionTrainer, tmp_path / "whole", vae_folder, "causal=false", "teacher_forcing=false")
    assert trainer.step_flops() == pytest.approx(pass_flops(SIZES, 6 * per_frame) * 3 * 2)


def test_flops_of_few_step_recipes(tmp_path: Path, folders, pairs):
    """Per clip: a student's pass with its backward, and its helpers' passes."""
    samples, noisy, beside = 2, pass_flops(SIZES, 24, 18), pass_flops(SIZES, 48, 18)
    ode = make_student(ODETrainer, tmp_path, folders, "data.kind=ode_pairs", f"data.path={pairs[0]}")
    assert ode.step_flops() == pytest.approx(samples * 3 * beside)
    ode.config.teacher_forcing = False
    assert ode.step_flops() == pytest.approx(samples * 3 * noisy)
    consistency = make_student(ConsistencyTrainer, tmp_path, folders, f"distillation.real_name={folders[0]}")
    assert consistency.step_flops() == pytest.approx(samples * (3 + 1 + 2) * beside)
    consistency = make_student(ConsistencyTrainer, tmp_path, folders, "consistency.causal_teacher=false")
    assert consistency.step_flops() == pytest.approx(samples * (4 * beside + 2 * pass_flops(SIZES, 24)))


def test_flops_of_a_gan_step(tmp_path: Path, folders):
    gan = make_student(GANTrainer, tmp_path, folders, "gan.relativistic=false")
    plain, judgement = gan.step_flops(), pass_flops(SIZES, 24)
    gan.config.gan.r1_weight = 1.0
    assert gan.step_flops() - plain == pytest.approx(2 * 3 * judgement)  # two samples, forward and backward
    gan.config.gan.relativistic = True
    assert gan.step_flops() - plain == pytest.approx(2 * (3 + 1 / 2) * judgement)  # the student's turn in every second
    gan.config.num_training_frames = 42
    assert gan.step_flops() is None


def test_the_plan_tells_parts_and_time(tmp_path: Path, vae_folder: Path, toy_sizes, caplog):
    caplog.set_level(logging.INFO)
    trainer = make(DiffusionTrainer, tmp_path, vae_folder, "max_steps=1")
    trainer.train(visualize=False)
    parameters = sum(p.numel() for p in trainer.players[0].module.parameters())
    size = f"{4 * parameters / 1e6:.2f} MB"
    moments = f"{8 * parameters / 1e6:.2f} MB"
    expected = f"memory per GPU: student weights {size}, student gradients {size}, student moments {moments}"
    assert f"{expected}, student average {size}, frozen networks" in caplog.text
    assert "TFLOP per step and GPU" in caplog.text
    assert "s/step on one H100 at 40% of its 989 TFLOP/s" in caplog.text


def test_what_does_not_fit_is_told_with_the_way_out():
    plan = TrainingPlan({"student weights": int(90e9)}, flops=None, gpu="H100", capacity=int(80e9))
    assert not plan.fits
    assert "more than the 80.00 GB of this GPU: shard over more" in plan.lines()[1]
    assert plan.lines()[-1] == "time: the FLOPs of this recipe are not counted"


def test_activations_are_those_that_autograd_keeps():
    sizes = WAN_CONFIGS["puppet-tiny"]
    tokens, kept = 512, {}
    block = WanAttentionBlock(sizes)
    own = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    x = torch.randn(1, tokens, sizes.dim, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(1, 24, sizes.dim, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        block(x, torch.randn(1, 4, 6, sizes.dim), 0, lambda _, q, k, v: attention(q, k, v), text, None, "auto")
    found = sum(size for place, (size, _) in kept.items() if place not in own)
    planned = activation_bytes(sizes, tokens, checkpointing=False) / sizes.num_layers
    assert planned == pytest.approx(found, rel=0.25)
    assert activation_bytes(sizes, tokens, checkpointing=True) < activation_bytes(sizes, tokens, checkpointing=False)
