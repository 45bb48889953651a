"""The train-test gap: what happens to a stream that goes on three, and twelve, times as long as the training clips.

    python benchmarks/train_test_gap.py --start wan_models/puppet-tiny --seconds 600 --docs docs
    python benchmarks/train_test_gap.py --num_gpus 2 --teacher logs/puppet_teacher/export --ode_pairs data/ode_pairs

Every method starts from the same many-step model (`start`, measured as it is), sees the same puppets and learns for the
same --seconds on the same GPUs; self-forcing spends half of them on consistency distillation, its start in few steps.
What they have in common, teacher and ODE pairs, is not counted. Each then streams held-out prompts, and the judges read
three horizons of the same stream: FWD (Frechet distance to true puppets of the same moments), accuracies, flicker. A
figure is the mean over groups (training seed x sampling seed: other scenes, other noise) with its standard error.

Everything is kept below --work, so that an interrupted experiment goes on where it stopped, and methods may be trained
(--train_only) and measured by processes of their own: the last one, which names them all, finds what the others left.
--given dmd=FOLDER measures a model that is there already.
"""

import argparse
import functools
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, the repository is not on the path yet

from benchmarks.embedded_model import describe_machine  # noqa: E402
from benchmarks.gap_figures import FIGURES, accuracy_drop, beats, plot, summary, table  # noqa: E402
from pipeline.build import build_pipeline  # noqa: E402
from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline  # noqa: E402
from pipeline.graphs import CudaRecorder  # noqa: E402
from utils.config import Config, load_config  # noqa: E402
from utils.fingerprint import fingerprint  # noqa: E402
from world.captions import captions  # noqa: E402
from world.evaluate import contact_sheet, features_of, measure, to_bytes  # noqa: E402
from world.judges import DEFAULT_FOLDER, Judges, load_judges  # noqa: E402
from world.puppet import Scenes, sample_scenes  # noqa: E402
from world.render import render  # noqa: E402

logger = logging.getLogger(__name__)

SCENE_SEED, REFERENCE_SEED = 505, 606  # plus the sampling seed
START, BASELINE, CHAMPION = "start", "teacher_forcing", "self_forcing_dmd"


References = Callable[[int], dict[str, Tensor]]  # by sampling seed: see reference_features


@dataclass(frozen=True)
class Stage:
    """One run of train.py: a config, its share of the method's time, settings over the config's."""

    config: str
    share: float = 1.0
    overrides: tuple[str, ...] = ()


FEW_STEPS_FIRST, REST = Stage("puppet_consistency", 0.5), 0.5
MANY_STEPS = ("sampling_steps=16", "guidance_scale=1.5")  # the embedded model's
CLEAN_CONTEXT = ("from_scratch=false", "noise_augmentation_max_timestep=0", *MANY_STEPS)
METHODS: dict[str, tuple[Stage, ...]] = {
    START: (),  # as it came, sampled as configs/puppet_many_steps.yaml says
    "teacher_forcing": (Stage("puppet_diffusion", overrides=CLEAN_CONTEXT),),
    "diffusion_forcing": (Stage("puppet_diffusion_forcing", overrides=MANY_STEPS),),
    "ode_init": (Stage("puppet_ode"),),
    "consistency": (Stage("puppet_consistency"),),  # teacher forcing in few steps
    "self_forcing_dmd": (FEW_STEPS_FIRST, Stage("puppet_dmd_streams", REST)),
    "self_forcing_sid": (FEW_STEPS_FIRST, Stage("puppet_sid", REST)),
    "self_forcing_gan": (FEW_STEPS_FIRST, Stage("puppet_gan", REST)),
}


# --- training ---


def trained(method: str, seed: int, args: argparse.Namespace) -> Path:
    """The method's model folder, after training what is not there yet. Stages that methods share are run once."""
    if method in args.given:
        return Path(args.given[method])
    model, name = args.start, ""
    for stage in METHODS[method]:
        name += f"{'-' if name else ''}{stage.config}_{stage.share:g}"
        run_dir = args.work / "runs" / f"{name}_seed{seed}"
        arguments = ["--config_path", f"configs/{stage.config}.yaml", "--logdir", str(run_dir), "--no_visualize"]
        arguments += [*length(stage, args), f"seed={seed}", f"model_name={model}", *helpers(stage, args)]
        launch("train.py", [*arguments, *stage.overrides, *args.overrides], args)
        model = run_dir / "export"
    return Path(model)


