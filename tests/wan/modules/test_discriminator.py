"""The GAN's judge: published logits and gradients, published names, taps that change nothing."""

import gzip
import json

import pytest
import torch
import torch.nn.functional as F

from tests.golden_data import FOLDER, below, load_golden, wan_config
from utils.conditioning import Conditioning
from utils.wan_wrapper import WanDiffusionWrapper
from wan.configs import WAN_CONFIGS, WanConfig
from wan.modules.discriminator import DiscriminatorHead, tap_layers
from wan.modules.model import WanModel
from wan.modules.weights import assign_weights

TINY = WanConfig(dim=16, ffn_dim=32, num_heads=2, num_layers=3, in_dim=4, out_dim=4, text_dim=8, text_len=4)


def random_network(config: WanConfig = TINY) -> WanModel:
    torch.manual_seed(0)
    model = WanModel(config)
    for parameter in model.parameters():  # a fresh head is zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_golden_logits_losses_and_gradients():
    """Weights are rounded to 15 bits after the point, which moves the flow by 1e-4. The reference judges at t 829 and
    noises with the nearest sigma of its table: that one is injected."""
    golden, config = load_golden("i_gan")
    score = WanDiffusionWrapper("", False, from_scratch=True, model_config=wan_config(config), timestep_shift=5.0)
    assign_weights(score.model, below(golden, "w.model"), "golden")
    head = DiscriminatorHead(wan_config(config), ffn_dim=24, concat_time_embeddings=True)
    assign_weights(head, {name[2:]: t for name, t in golden.items() if name.startswith("w._")}, "golden")

    t = golden["timestep"].float()
    table = score.scheduler.warp(torch.linspace(1000, 0, 1001)[:-1])
    snapped = table[(table - t.reshape(-1, 1)).abs().argmin(1)].reshape(t.shape)
    clips = [score.scheduler.add_noise(golden[name], golden["critic_noise"], snapped) for name in ("fake", "real")]
    conditioning = Conditioning(golden["prompt_embeds"].expand(2, -1, -1))
    flow, _, features = score(torch.cat(clips), conditioning, t.expand(2, -1), taps=tap_layers(30))
    torch.testing.assert_close(flow, golden["flow_pred"], atol=2e-4, rtol=1e-4)
    logits = head(features)
    torch.testing.assert_close(logits, golden["logit"], atol=1e-5, rtol=1e-5)

    fake, real = logits.chunk(2)
    loss = F.softplus(fake).mean() + F.softplus(-real).mean()
    torch.testing.assert_close(loss, golden["D_loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.softplus(-(real - fake)).mean(), golden["D_loss_relativistic"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(F.softplus(-fake).mean(), golden["G_loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    parameters = dict(head.named_parameters()) | {f"model.{name}": p for name, p in score.model.named_parameters()}
    for name, expected in below(golden, "grad").items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(parameters[name].grad, expected, atol=1e-4 * scale, rtol=1e-4, msg=name)


def test_names_and_shapes_are_the_published_ones():
    with gzip.open(FOLDER / "manifests" / "self_forcing_gan_branch.json.gz", "rt", encoding="utf-8") as file:
        published = json.load(file)
    with torch.device("meta"):
        head = DiscriminatorHead(WAN_CONFIGS["Wan2.1-T2V-1.3B"])
    assert {name: list(tensor.shape) for name, tensor in head.state_dict().items()} == published


def test_taps_lie_at_the_same_depth_of_every_network():
    assert tap_layers(30) == (13, 21, 29)
    assert tap_layers(40) == (18, 28, 39)
    assert tap_layers(10) == (4, 6, 9)
    assert tap_layers(1) == (0, 0, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_taps_are_the_tokens_after_their_blocks_and_change_nothing(checkpointing: bool):
    model = random_network()
    model.gradient_checkpointing = checkpointing
    x, t, context = torch.randn(2, 4, 2, 4, 4), torch.tensor([300.0, 700.0]), torch.randn(2, 4, 8)
    plain = model(x, t, context)
    seen = []
    hooks = [block.register_forward_hook(lambda module, inputs, out: seen.append(out)) for block in model.blocks]
    flow, features = model(x, t, context, taps=(0, 2, 2))
    for hook in hooks:
        hook.remove()
    assert torch.equal(flow, plain)
    assert len(features.tokens) == 3
    assert all(torch.equal(ours, seen[layer]) for ours, layer in zip(features.tokens, (0, 2, 2), strict=True))
    assert features.time.shape == (2, 2, 16)


def test_checkpointing_is_neutral_for_a_judgement():
    gradients = []
    for checkpointing in (False, True):
        model = random_network()
        model.gradient_checkpointing = checkpointing
        torch.manual_seed(1)
        head = DiscriminatorHead(TINY)
        torch.nn.init.normal_(head._cls_pred_branch[-1].weight)
        x = torch.randn(2, 4, 2, 4, 4, requires_grad=True)
        _, features = model(x, torch.tensor([300.0, 700.0]), torch.randn(2, 4, 8), taps=tap_layers(3))
        head(features).sum().backward()
        gradients.append([x.grad, *(p.grad for p in head.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0])


def test_a_new_judge_is_undecided_and_every_weight_can_learn():
    model, head = random_network(), DiscriminatorHead(TINY, num_class=2, concat_time_embeddings=True)
    arguments = (torch.randn(2, 4, 2, 4, 4), torch.tensor([300.0, 700.0]), torch.randn(2, 4, 8))
    _, features = model(*arguments, taps=tap_layers(3))
    assert torch.equal(head(features), torch.zeros(2, 2))
    torch.nn.init.normal_(head._cls_pred_branch[-1].weight)
    head(features).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert model.blocks[0].ffn[0].weight.grad.abs().sum() > 0


def test_the_noise_level_reaches_the_head_only_when_it_is_told():
    _, features = random_network()(torch.randn(1, 4, 2, 4, 4), torch.tensor([300.0]), torch.randn(1, 4, 8), taps=(0, 1))
    for told in (False, True):
        head = DiscriminatorHead(TINY, num_taps=2, concat_time_embeddings=told)
        torch.nn.init.normal_(head._cls_pred_branch[-1].weight)
        same = torch.equal(head(features), head(features._replace(time=features.time + 1)))
        assert same is not told
