"""What the embedded model can do: ground truth, VAE round trip and model side by side, on held-out prompts.

    python benchmarks/embedded_model.py                               # everything: 256 prompts, 64 long streams
    python benchmarks/embedded_model.py --vae_only [--vae_folder DIR] # the gate that a VAE passes before a transformer
    python benchmarks/embedded_model.py --vae_only --tiny_vae DIR/taew2_1.safetensors --out DIR/gate.json
    python benchmarks/embedded_model.py --device cpu --fps_only       # frames per second on this machine's CPU

Figures are written as they come; a section that is already in --out, with the same settings and the same weights of
model and judges, is not made again (--overwrite makes it). With --max_seconds the prompts done so far are measured, and
their number is told.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from pipeline.build import build_pipeline
from utils.config import load_config
from utils.distributed import resolve_dtype
from wan.configs import VAE_FILES, find_model_file, find_model_folder
from wan.modules.tiny_vae import TinyVAE, load_tiny_vae
from wan.modules.vae import WanVAE, load_vae
from world.captions import captions
from world.evaluate import contact_sheet, features_of, measure, quarters, table, to_bytes
from world.judges import DEFAULT_FOLDER, Judges, load_judges
from world.puppet import ACTIONS, FPS, Scenes, sample_scenes
from world.render import render

logger = logging.getLogger(__name__)

SCENE_SEED, REFERENCE_SEED, STREAM_SEED, GATE_SEED, NOISE_SEED = 101, 202, 303, 404, 0
GATE = {  # spec of the VAE round trip: what must hold before a transformer is trained on its latents
    "psnr": (">=", 31.0),
    "puppet_psnr": (">=", 27.0),
    "psnr_drop": ("<", 0.5),
    "pck05": (">=", 0.97),
    "action_accuracy": (">=", 0.97),
    "prop_colour_accuracy": (">=", 0.95),
}


@dataclass
class Report:
    """The JSON file that figures go to, section by section."""

    path: Path
    overwrite: bool
    content: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def has(self, section: str, settings: dict) -> bool:
        known = self.content.get(section, {})
        return not self.overwrite and known.get("settings") == settings and known.get("complete", False)

    def put(self, section: str, settings: dict, figures: dict, *, complete: bool = True, **headline) -> None:
        machine = describe_machine(settings.get("device", "cpu"))
        self.content[section] = {"settings": settings, "complete": complete, "machine": machine, **figures}
        self.content.update({key: value for key, value in headline.items() if value is not None})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(_rounded(self.content), indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)


def _rounded(value):
    if isinstance(value, float):
        return round(value, 5)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def fingerprint(*paths: Path) -> str:
    """Twelve hexadecimal digits of the weights in these files and folders."""
    digest = hashlib.sha256()
    for path in paths:
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def describe_machine(device: str) -> str:
    name = (
        torch.cuda.get_device_name() if device.startswith("cuda") else f"{platform.machine()}, {os.cpu_count()} cores"
    )
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


@torch.inference_mode()
def round_trip(vae: WanVAE, pixels: Tensor, decoder: WanVAE | TinyVAE | None = None, chunk_latents: int = 4) -> Tensor:
    """Pixels [B, 1 + 4n, 3, H, W] in [-1, 1] -> the same, encoded and decoded as streams, float32 in [-1, 1].

    decoder: shows the latents in place of the VAE that made them.
    """
    decoder = decoder or vae
    dtype = next(vae.parameters()).dtype
    video, chunk = pixels.transpose(1, 2).to(dtype), vae.temporal_stride * chunk_latents
    encoder_cache, decoder_cache, decoded = vae.make_cache(), decoder.make_cache(), []
    bounds = [0, *range(1, video.shape[2], chunk), video.shape[2]]
    for start, stop in pairwise(bounds):
        decoded.append(decoder.decode(vae.encode(video[:, :, start:stop], encoder_cache), decoder_cache).float())
    return torch.cat(decoded, dim=2).transpose(1, 2).clamp(-1, 1)


def true_videos(scenes: Scenes, num_frames: int, device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    """Renders [N, T, 3, 128, 128] and coverage [N, T, 1, 128, 128] of the scenes, uint8 on the CPU."""
    videos, masks = [], []
    for first in range(0, len(scenes), batch):
        video, mask = render(scenes.select(slice(first, first + batch)).to(device), num_frames, return_mask=True)
        videos.append(to_bytes(video * 0.5 + 0.5).cpu())
        masks.append(to_bytes(mask).cpu())
    return torch.cat(videos), torch.cat(masks)


def round_trips(
    vae: WanVAE, videos: Tensor, device: torch.device, batch: int, decoder: WanVAE | TinyVAE | None = None
) -> Tensor:
    """uint8 videos through the VAE."""
    parts = [round_trip(vae, part.to(device).float() / 127.5 - 1, decoder) * 0.5 + 0.5 for part in videos.split(batch)]
    return torch.cat([to_bytes(part).cpu() for part in parts])


def generate(pipeline, prompts: list[str], num_latents: int, batch: int, deadline: float) -> Tensor:
    """The model's videos, uint8 on the CPU; fewer than prompts when the deadline comes first (never less than a
    batch)."""
    videos: list[Tensor] = []
    for first in range(0, len(prompts), batch):
        if videos and time.monotonic() > deadline:
            break
        some = prompts[first : first + batch]
        seeds = list(range(NOISE_SEED + first, NOISE_SEED + first + len(some)))
        video = pipeline.inference(text_prompts=some, seeds=seeds, num_frames=num_latents, height=128, width=128)
        videos.append(to_bytes(video).cpu())
        logger.info("%d of %d videos of %d frames", first + len(some), len(prompts), video.shape[1])
    return torch.cat(videos)


def gate_section(vae: WanVAE, judges: Judges, device, n: int, batch: int, sheets: Path | None, decoder=None) -> dict:
    """PSNR, drift over quarters, joints, action and prop colour of the VAE round trip, against ground truth."""
    scenes = sample_scenes(n, GATE_SEED, "heldout")
    videos, masks = true_videos(scenes, 81, device, batch)
    made = round_trips(vae, videos, device, batch, decoder)
    truth = measure(videos, scenes, judges, same_motion=True)
    options = {"references": videos, "masks": masks, "same_motion": True}
    trip = measure(made, scenes, judges, **options)
    by_quarter = [row["psnr"] for row in quarters(made, scenes, judges, **options)]
    trip["psnr_drop"] = max(early - late for i, early in enumerate(by_quarter[:-1]) for late in by_quarter[i + 1 :])
    verdict = {}
    for name, (sign, wanted) in GATE.items():
        passed = trip[name] >= wanted if sign == ">=" else trip[name] < wanted
        verdict[name] = {"value": trip[name], "wanted": f"{sign} {wanted}", "passed": passed}
        print(f"{name:>22} {trip[name]:8.3f}   wanted {sign} {wanted:<6} {'ok' if passed else 'MISSED'}")
    if sheets:
        pairs = torch.stack([videos[:6], made[:6]], 1).flatten(0, 1)
        names = [
            f"{kind}: {text}" for text in captions(scenes.select(slice(0, 6)), 0, full=True) for kind in ("true", "VAE")
        ]
        contact_sheet(pairs, names, sheets / "vae_round_trip.png")
    return {"n": n, "ground_truth": truth, "vae_round_trip": trip, "psnr_by_quarter": by_quarter, "gate": verdict}


def prompts_section(pipeline, judges: Judges, device, args, deadline: float) -> tuple[dict, bool]:
    """The three columns on held-out scenes with full captions."""
    scenes = sample_scenes(args.num_prompts, SCENE_SEED, "heldout")
    prompts = captions(scenes, SCENE_SEED, full=True)
    model = generate(pipeline, prompts, args.num_latents, args.batch_size, deadline)
    scenes = scenes.select(slice(0, len(model)))
    num_frames = model.shape[1]
    truth, masks = true_videos(scenes, num_frames, device, args.batch_size)
    trips = round_trips(pipeline.vae.model, truth, device, args.batch_size)
    reference, _ = true_videos(
        sample_scenes(args.num_prompts, REFERENCE_SEED, "heldout"), num_frames, device, args.batch_size
    )
    features = features_of(reference, judges)
    columns = {
        "ground truth": measure(truth, scenes, judges, features, same_motion=True),
        "VAE round trip": measure(trips, scenes, judges, features, same_motion=True, references=truth, masks=masks),
        "model": measure(model, scenes, judges, features),
    }
    by_action = {}
    for i, action in enumerate(ACTIONS):
        chosen = (scenes.action == i).nonzero()[:, 0]
        if len(chosen):
            by_action[action] = measure(model[chosen], scenes.select(chosen), judges)["action_accuracy"]
    print(table(columns))
    print("action accuracy by action: " + ", ".join(f"{name} {value:.2f}" for name, value in by_action.items()))
    if args.sheets:
        contact_sheet(model[:16], prompts[:16], args.sheets / "embedded_model.png", rows_per_column=8, frames=6)
        rows = torch.stack([truth[:4], trips[:4], model[:4]], 1).flatten(0, 1)
        names = [f"{kind}: {text}" for text in prompts[:4] for kind in ("true", "VAE", "model")]
        contact_sheet(rows, names, args.sheets / "truth_vae_model.png")
    figures = {"n": len(model), "columns": columns, "action_accuracy_by_action": by_action}
    return figures, len(model) == args.num_prompts


def streams_section(pipeline, judges: Judges, device, args, deadline: float) -> tuple[dict, bool]:
    """Long streams by quarter, beside ground truth of the same length: does the puppet stay what it was asked to be?"""
    scenes = sample_scenes(args.num_streams, STREAM_SEED, "heldout")
    prompts = captions(scenes, STREAM_SEED, full=True)
    model = generate(pipeline, prompts, args.stream_latents, args.batch_size, deadline)
    scenes = scenes.select(slice(0, len(model)))
    truth, _ = true_videos(scenes, model.shape[1], device, args.batch_size)
    reference, _ = true_videos(sample_scenes(256, REFERENCE_SEED, "heldout"), 81, device, args.batch_size)
    features = features_of(reference, judges)
    rows = {
        "ground_truth": quarters(truth, scenes, judges, features),
        "model": quarters(model, scenes, judges, features),
    }
    for name, quarter_rows in rows.items():
        print(f"{name}, {len(model)} streams of {model.shape[1]} frames")
        print(table({f"quarter {i + 1}": row for i, row in enumerate(quarter_rows)}))
    if args.sheets:
        contact_sheet(model[:8], prompts[:8], args.sheets / "embedded_stream.png", frames=12)
    first, last = rows["model"][0], rows["model"][-1]
    drift = {
        "colour_drop": first["colour_accuracy"] - last["colour_accuracy"],
        "fwd_rise": last["fwd"] - first["fwd"],
    }
    figures = {"n": len(model), "num_frames": model.shape[1], "quarters": rows, **drift}
    return figures, len(model) == args.num_streams


def speed_section(pipeline, args) -> dict:
    """Frames per second of one stream, VAE included, after a warm-up; and of its first block."""
    options = {"text_prompts": ["a red puppet waves before a mint wall"], "seeds": [0], "height": 128, "width": 128}
    for _ in pipeline.stream(**options, num_frames=pipeline.num_frame_per_block):
        pass
    begun, frames, first = time.perf_counter(), 0, None
    for block in pipeline.stream(**options, num_frames=args.num_latents):
        frames += block.shape[1]
        float(block.sum())  # waits for the device
        first = first or time.perf_counter() - begun
    seconds = time.perf_counter() - begun
    steps = len(pipeline.timesteps) if pipeline.timesteps else pipeline.sampling_steps
    print(f"{frames / seconds:.1f} frames/s over {frames} frames, first block after {first:.2f} s, {steps} steps")
    return {
        "frames_per_second": frames / seconds,
        "realtime_factor": frames / seconds / FPS,
        "first_block_seconds": first,
        "steps": steps,
        "guidance_scale": pipeline.guidance_scale,
        "threads": torch.get_num_threads(),
        "frames": frames,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/puppet_tiny.yaml")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over those of the config file"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--judges", type=Path, default=DEFAULT_FOLDER, help="folder of judges.safetensors")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedded_model.json"))
    parser.add_argument("--sheets", type=Path, help="folder for contact sheets, e.g. docs/")
    parser.add_argument("--num_prompts", type=int, default=256)
    parser.add_argument("--num_latents", type=int, default=21, help="latent frames per prompt")
    parser.add_argument("--num_streams", type=int, default=64)
    parser.add_argument("--stream_latents", type=int, default=63)
    parser.add_argument("--num_gate_clips", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_seconds", type=float, default=float("inf"), help="stop generating new videos after this")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads when --device cpu")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--vae_only", action="store_true", help="only the VAE gate")
    only.add_argument("--fps_only", action="store_true", help="only frames per second")
    parser.add_argument(
        "--vae_folder", type=Path, help="with --vae_only: a folder with another VAE, e.g. a training export"
    )
    parser.add_argument("--tiny_vae", type=Path, help="with --vae_only: this tiny decoder shows the VAE's latents")
    parser.add_argument("--overwrite", action="store_true", help="make sections again that are already in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(args.threads)
    deadline = time.monotonic() + args.max_seconds
    report = Report(args.out, args.overwrite)
    config = load_config(args.config_path, args.set)
    weights = [find_model_folder(config.model_name), args.judges]
    weights += [Path(path) for path in (config.generator_ckpt, config.lora_ckpt) if path and Path(path).is_file()]
    base = {"device": device.type, "config": args.config_path, "set": args.set, "weights": fingerprint(*weights)}

    if not args.fps_only:
        judges = load_judges(args.judges, device)
        vae_file = find_model_file(args.vae_folder or weights[0], VAE_FILES)
        settings = {"device": device.type, "vae_folder": str(args.vae_folder or ""), "n": args.num_gate_clips}
        settings |= {"weights": fingerprint(vae_file, args.judges, *([args.tiny_vae] if args.tiny_vae else []))}
        if not report.has("vae_gate", settings):
            dtype = resolve_dtype("auto", device)
            vae = load_vae(vae_file, device=device, dtype=dtype)
            tiny = load_tiny_vae(args.tiny_vae, device=device, dtype=dtype) if args.tiny_vae else None
            gate = gate_section(vae, judges, device, args.num_gate_clips, args.batch_size, args.sheets, tiny)
            report.put("vae_gate", settings, gate)
            del vae, tiny
    if args.vae_only:
        return 0 if all(row["passed"] for row in report.content["vae_gate"]["gate"].values()) else 1

    pipeline = build_pipeline(config, device)
    if not args.fps_only:
        settings = {**base, "num_prompts": args.num_prompts, "num_latents": args.num_latents}
        if not report.has("prompts", settings):
            figures, complete = prompts_section(pipeline, judges, device, args, deadline)
            model, trip = figures["columns"]["model"], figures["columns"]["VAE round trip"]
            names = ("colour", "background", "prop", "prop_colour", "action")
            headline = {f"{name}_accuracy": model[f"{name}_accuracy"] for name in names}
            seeds = {"scenes": SCENE_SEED, "reference": REFERENCE_SEED, "streams": STREAM_SEED, "noise": NOISE_SEED}
            report.put(
                "prompts", settings, figures, complete=complete, **headline, prop_presence=model["prop_presence"],
                fwd=model["fwd"], vae_psnr=trip["psnr"], vae_roundtrip_pck05=trip["pck05"], n=figures["n"], seeds=seeds,
                ceilings={name: {key: column[key] for key in (*headline, "fwd")}
                          for name, column in figures["columns"].items() if name != "model"},
                machine=describe_machine(device.type),
            )  # fmt: skip
        settings = {**base, "num_streams": args.num_streams, "stream_latents": args.stream_latents}
        if args.num_streams and not report.has("streams", settings):
            figures, complete = streams_section(pipeline, judges, device, args, deadline)
            report.put("streams", settings, figures, complete=complete)
    if device.type == "cpu" or args.fps_only:
        settings = {**base, "num_latents": args.num_latents, "threads": torch.get_num_threads()}
        if args.fps_only or not report.has(f"speed_{device.type}", settings):
            figures = speed_section(pipeline, args)
            report.put(
                f"speed_{device.type}", settings, figures, **{f"{device.type}_fps": figures["frames_per_second"]}
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