def length(stage: Stage, args: argparse.Namespace) -> list[str]:
    """Equal time, or equal steps where there is no time to speak of."""
    if args.steps is not None:
        return ["max_seconds=null", f"max_steps={max(1, round(stage.share * args.steps))}"]
    return ["max_steps=null", f"max_seconds={stage.share * args.seconds}"]


def helpers(stage: Stage, args: argparse.Namespace) -> list[str]:
    """Settings that name the teacher and the ODE pairs, where a stage needs them."""
    if stage.config in ("puppet_dmd_streams", "puppet_sid"):
        return [f"distillation.real_name={teacher(args)}"]
    if stage.config == "puppet_gan":
        return [f"distillation.fake_name={teacher(args)}"]
    if stage.config == "puppet_ode":
        return [f"data.path={ode_pairs(args)}"]
    return []


def teacher(args: argparse.Namespace) -> Path:
    """The bidirectional teacher's model folder, after training it if none is given."""
    if args.teacher is None:
        run_dir, stage = args.work / "runs" / "teacher", Stage("puppet_teacher")
        arguments = ["--config_path", f"configs/{stage.config}.yaml", "--logdir", str(run_dir), "--no_visualize"]
        launch("train.py", [*arguments, *length(stage, args), f"model_name={args.start}", *args.overrides], args)
        args.teacher = run_dir / "export"
    return args.teacher


def ode_pairs(args: argparse.Namespace) -> Path:
    """The folder of ODE trajectories, after making them if none is given: the start model's own, block by block."""
    if args.ode_pairs is None:
        folder = args.work / "ode_pairs"
        arguments = ["--config_path", "configs/puppet_ode.yaml", "--puppet_captions", str(args.num_pairs)]
        arguments += ["--causal_teacher", "--output", str(folder), "--batch_size", str(args.batch_size)]
        launch("scripts/generate_ode_pairs.py", [*arguments, f"model_name={args.start}", *args.overrides], args)
        args.ode_pairs = folder
    return args.ode_pairs


def launch(program: str, arguments: list[str], args: argparse.Namespace) -> None:
    """A program of ours on one GPU or, under torchrun, on more. What is finished comes back at once."""
    logger.info("%s %s", program, " ".join(arguments))
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={args.num_gpus}"] if args.num_gpus > 1 else []
    code = subprocess.run([sys.executable, *torchrun, str(ROOT / program), *arguments]).returncode
    if code:
        raise RuntimeError(f"{program} ended with {code}; what it said stands above")


# --- measuring ---


def sampler_config(method: str, model: Path, args: argparse.Namespace) -> Config:
    """How the method's model is sampled: as its last stage says."""
    stage = METHODS[method][-1] if METHODS[method] else Stage("puppet_many_steps")
    sampling = [f"model_name={model}", "generator_ckpt=null", "use_ema=false", f"device={args.device}"]
    return load_config(f"configs/{stage.config}.yaml", [*stage.overrides, *args.overrides, *sampling])


def passes_per_block(config: Config) -> int:
    """Network passes that a block of a stream costs."""
    if config.denoising_step_list:
        return len(config.denoising_step_list) + (1 if config.clean_context else 0)
    paths = 1 if config.guidance_scale == 1 else 2
    return paths * (config.sampling_steps + (1 if config.clean_context else 0))


def pixel_span(first: int, last: int) -> slice:
    """Pictures of latents first .. last - 1: the first latent of a video is one picture, every other four."""
    return slice(0 if first == 0 else 4 * first - 3, 4 * last - 3)


def horizon_spans(args: argparse.Namespace) -> dict[str, slice]:
    return {f"{first}-{last - 1}": pixel_span(first, last) for first, last in pairwise([0, *args.horizons])}


def judged(
    videos: Tensor, scenes: Scenes, judges: Judges, references: dict[str, Tensor], args: argparse.Namespace
) -> dict:
    """Figures of every horizon, each against true puppets of other scenes at the same moments."""
    started, rows = time.monotonic(), {}
    for horizon, span in horizon_spans(args).items():
        figures = measure(videos[:, span], scenes, judges, references[horizon], start_frame=span.start)
        rows[horizon] = {name: figures[name] for name in FIGURES}
    logger.info("judged in %.0f s", time.monotonic() - started)
    return rows


def reference_features(judges: Judges, args: argparse.Namespace, sample_seed: int) -> dict[str, Tensor]:
    """What the judges see in true puppets of other scenes, by horizon."""
    others = sample_scenes(args.num_prompts, REFERENCE_SEED + sample_seed, "heldout")
    return {name: features_of(truth(others, span, args), judges) for name, span in horizon_spans(args).items()}


