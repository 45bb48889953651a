"""Does the model follow a pose, does it keep who is on a picture? Read back by the judges, beside the VAE's ceiling.

    python benchmarks/control.py --set model_name=logs/puppet_pose/export
    python benchmarks/control.py --config_path configs/puppet_dmd.yaml --set model_name=logs/puppet_dmd/export
    python benchmarks/control.py --toy --set model_name=DIR                # sizes for a CPU: the road, no figures

Held-out puppets: motions of the kinds seen in training, improvised ones of styles that were not, and motions fitted to
a body of other proportions (utils.pose.retarget). The section `person` fits a real person's motion to puppets. Poses
are drawn as for `--pose` and streamed piece by piece. A model with a denoising_step_list fills the few_step sections of
--out, another one many_step; headline figures are those of the few-step model where it was measured. Sections that are
there with the same settings and weights are kept.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.embedded_model import Report, fingerprint, round_trips
from pipeline.build import build_pipeline
from utils.config import load_config
from utils.pose.draw import draw
from utils.pose.keypoints import NUM_BODY, read_keypoints
from utils.pose.retarget import bone_lengths, fit
from utils.puppet_latents import skeletons
from wan.configs import find_model_folder
from world.captions import captions
from world.evaluate import measure, quarters, table, to_bytes
from world.judges import DEFAULT_FOLDER, Judges, load_judges
from world.metrics import pck
from world.puppet import ACTIONS, CANVAS, NUM_BODY_JOINTS, Scenes, joints, sample_scenes
from world.render import render

logger = logging.getLogger(__name__)

SCENE_SEED, STREAM_SEED, PERSON_SEED, NOISE_SEED = 707, 808, 909, 0
SECTIONS = ["poses", "identity", "streams", "person"]
PERSON = Path(__file__).resolve().parents[1] / "prompts" / "jumping_jacks.npz"
IMPROVISE = ACTIONS.index("improvise")
LATER = 160  # frame of a scene that its reference picture shows
SAME_BODY = 0.04  # mean relative error of limb lengths up to which two bodies are one
Seen = tuple[Tensor, Tensor]  # videos and the joints that were read in them
LIMBS = ((1, 8), (1, 11), (2, 3), (3, 4), (5, 6), (6, 7), (8, 9), (9, 10), (11, 12), (12, 13))
TOY = {"num_seen": 1, "num_unseen": 1, "num_retargeted": 0, "num_latents": 12, "num_streams": 1, "stream_latents": 12}
TOY |= {"num_people": 1, "batch_size": 2, "size": 32}


@dataclass(frozen=True)
class Sequences:
    """What is asked for: scenes as they should look and move, the joints [N, F_px, 18, 3] that are drawn, groups."""

    scenes: Scenes
    asked: Tensor
    groups: dict[str, slice]
    retargeting_error_px: float  # how far the fitted joints are from those that the body would have

    def __len__(self) -> int:
        return len(self.scenes)


def make_sequences(args: argparse.Namespace) -> Sequences:
    """args.num_seen, num_unseen and num_retargeted held-out sequences of args.num_latents."""
    num = (args.num_seen, args.num_unseen, args.num_retargeted)
    pool = sample_scenes(16 * sum(num) + 64, SCENE_SEED, "heldout")
    improvised = (pool.action == IMPROVISE).nonzero()[:, 0]
    others = (pool.action != IMPROVISE).nonzero()[:, 0]
    drivers, bodies = (pool.select(others[num[0] + i * num[2] :][: num[2]]) for i in range(2))
    moving = {name: getattr(drivers, name) for name in ("action", "speed", "phase", "side", "motion", "pose_centres")}
    fitted = replace(bodies, **moving, camera=torch.zeros_like(bodies.camera))
    drivers = replace(drivers, camera=torch.zeros_like(drivers.camera))
    frames = torch.arange(pixel_frames(args.num_latents + 1))  # a first frame that is given goes before whole blocks
    own = pool.select(torch.cat([others[: num[0]], improvised[: num[1]]]))
    tracks = joints(drivers, frames)
    references = joints(fitted, torch.tensor([LATER]))[:, 0]
    new = [fit(track, reference)(track) for track, reference in zip(tracks, references, strict=True)]
    scenes = concatenated(own, fitted)
    asked = torch.cat([joints(own, frames), torch.stack(new)]) if new else joints(own, frames)
    error = (asked - joints(scenes, frames))[len(own) :, :, :NUM_BODY_JOINTS, :2].norm(dim=-1)
    bounds = {"seen": slice(0, num[0]), "unseen": slice(num[0], len(own)), "retargeted": slice(len(own), len(scenes))}
    return Sequences(scenes, asked, bounds, float(error.mean()) if len(error) else 0.0)


def concatenated(one: Scenes, other: Scenes) -> Scenes:
    return Scenes(**{name: torch.cat([value, getattr(other, name)]) for name, value in vars(one).items()})


def pixel_frames(num_latents: int) -> int:
    return 1 + 4 * (num_latents - 1)


def drawn(asked: Tensor, size: int) -> Tensor:
    """Joints [B, F_px, 18, 3] as drawings uint8 [B, F_px, 3, size, size]."""
    frames = draw(asked.flatten(0, 1), (CANVAS, CANVAS), (size, size), "body")
    return frames.unflatten(0, asked.shape[:2])


def true_pictures(scenes: Scenes, num_frames: int, args: argparse.Namespace, start: int = 0) -> Tensor:
    """Renders uint8 [N, T, 3, size, size] on the CPU."""
    parts = []
    for first in range(0, len(scenes), args.batch_size):
        some = scenes.select(slice(first, first + args.batch_size)).to(args.device)
        parts.append(to_bytes(render(some, num_frames, start, size=args.size) * 0.5 + 0.5).cpu())
    return torch.cat(parts)


def streamed(
    pipeline, prompts: list[str], num_latents: int, args: argparse.Namespace, *, poses=None, **options
) -> Tensor:
    """The model's videos, uint8 on the CPU. poses: rows -> pieces of drawings; options: tensors [N, ...], or plain."""
    videos = []
    for first in range(0, len(prompts), args.batch_size):
        rows = slice(first, min(first + args.batch_size, len(prompts)))
        mine = {k: v[rows].to(args.device) if isinstance(v, Tensor) else v for k, v in options.items()}
        blocks = pipeline.stream(
            text_prompts=prompts[rows],
            seeds=[NOISE_SEED + i for i in range(rows.start, rows.stop)],
            num_frames=num_latents,
            height=args.size,
            width=args.size,
            **({"dwpose_data": poses(rows), "pose_guidance_scale": args.pose_guidance_scale} if poses else {}),
            **mine,
        )
        videos.append(torch.cat([to_bytes(block).cpu() for block in blocks], dim=1))
        logger.info("%d of %d videos of %d frames", rows.stop, len(prompts), videos[-1].shape[1])
    return torch.cat(videos)


