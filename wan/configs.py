"""Sizes of every known model, and where a model's files lie on disk."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class WanConfig:
    """Sizes of one Wan transformer, under the names of the published `config.json`.

    model_type "t2v" takes text; "i2v" also takes an image: `clip_fea` tokens and `y` on extra input channels.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    model_type: str = "t2v"
    in_dim: int = 16  # latent channels, plus 4 mask + 16 image channels for i2v
    out_dim: int = 16
    freq_dim: int = 256  # width of the sinusoidal time embedding
    text_dim: int = 4096
    text_len: int = 512  # prompts are padded to this many tokens
    patch_size: tuple[int, int, int] = (1, 2, 2)
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    clip_dim: int = 1280  # width of the image encoder's tokens (i2v)
    pose_dim: int = 0  # width of `add_condition` tokens; 0: the model takes no pose

    def __post_init__(self):
        if self.model_type not in ("t2v", "i2v"):
            raise ValueError(f"model_type {self.model_type!r} is unknown; use 't2v' or 'i2v'")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.num_heads} heads of even size")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of `height` x `width` latent cells."""
        _, patch_height, patch_width = self.patch_size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"a latent of {height}x{width} does not split into patches of {patch_height}x{patch_width}; "
                f"use a pixel size divisible by {8 * patch_height}"
            )
        return (height // patch_height) * (width // patch_width)

    @classmethod
    def from_folder(cls, folder: str | Path) -> "WanConfig":
        """Read `config.json`; keys that are not sizes are ignored, absent sizes take the published value."""
        path = Path(folder) / "config.json"
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path} is not valid JSON (line {error.lineno}: {error.msg}); download it again"
            ) from error
        known = {field.name for field in fields(cls)}
        settings = {
            key: tuple(value) if isinstance(value, list) else value for key, value in settings.items() if key in known
        }
        missing = [name for name in ("dim", "ffn_dim", "num_heads", "num_layers") if name not in settings]
        if missing:
            raise ValueError(f"{path} lacks {', '.join(missing)}: it is not the config of a Wan transformer")
        return cls(**settings)

    def to_json(self) -> str:
        return json.dumps({"_class_name": "WanModel", **asdict(self)}, indent=2) + "\n"


_T2V_14B = WanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_I2V_14B = replace(_T2V_14B, model_type="i2v", in_dim=36)

EMBEDDED_MODEL = "puppet-tiny"
WAN_CONFIGS: dict[str, WanConfig] = {
    EMBEDDED_MODEL: WanConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=10, text_dim=192, text_len=64),
    "Wan2.1-T2V-1.3B": WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30),
    "Wan2.1-T2V-14B": _T2V_14B,
    "Wan2.1-I2V-14B-480P": _I2V_14B,
    "Wan2.1-I2V-14B-720P": _I2V_14B,
}

VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors")
TINY_VAE_FILES = ("taew2_1.pth", "taew2_1.safetensors")
TEXT_ENCODER_FILES = (
    "models_t5_umt5-xxl-enc-bf16.pth",
    "models_t5_umt5-xxl-enc-bf16.safetensors",
    "models_t5_umt5-puppet.safetensors",
)
CLIP_FILES = (
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.safetensors",
)
POSE_FILES = ("pose_embedding.safetensors",)
TOKENIZER_FOLDERS = ("tokenizer", "google/umt5-xxl")


def find_model_folder(model_name: str | Path) -> Path:
    """Folder of a model: a path, or a name below `wan_models/` here or beside the package.

    Raises FileNotFoundError with the download line (known names) or the list of known names (others).
    """
    places = [Path(model_name), Path("wan_models") / model_name, Path(__file__).parents[1] / "wan_models" / model_name]
    for place in places:
        if (place / "config.json").is_file():
            return place
    remedy = f"known models: {', '.join(WAN_CONFIGS)}; or give the path of a folder with a config.json"
    if Path(model_name).name in WAN_CONFIGS:
        remedy = how_to_get(Path("wan_models") / Path(model_name).name)
    if Path(model_name).name == "export":
        remedy = "a training run writes such a folder at its end: train it first"
    raise FileNotFoundError(f"no model {str(model_name)!r} in wan_models/; {remedy}")


def pose_file(model_name: str | Path) -> Path | None:
    """The pose networks that were trained with a model, where its folder has them."""
    path = find_model_folder(model_name) / POSE_FILES[0]
    return path if path.is_file() else None


def how_to_get(folder: Path) -> str:
    """What brings the missing files of a model folder; those that are there are not fetched again."""
    if folder.name == EMBEDDED_MODEL:
        return f"it is part of the repository: git checkout -- {folder}"
    if folder.name in WAN_CONFIGS:
        return f"get it with: hf download Wan-AI/{folder.name} --local-dir {folder}"
    return "copy it from the model that this folder was made from"


def find_model_file(folder: str | Path, candidates: tuple[str, ...], remedy: str | None = None) -> Path:
    """First of `candidates` in `folder`; FileNotFoundError names what was looked for and how to get it.

    remedy: how, where the folder's own model does not bring the file.
    """
    folder = Path(folder)
    for candidate in candidates:
        if (folder / candidate).exists():
            return folder / candidate
    raise FileNotFoundError(f"{folder} holds none of {', '.join(candidates)}; {remedy or how_to_get(folder)}")
