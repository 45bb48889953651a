"""model/control.py: what the network is shown of pose and image is what the walk of inference shows it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.base import Batch
from model.control import ControlledObjective, pose_tokens
from model.diffusion import CausalDiffusion
from pipeline.pose import DrivingPose
from pipeline.rollout import Path, denoise_path, plan_blocks, remember
from utils.conditioning import Conditioning
from utils.dataset import Controls
from utils.distributed import Rngs, SampleRngs
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WanConfig
from wan.modules.pose import DWPoseEmbedding, fold_pose_proj

SIZES = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=2, in_dim=2, out_dim=2, text_dim=4, text_len=2)
NUM_FRAMES, WIDTH = 8, 8
OPTIONS = {"num_frame_per_block": 2}


def make_network(**options) -> WanDiffusionWrapper:
    torch.manual_seed(0)
    network = WanDiffusionWrapper("", True, from_scratch=True, model_config=SIZES, **OPTIONS, **options)
    nn.init.normal_(network.model.head.head.weight, std=0.3)
    network.model.add_pose_proj(WIDTH)
    return network.requires_grad_(False)


def train_proj(network: WanDiffusionWrapper) -> None:
    nn.init.normal_(network.model.pose_proj.weight)
    nn.init.normal_(network.model.pose_proj.bias)


def make_batch() -> Batch:
    """Four samples: nothing, pose, image and pose (its own first frame), image and pose (a reference)."""
    torch.manual_seed(1)
    pictures = 1 + 4 * (NUM_FRAMES - 1)
    controls = Controls(
        drawings=torch.randint(0, 256, (3, pictures, 3, 32, 32), dtype=torch.uint8),
        posed=torch.tensor([1, 2, 3]),
        plain=torch.tensor([0, 1]),
        imaged=torch.tensor([2, 3]),
        references=torch.randn(2, 1, 2, 4, 4),
        reference_drawings=torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8),
        reference_posed=torch.tensor([True, True]),
        first_frame=torch.tensor([True, False]),
    )
    return Batch(torch.randn(4, NUM_FRAMES, 2, 4, 4), Conditioning(torch.randn(4, 2, 4)), controls=controls)


class Listener(nn.Module):
    """Passes on to a network and keeps what it was shown and what it said."""

    def __init__(self, network: WanDiffusionWrapper):
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, x_t: Tensor, conditioning: Conditioning, t: Tensor, **options):
        flow, x0 = self.network(x_t, conditioning, t, **options)
        self.calls.append((x_t, conditioning, t, options, flow))
        return flow, x0


def make_objective(network: nn.Module, scheduler, **options) -> ControlledObjective:
    torch.manual_seed(2)
    embedding = DWPoseEmbedding(WIDTH).init_weights()
    nn.init.normal_(embedding[-1].bias)
    plain, imaged = (
        CausalDiffusion(network, scheduler, image_first=first, **OPTIONS, **options) for first in (False, True)
    )
    return ControlledObjective(embedding, plain, imaged)


def draws(count: int = 4) -> SampleRngs:
    return SampleRngs(Rngs(0, 0, torch.device("cpu")), range(count))


def test_a_new_pose_proj_changes_nothing():
    """Step 0 of samples without an image is that of the model without pose, to the bit."""
    network = make_network()
    batch, listener = make_batch(), Listener(network)
    make_objective(listener, network.scheduler).loss(batch, draws())
    assert [call[0].shape[:2] for call in listener.calls] == [(2, 8), (2, 7)]  # plain; image and three blocks
    x_t, conditioning, t, options, flow = listener.calls[0]
    assert conditioning.pose[0].abs().sum() == 0 and conditioning.pose[1].abs().sum() > 0
    without, _ = network(x_t, Conditioning(conditioning.prompt_embeds), t, **options)
    assert torch.equal(flow, without)


def test_a_sample_without_a_pose_sees_none_whatever_pose_proj_has_learned():
    network = make_network()
    train_proj(network)
    listener = Listener(network)
    make_objective(listener, network.scheduler).loss(make_batch(), draws())
    x_t, conditioning, t, options, flow = listener.calls[0]
    without, _ = network(x_t, Conditioning(conditioning.prompt_embeds), t, **options)
    assert torch.equal(flow[0], without[0])
    assert (flow[1] - without[1]).abs().max() > 1e-2


PLACES = ["nothing", "pose", "first frame and pose", "reference and pose"]


@pytest.mark.parametrize("place", range(4), ids=PLACES)
@torch.no_grad()
def test_training_walk_is_inference_walk(place: int):
    """A block of the masked clip says what the stream says after remembering the same clean blocks."""
    is_imaged, is_reference = place > 1, place == 3
    network, stream = make_network(local_attn_size=5), make_network(local_attn_size=5, sink_size=int(is_imaged))
    train_proj(network)
    stream.load_state_dict(network.state_dict())
    batch, listener = make_batch(), Listener(network)
    objective = make_objective(listener, network.scheduler)
    objective.loss(batch, draws())
    x_t, conditioning, t, options, flow = listener.calls[place // 2]
    row = slice(place % 2, place % 2 + 1)
    x_t, t, clean, flow = x_t[row], t[row], options["clean_x"][row], flow[row]

    embedding, controls = objective.pose_embedding, batch.controls
    pose = None
    if place:
        hidden = None
        if is_reference:
            hidden = embedding.features(controls.reference_drawings[1:].transpose(1, 2) / 255)
        pose = DrivingPose(
            embedding,
            fold_pose_proj(embedding, stream.model.pose_proj),
            controls.drawings[place - 1 : place],
            (1, 32, 32),
            num_frames=1 + 4 * (NUM_FRAMES - 1),
            num_hidden=int(is_reference),
            hidden=hidden,
        )
    embeds = conditioning.prompt_embeds[row]
    path = Path(Conditioning(embeds, pose=pose), stream.model.make_kv_cache(1, 4, 4, x_t.shape[1]))
    for block in plan_blocks(x_t.shape[1], 2, False, int(is_imaged)):
        frames = slice(block.start, block.stop)
        if not block.given:
            ours, _ = denoise_path(stream, path, block, x_t[:, frames], t[0, block.start])
            torch.testing.assert_close(ours, flow[:, frames], atol=1e-4, rtol=1e-4)
        remember(stream, [path], block, clean[:, frames])
        path.kv_cache.commit(block.num_frames)


def test_what_an_image_is():
    network = make_network()
    train_proj(network)
    batch, listener = make_batch(), Listener(network)
    objective = make_objective(listener, network.scheduler, noise_augmentation_max_timestep=500)
    batch = replace(batch, controls=replace(batch.controls, plain=torch.tensor([]).long()))
    loss, details = objective.loss(batch, draws())
    options = listener.calls[0][3]
    x0, references = batch.clean_latent, batch.controls.references
    assert torch.equal(options["clean_x"][0, 0], x0[2, 0])  # its own first frame, clean whatever the context is
    assert torch.equal(options["clean_x"][1, 0], references[1, 0])
    assert not options["aug_t"][:, 0].any() and options["aug_t"][:, 1:].any()
    quiet = make_objective(Listener(network), network.scheduler)
    part = quiet.part(batch, batch.controls.imaged, pose_tokens(quiet.pose_embedding, batch)[2:])
    assert torch.equal(quiet.with_image(part, batch.controls).clean_latent[1, 1:], x0[3, :6])
    assert loss > 0 and details["loss_imaged_posed"] > 0 and details["loss_imaged_unposed"] == 0


def test_the_image_itself_is_not_learned():
    network = make_network()
    network.model.head.head.weight.requires_grad_(True)
    objective = CausalDiffusion(network, network.scheduler, image_first=True, **OPTIONS)
    error, weight, t = objective.errors(Batch(torch.randn(2, 7, 2, 4, 4), Conditioning(torch.randn(2, 2, 4))), draws(2))
    assert error.shape == weight.shape == t.shape == (2, 6)


def test_references_of_unposed_clips_may_hide_their_skeleton():
    objective = make_objective(Listener(make_network()), None)
    batch = make_batch()
    controls = replace(batch.controls, reference_posed=torch.tensor([True, False]))
    part = objective.part(batch, controls.imaged, pose_tokens(objective.pose_embedding, batch)[controls.imaged])
    pose = objective.with_image(part, controls).conditioning.pose
    assert not pose[1, :, 0].any() and pose[1, :, 1:].any() and pose[0, :, 0].any()


def test_pose_networks_and_pose_proj_learn():
    network = make_network()
    train_proj(network)
    network.model.pose_proj.requires_grad_(True)
    objective = make_objective(network, network.scheduler)
    objective.loss(make_batch(), draws())[0].backward()
    grads = [p.grad for p in (*objective.pose_embedding.parameters(), *network.model.pose_proj.parameters())]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def moving_discs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Discs that move straight: drawings uint8 [n, 5, 3, 32, 32], and latents [n, 2, 1, 4, 4] of where they are."""
    start = 8 + 16 * torch.rand(count, 1, 2, generator=generator)
    at = start + torch.randn(count, 1, 2, generator=generator) * torch.arange(5)[:, None]
    grid = torch.arange(32) + 0.5
    far = (grid[:, None] - at[..., 1, None, None]) ** 2 + (grid - at[..., 0, None, None]) ** 2
    disc = (far < 36).float()
    latents = 3 * F.avg_pool2d(disc[:, ::4], 8)[:, :, None]
    return (255 * disc).to(torch.uint8)[:, :, None].expand(-1, -1, 3, -1, -1), latents - latents.mean()