# --- what is read back ---


@torch.inference_mode()
def read_joints(videos: Tensor, judges: Judges, args: argparse.Namespace) -> Tensor:
    """[N, T, 18, 2] px of the canvas, on the CPU."""
    return torch.cat([judges.read_joints(part.to(args.device).float() / 255).cpu() for part in videos.split(8)])


def followed(read: Tensor, asked: Tensor, groups: dict[str, slice]) -> dict[str, dict[str, float]]:
    """PCK@.05 and mean error in px of the 14 body joints, by group and in all."""
    asked = asked[:, : read.shape[1]]
    hits = pck(read, asked, CANVAS)
    error = (read - asked[..., :2])[:, :, :NUM_BODY_JOINTS].norm(dim=-1).mean((1, 2))
    rows = {**groups, "all": slice(0, len(read))}
    return {
        name: {"n": len(hits[row]), "pck05": float(hits[row].mean()), "joint_error_px": float(error[row].mean())}
        for name, row in rows.items()
        if len(hits[row])
    }


@torch.inference_mode()
def identity(
    videos: Tensor, read: Tensor, scenes: Scenes, judges: Judges, args: argparse.Namespace
) -> dict[str, float]:
    """Shares of videos that show the scene's body colour, skin and proportions; accuracy is the mean of the three."""
    body, skin = [], []
    for part in videos.split(8):
        seen = part.to(args.device).float() / 255
        body.append(judges.read_look(seen)["body"].argmax(-1).cpu())
        features = judges.read_features(seen)
        skin.append(judges.video.heads["skin"](F.silu(features)).log_softmax(-1).mean(1).argmax(-1).cpu())
    true = joints(scenes, torch.arange(videos.shape[1]))
    errors = torch.tensor([body_error(track, own) for track, own in zip(read, true, strict=True)])
    shares = {
        "body": (torch.cat(body) == scenes.body).float().mean().item(),
        "skin": (torch.cat(skin) == scenes.skin).float().mean().item(),
        "proportions": (errors < SAME_BODY).float().mean().item(),
    }
    return {**shares, "accuracy": sum(shares.values()) / 3, "limb_error": errors.mean().item()}


def body_error(track: Tensor, own: Tensor) -> float:
    """Mean relative difference of limb lengths; track [T, 18, 2], own [T, 18, 3]."""
    theirs = bone_lengths(torch.cat([track, torch.ones_like(track[..., :1])], dim=-1))
    ours = bone_lengths(own)
    return sum(abs(theirs.get(limb, 0.0) / ours[limb] - 1) for limb in LIMBS) / len(LIMBS)