def truth(scenes: Scenes, span: slice, args: argparse.Namespace) -> Tensor:
    """True videos of the scenes from span.start on, uint8 on the CPU."""
    parts = []
    for first in range(0, len(scenes), args.batch_size):
        some = scenes.select(slice(first, first + args.batch_size)).to(args.device)
        parts.append(to_bytes(render(some, span.stop - span.start, span.start, size=args.size) * 0.5 + 0.5).cpu())
    return torch.cat(parts)


def sampler(method: str, model: Path, args: argparse.Namespace) -> CausalDiffusionInferencePipeline:
    """The method's pipeline. On a GPU its passes are replayed, not compiled, which would take longer than the streams:
    the recipe's `compile` is for training."""
    pipeline = build_pipeline(replace(sampler_config(method, model, args), compile="off"))
    if pipeline.device.type == "cuda":
        pipeline.record_passes(CudaRecorder(pipeline.device))
    return pipeline


def streams(
    pipeline: CausalDiffusionInferencePipeline, prompts: list[str], sample_seed: int, args: argparse.Namespace
) -> Tensor:
    """The model's videos of all horizons, uint8 on the CPU."""
    videos, started = [], time.monotonic()
    for first in range(0, len(prompts), args.batch_size):
        some = prompts[first : first + args.batch_size]
        blocks = pipeline.stream(
            text_prompts=some,
            seeds=[10_000 * sample_seed + first + i for i in range(len(some))],
            num_frames=args.horizons[-1],
            height=args.size,
            width=args.size,
        )
        videos.append(torch.cat([to_bytes(block).cpu() for block in blocks], dim=1))
        logger.info("%d of %d streams, %.0f s", first + len(some), len(prompts), time.monotonic() - started)
    return torch.cat(videos)


def kept(name: str, facts: dict, make: Callable[[], dict], args: argparse.Namespace) -> dict:
    """Figures that are measured once: read back where they were measured under the same facts."""
    path = args.work / "figures" / f"{name}.json"
    facts |= {"n": args.num_prompts, "horizons": args.horizons, "size": args.size, "judges": str(args.judges)}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["facts"] == facts:
            return known["horizons"]
    rows = make()
    write(path, {"facts": facts, "horizons": rows})
    return rows


def groups(
    method: str, model: Path, seed: int, judges: Judges, references: References, args: argparse.Namespace
) -> list[dict]:
    """Figures of one training seed under every sampling seed, and a contact sheet each."""
    weights = fingerprint(*sorted(model.glob("diffusion_pytorch_model*.safetensors")))
    facts = {"weights": weights, "passes": passes_per_block(sampler_config(method, model, args)), "set": args.overrides}
    pipeline = functools.cache(partial(sampler, method, model, args))  # not built where all is measured

    def make(sample_seed: int, name: str) -> dict:
        scenes, prompts = held_out(sample_seed, args)
        videos = streams(pipeline(), prompts, sample_seed, args)
        contact_sheet(videos[:6], prompts[:6], args.work / "sheets" / f"{name}.png", frames=12)
        return judged(videos, scenes, judges, references(sample_seed), args)

    names = {sample_seed: f"{method}_seed{seed}_sampling{sample_seed}" for sample_seed in args.sample_seeds}
    return [kept(name, facts, partial(make, sample_seed, name), args) for sample_seed, name in names.items()]


def held_out(sample_seed: int, args: argparse.Namespace) -> tuple[Scenes, list[str]]:
    scenes = sample_scenes(args.num_prompts, SCENE_SEED + sample_seed, "heldout")
    return scenes, captions(scenes, SCENE_SEED + sample_seed, full=True)


def true_group(sample_seed: int, judges: Judges, references: References, args: argparse.Namespace) -> dict:
    """What the true puppets of the same prompts get: the ceiling."""

    def make() -> dict:
        scenes, _ = held_out(sample_seed, args)
        whole = truth(scenes, pixel_span(0, args.horizons[-1]), args)
        return judged(whole, scenes, judges, references(sample_seed), args)

    return kept(f"ground_truth_sampling{sample_seed}", {}, make, args)