def test_a_pose_is_soon_followed():
    """What moves is only to be known from the drawings: samples that have them leave the others behind."""
    torch.manual_seed(0)
    sizes = replace(SIZES, dim=32, ffn_dim=64, in_dim=1, out_dim=1)
    network = WanDiffusionWrapper("", True, from_scratch=True, model_config=sizes, num_frame_per_block=1)
    network.model.add_pose_proj(16)
    embedding = DWPoseEmbedding(16).init_weights()
    plain, imaged = (
        CausalDiffusion(network, network.scheduler, num_frame_per_block=1, image_first=first) for first in (False, True)
    )
    objective, none = ControlledObjective(embedding, plain, imaged), torch.tensor([], dtype=torch.int64)
    optimizer = torch.optim.AdamW([*network.parameters(), *embedding.parameters()], lr=5e-3, betas=(0.9, 0.98))
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(30):
        drawings, latents = moving_discs(12, generator)
        nobody = (latents[:0, :1], drawings[:0, :1], none.bool(), none.bool())
        controls = Controls(drawings[6:], torch.arange(6, 12), torch.arange(12), none, *nobody)
        batch = Batch(latents, Conditioning(torch.zeros(12, 2, 4)), controls=controls)
        loss, details = objective.loss(batch, SampleRngs(Rngs(0, step, torch.device("cpu")), range(12)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append([float(details[f"loss_plain_{name}"]) for name in ("posed", "unposed")])
    posed, unposed = torch.tensor(losses[-8:]).mean(0)
    assert posed < 0.5 * unposed