# --- sections ---


def ceilings(pipeline, sequences: Sequences, judges: Judges, args: argparse.Namespace) -> dict[str, Seen]:
    """The sequences as they should be, and what the VAE makes of that."""
    truth = true_pictures(sequences.scenes, pixel_frames(args.num_latents), args)
    trips = round_trips(pipeline.vae.model, truth, torch.device(args.device), args.batch_size)
    return {
        name: (videos, read_joints(videos, judges, args))
        for name, videos in (("ground truth", truth), ("VAE round trip", trips))
    }


def poses_section(pipeline, sequences: Sequences, known: dict[str, Seen], judges: Judges, args) -> dict:
    """With and without pose, beside ground truth and the VAE's round trip."""
    scenes, asked = sequences.scenes, sequences.asked[:, : pixel_frames(args.num_latents)]
    prompts = captions(scenes, SCENE_SEED, full=True)
    own = joints(scenes, torch.arange(asked.shape[1]))

    def poses(rows: slice) -> Iterator[Tensor]:
        return iter(drawn(asked[rows].to(args.device), args.size).split(4, dim=1))

    with_pose = streamed(pipeline, prompts, args.num_latents, args, poses=poses)
    without = streamed(pipeline, prompts, args.num_latents, args)
    columns = {
        **{name: followed(read, own, sequences.groups) for name, (_, read) in known.items()},
        "with pose": followed(read_joints(with_pose, judges, args), asked, sequences.groups),
        "without pose": followed(read_joints(without, judges, args), asked, sequences.groups),
    }
    for name in columns["ground truth"]:
        print(f"{name} motions" + "\n" + table({title: figures[name] for title, figures in columns.items()}))
    looks = measure(with_pose, scenes, judges)
    return {"columns": columns, "looks": looks, "retargeting_error_px": sequences.retargeting_error_px}


def identity_section(pipeline, sequences: Sequences, known: dict[str, Seen], judges: Judges, args) -> dict:
    """A picture says who, a pose what, and words only the action; the picture as reference and as first frame."""
    scenes, asked = sequences.scenes, sequences.asked
    prompts = captions(scenes, SCENE_SEED, looks=False)
    later = torch.tensor([LATER])
    length = {"ref_sink": args.num_latents, "context": 1 + args.num_latents}
    columns = {name: identity(videos, read, scenes, judges, args) for name, (videos, read) in known.items()}
    follow = {}
    for mode, start in (("ref_sink", LATER), ("context", 0)):
        pictures = true_pictures(scenes, 1, args, start)[:, 0].float() / 127.5 - 1
        options = {"input_image": pictures, "image_mode": mode}
        if mode == "ref_sink":
            options["random_ref_dwpose"] = drawn(joints(scenes, later), args.size)[:, 0]

        def poses(rows: slice, frames: int = pixel_frames(length[mode])) -> Iterator[Tensor]:
            return iter(drawn(asked[rows, :frames].to(args.device), args.size).split(4, dim=1))

        videos = streamed(pipeline, prompts, length[mode], args, poses=poses, **options)
        read = read_joints(videos, judges, args)
        columns[mode] = identity(videos, read, scenes, judges, args)
        follow[mode] = followed(read, asked, sequences.groups)
    print(table(columns))
    return {"n": len(sequences), "columns": columns, "followed": follow}


def streams_section(pipeline, judges: Judges, args: argparse.Namespace) -> dict:
    """Long posed streams by quarter: does it go on following, and stay who it is?"""
    scenes = sample_scenes(args.num_streams, STREAM_SEED, "heldout")
    prompts = captions(scenes, STREAM_SEED, full=True)
    num_frames = pixel_frames(args.stream_latents)

    def poses(rows: slice) -> Iterator[Tensor]:
        some = scenes.select(rows).to(args.device)
        for start in range(0, num_frames, 16):
            yield skeletons(some, min(16, num_frames - start), start, size=args.size)

    videos = streamed(pipeline, prompts, args.stream_latents, args, poses=poses)
    rows = quarters(videos, scenes, judges, same_motion=True)
    print(f"{len(videos)} streams of {num_frames} frames")
    print(table({f"quarter {i + 1}": row for i, row in enumerate(rows)}))
    drops = {f"{name}_drop": rows[0][name] - rows[-1][name] for name in ("pck05", "colour_accuracy")}
    return {"n": len(videos), "num_frames": num_frames, "quarters": rows, **drops}