def write(path: Path, content: dict) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--given", nargs="*", default=[], metavar="METHOD=FOLDER", help="models that are trained")
    parser.add_argument("--start", type=Path, default=Path("wan_models/puppet-tiny"), help="where every method begins")
    parser.add_argument("--teacher", type=Path, help="model folder of the bidirectional teacher; default: train one")
    parser.add_argument("--ode_pairs", type=Path, help="folder of ODE trajectories; default: make them")
    parser.add_argument("--num_pairs", type=int, default=4096, help="ODE trajectories to make")
    parser.add_argument("--seconds", type=float, default=600.0, help="training time of a method")
    parser.add_argument("--steps", type=int, help="optimizer steps of a method, instead of --seconds")
    parser.add_argument("--train_seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sample_seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--train_only", action="store_true", help="measure in another run")
    parser.add_argument("--num_prompts", type=int, default=64, help="streams of a group")
    parser.add_argument("--horizons", type=int, nargs="+", default=[21, 63, 252], help="latents where horizons end")
    parser.add_argument("--batch_size", type=int, default=16, help="streams at a time")
    parser.add_argument("--size", type=int, default=128, help="side of a picture")
    parser.add_argument("--num_gpus", type=int, default=1, help="for training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="for measuring")
    parser.add_argument("--judges", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--work", type=Path, default=Path("logs/train_test_gap"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_test_gap.json"))
    parser.add_argument("--docs", type=Path, help="folder for table and plot, e.g. docs")
    parser.add_argument("--toy", action="store_true", help="sizes for a CPU: it proves the road, not the claim")
    parser.add_argument("--set", dest="overrides", nargs="*", default=[], metavar="KEY=VALUE", help="for every run")
    args = parser.parse_args(argv)
    args.given = dict(item.split("=", 1) for item in args.given)
    unknown = sorted(set(args.given) - set(METHODS))
    if unknown:
        raise ValueError(f"--given names {', '.join(unknown)}; methods are {', '.join(METHODS)}")
    if args.toy:
        args.steps, args.num_prompts, args.batch_size, args.size, args.num_pairs = args.steps or 2, 2, 2, 32, 2
        args.horizons, args.sample_seeds = [12], args.sample_seeds[:2]
        toy = ["height=32", "width=32", "batch_size=2", "compile=false", "num_training_frames=6", "sampling_steps=2"]
        toy += ["distillation.num_grad_frames=3"]
        toy += ["model_kwargs.local_attn_size=6", "data.pool_size=4", "data.min_fill=4", "data.encode_batch_size=2"]
        args.overrides = [*toy, f"device={args.device}", *args.overrides]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.train_only:
        for method, seed in product(args.methods, args.train_seeds):
            trained(method, seed, args)
        return 0
    judges = load_judges(args.judges, args.device)
    references = functools.cache(partial(reference_features, judges, args))
    truths = [true_group(seed, judges, references, args) for seed in args.sample_seeds]
    measured = {"ground_truth": truths}
    passes: dict[str, int] = {}
    for method in args.methods:
        rows = []
        for seed in args.train_seeds if METHODS[method] and method not in args.given else [0]:
            model = trained(method, seed, args)
            rows += groups(method, model, seed, judges, references, args)
            passes[method] = passes_per_block(sampler_config(method, model, args))
        measured[method] = rows
        write(args.out, conclude(measured, passes, args))
    results = {name: summary(rows) for name, rows in measured.items()}
    text = table(results, passes)
    print(text)
    if args.docs:
        args.docs.mkdir(parents=True, exist_ok=True)
        (args.docs / "train_test_gap.md").write_text("# The train-test gap\n\n" + text, encoding="utf-8")
        plot(args.docs / "train_test_gap.png", results)
    return 0


def conclude(measured: dict[str, list[dict]], passes: dict[str, int], args: argparse.Namespace) -> dict:
    """The whole content of --out, as far as it is known; measured: every method's groups."""
    results = {name: summary(rows) for name, rows in measured.items()}
    report = {
        "methods": {name: {"passes_per_block": passes.get(name), "horizons": rows} for name, rows in results.items()},
        "groups": {"train_seeds": args.train_seeds, "sample_seeds": args.sample_seeds, "streams": args.num_prompts},
        "training": f"{args.steps} steps" if args.steps is not None else f"{args.seconds} s on {args.num_gpus} GPU(s)",
        "given": args.given,
        "toy": args.toy,
        "machine": describe_machine(args.device),
    }
    if CHAMPION in results and BASELINE in results:
        report |= beats(measured[CHAMPION], measured[BASELINE], len(args.sample_seeds))
        many_steps = START if START in results else BASELINE
        report["student_accuracy_drop_points"] = accuracy_drop(results[CHAMPION], results[many_steps])
        report["passes_ratio"] = round(passes[many_steps] / passes[CHAMPION], 2)
    return report


if __name__ == "__main__":
    sys.exit(main())
