"""Shared by all tests: one thread (two cores are slower when shared), a tiny random model, no network."""

import json
import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)

VAE_SIZES = {"dim": 8, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temporal_downsample": [True, True], "patch_size": 2}
TINY_VAE_SIZES = {"encoder_channels": None, "decoder_channels": [4, 4, 4, 4]}
TEXT_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory) -> Path:
    """A folder in the layout of wan_models/puppet-tiny with small random networks: a real road, meaningless pictures.

    A session's tests share it: copy what you want to break.
    """
    from transformers import UMT5EncoderModel

    from wan.configs import WanConfig
    from wan.modules.model import WanModel
    from wan.modules.text_encoder import to_wan_names, umt5_config
    from wan.modules.tiny_vae import TinyVAE
    from wan.modules.vae import WanVAE
    from wan.modules.weights import save_safetensors
    from world.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("wan_models") / "tiny-random"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = WanConfig(dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=24)
        transformer = WanModel(sizes)
        for name, parameter in transformer.named_parameters():  # fresh networks start with a head of zeros
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1 if name.startswith("head") else 0.05)
        transformer.save_pretrained(folder)

        save_safetensors(WanVAE(**VAE_SIZES).state_dict(), folder / "Wan2.1_VAE.safetensors")
        (folder / "Wan2.1_VAE.json").write_text(json.dumps(VAE_SIZES))

        save_safetensors(TinyVAE(**TINY_VAE_SIZES).state_dict(), folder / "taew2_1.safetensors")
        (folder / "taew2_1.json").write_text(json.dumps(TINY_VAE_SIZES))

        text_sizes = {**TEXT_SIZES, "vocab_size": train_tokenizer(folder / "tokenizer", num_sentences=200)}
        text_encoder = UMT5EncoderModel(umt5_config(text_sizes))
        save_safetensors(to_wan_names(text_encoder.state_dict()), folder / "models_t5_umt5-puppet.safetensors")
        (folder / "models_t5_umt5-puppet.json").write_text(json.dumps(text_sizes))
    return folder


@pytest.fixture(scope="session")
def tiny_i2v_folder(tiny_model_folder, tmp_path_factory) -> Path:
    """The same with a transformer that reads an image, and a CLIP tower: the layout of Wan2.1-I2V-14B-480P."""
    import shutil

    from safetensors.torch import save_file

    from tests.golden_data import below, load_golden
    from wan.configs import CLIP_FILES, WanConfig
    from wan.modules.model import WanModel

    folder = tmp_path_factory.mktemp("wan_models") / "tiny-random-i2v"
    shutil.copytree(tiny_model_folder, folder)
    sizes = json.loads((folder / "config.json").read_text()) | {"model_type": "i2v", "in_dim": 36, "clip_dim": 32}
    (folder / "config.json").write_text(json.dumps(sizes))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = WanModel(WanConfig.from_folder(folder))
        for name, parameter in transformer.named_parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1 if name.startswith("head") else 0.05)
        transformer.save_pretrained(folder)
    tower = below(load_golden("e_clip_vision")[0], "w")
    save_file({f"visual.{name}": tensor for name, tensor in tower.items()}, folder / CLIP_FILES[1])
    return folder