def person_section(pipeline, judges: Judges, args: argparse.Namespace) -> dict:
    """A real person's motion on puppets of other proportions, with and without pose. No render shows it: no ceiling."""
    scenes = sample_scenes(args.num_people, PERSON_SEED, "heldout", moving_camera=0.0)
    prompts = captions(scenes, PERSON_SEED, full=True)
    track = torch.cat([piece[:, :NUM_BODY] for piece in read_keypoints(PERSON).pieces()])
    track = track[: pixel_frames(args.num_latents)]
    asked = torch.stack([fit(track, body)(track) for body in joints(scenes, torch.tensor([LATER]))[:, 0]])
    num_latents = 1 + (len(track) - 1) // 4

    def poses(rows: slice) -> Iterator[Tensor]:
        return iter(drawn(asked[rows].to(args.device), args.size).split(4, dim=1))

    columns = {}
    for name, given in (("with pose", poses), ("without pose", None)):
        videos = streamed(pipeline, prompts, num_latents, args, poses=given)
        columns[name] = followed(read_joints(videos, judges, args), asked, {})["all"]
    print(f"a real person's motion, {len(scenes)} puppets" + "\n" + table(columns))
    return {"num_frames": len(track), "columns": columns}


def headline(content: dict) -> dict[str, float]:
    """The figures by their names in the plan; the few-step model's where there are both."""
    figures = {}
    for kind, name in (("many_step", "pck_many_step"), ("few_step", "pck_streaming_4step")):
        if poses := content.get(f"{kind}_poses"):
            columns = poses["columns"]
            groups = {"seen": name, "unseen": "pck_unseen_motion"}
            for group in groups.keys() & columns["with pose"].keys():
                figures[groups[group]] = columns["with pose"][group]["pck05"]
            figures["pck_without_pose"] = columns["without pose"]["all"]["pck05"]
            figures["headline_of"] = kind
        if people := content.get(f"{kind}_identity"):
            figures["identity_accuracy"] = people["columns"]["ref_sink"]["accuracy"]
        if person := content.get(f"{kind}_person"):
            figures["pck_real_person"] = person["columns"]["with pose"]["pck05"]
    return figures


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/puppet_many_steps.yaml", help="how the model is sampled")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings over those of the config")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--judges", type=Path, default=DEFAULT_FOLDER, help="folder of judges.safetensors")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/control.json"))
    parser.add_argument("--num_seen", type=int, default=40, help="sequences of the kinds of motion seen in training")
    parser.add_argument("--num_unseen", type=int, default=16, help="improvised ones of styles that were not")
    parser.add_argument("--num_retargeted", type=int, default=8, help="motions fitted to another body")
    parser.add_argument("--num_latents", type=int, default=21)
    parser.add_argument("--num_streams", type=int, default=16)
    parser.add_argument("--stream_latents", type=int, default=252)
    parser.add_argument("--num_people", type=int, default=16, help="puppets that a real person's motion is fitted to")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--size", type=int, default=CANVAS, help="side of a picture")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU")
    parser.add_argument("--overwrite", action="store_true", help="make sections again that are already in --out")
    args = parser.parse_args(argv)
    if args.toy:
        vars(args).update(TOY)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(args.config_path, args.set)
    args.pose_guidance_scale = config.pose_guidance_scale
    kind = "few_step" if config.denoising_step_list else "many_step"
    report, judges = Report(args.out, args.overwrite), load_judges(args.judges, args.device)
    sizes = (
        "num_seen",
        "num_unseen",
        "num_retargeted",
        "num_latents",
        "num_streams",
        "stream_latents",
        "num_people",
        "size",
    )
    settings = {"device": args.device, "config": args.config_path, "set": args.set}
    settings |= {name: getattr(args, name) for name in sizes}
    settings |= {"weights": fingerprint(find_model_folder(config.model_name), args.judges)}
    settings |= {"seeds": {"scenes": SCENE_SEED, "streams": STREAM_SEED, "people": PERSON_SEED, "noise": NOISE_SEED}}
    sequences, known = make_sequences(args), None
    for name in args.sections:
        if report.has(f"{kind}_{name}", settings):
            continue
        window = config.model_kwargs
        if name == "identity":  # a reference must not leave the window
            window = replace(window, sink_size=max(1, window.sink_size))
        pipeline = build_pipeline(replace(config, model_kwargs=window, compile="off"), args.device)
        if name in ("streams", "person"):
            figures = (streams_section if name == "streams" else person_section)(pipeline, judges, args)
        else:
            known = known or ceilings(pipeline, sequences, judges, args)
            section = poses_section if name == "poses" else identity_section
            figures = section(pipeline, sequences, known, judges, args)
        report.put(f"{kind}_{name}", settings, figures)
        report.put(f"{kind}_{name}", settings, figures, **headline(report.content))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
