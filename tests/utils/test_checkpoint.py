"""utils/checkpoint.py: published names in, the same weights out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.checkpoint import load_generator


class Wrapper(nn.Module):
    """As WanDiffusionWrapper: its network is `.model`."""

    def __init__(self, width: int = 2):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(width, 3), nn.Linear(3, width))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    """What a file holds: names of the bare network."""
    return {name: torch.randn_like(t) for name, t in Wrapper().model.state_dict().items()}


def assert_loaded(module: nn.Module, weights: dict[str, Tensor]) -> None:
    own = {name.removeprefix("model."): t for name, t in module.state_dict().items()}
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: f"model.{name}",
        lambda name: f"model._fsdp_wrapped_module.{name}",
        lambda name: f"model._orig_mod.{name.replace('.', '._checkpoint_wrapped_module.', 1)}",
    ],
    ids=["bare", "model", "fsdp", "compiled+checkpointed"],
)
@pytest.mark.parametrize("nesting", [None, "generator", "model"])
@pytest.mark.parametrize("module", [Wrapper, lambda: Wrapper().model], ids=["wrapper", "network"])
def test_every_published_form_loads(rename, nesting, module, weights, tmp_path: Path):
    renamed = {rename(name): tensor for name, tensor in weights.items()}
    torch.save({nesting: renamed, "critic": {}} if nesting else renamed, tmp_path / "model.pt")
    target = module()
    load_generator(target, tmp_path / "model.pt")
    assert_loaded(target, weights)

    flat = {f"{nesting}.{name}" if nesting else name: t for name, t in renamed.items()}
    save_file(flat, tmp_path / "model.safetensors")
    target = module()
    load_generator(target, tmp_path / "model.safetensors")
    assert_loaded(target, weights)


def test_use_ema_takes_the_average(weights, tmp_path: Path):
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"generator": other, "generator_ema": weights}, tmp_path / "model.pt")
    wrapper = Wrapper()
    load_generator(wrapper, tmp_path / "model.pt", use_ema=True)
    assert_loaded(wrapper, weights)
    load_generator(wrapper, tmp_path / "model.pt")
    assert_loaded(wrapper, other)


def test_meta_modules_become_real(weights, tmp_path: Path):
    torch.save(weights, tmp_path / "model.pt")
    with torch.device("meta"):
        wrapper = Wrapper()
    load_generator(wrapper, tmp_path / "model.pt", device="cpu", dtype=torch.bfloat16)
    assert_loaded(wrapper, {name: tensor.bfloat16() for name, tensor in weights.items()})


def test_mistakes_are_told_with_the_way_out(weights, tmp_path: Path):
    wrapper = Wrapper()
    with pytest.raises(FileNotFoundError) as caught:
        load_generator(wrapper, "checkpoints/self_forcing_dmd.pt")
    line = "hf download gdhe17/Self-Forcing checkpoints/self_forcing_dmd.pt --local-dir ."
    assert str(caught.value).endswith(line)
    with pytest.raises(FileNotFoundError, match=r"\.pt or \.safetensors"):
        load_generator(wrapper, tmp_path / "none.pt")

    torch.save(weights, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="no generator_ema .*leave out use_ema"):
        load_generator(wrapper, tmp_path / "bare.pt", use_ema=True)
    torch.save({"generator_ema": weights}, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match="no generator; set use_ema"):
        load_generator(wrapper, tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"does not fit.*0\.weight has \[3, 2\] instead of \[3, 5\]"):
        load_generator(Wrapper(5), tmp_path / "bare.pt")
    weights["extra.bias"] = weights.pop("0.bias")
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"missing 0\.bias \[3\]; unexpected extra\.bias \[3\]"):
        load_generator(wrapper, tmp_path / "other.pt")
    for name in ("cut.pt", "cut.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "bare.pt").read_bytes()[:300])
        with pytest.raises(ValueError, match="damaged") as caught:
            load_generator(wrapper, tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list, not a state dict"):
        load_generator(wrapper, tmp_path / "list.pt")
