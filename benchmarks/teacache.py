"""What TeaCache saves and what it costs: time and error at three thresholds, beside simply taking fewer steps.

    python benchmarks/teacache.py                                  # the embedded model on this machine's CPU
    python benchmarks/teacache.py --config_path CONFIG --thresholds 0.05 0.1 0.2 device=cuda sampling_steps=50

Errors are against the video of the same seed with every step computed: of the latents of the first block (which differ
by what was left out and nothing else) and of the whole stream (where later blocks go on from a changed past). "fewer
steps" is the honest rival: the sampler with as many steps as TeaCache computes.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from pipeline.build import build_pipeline, weights_fingerprint
from pipeline.teacache import TeaCache
from scripts.calibrate_teacache import calibrate
from utils.config import load_config
from utils.errors import plain_errors
from utils.prompts import read_prompts, video_seed

ROOT = Path(__file__).resolve().parents[1]


def walk(pipeline, prompts: Sequence[str], options: dict) -> tuple[list[Tensor], float]:
    """Latents of one video per prompt, and the fastest seconds of a video, the VAE left out.

    On a CPU they are seconds of this process, which others on the machine disturb less than the clock's.
    """
    clock = time.process_time if pipeline.device.type == "cpu" else time.perf_counter
    videos, seconds = [], []
    for prompt in prompts:
        began = clock()
        with torch.no_grad():
            blocks = [
                latents for latents, _ in pipeline._walk(None, [prompt], seeds=[video_seed(1, prompt)], **options)
            ]
        videos.append(torch.cat(blocks, dim=1).cpu())  # waits for the device
        seconds.append(clock() - began)
    return videos, min(seconds)


def errors(pipeline, videos: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    """Relative L2 error of latents, and PSNR of pixels, against the exact videos."""
    first = pipeline.num_frame_per_block

    def relative(part: slice) -> float:
        pairs = [(v[:, part], e[:, part]) for v, e in zip(videos, exact, strict=True)]
        return sum(((v - e).norm() / e.norm()).item() for v, e in pairs) / len(pairs)

    decoded = [[(pipeline.vae.decode_to_pixel(v) + 1) / 2 for v in some] for some in (videos, exact)]
    mse = sum((v - e).square().mean().item() for v, e in zip(*decoded, strict=True)) / len(videos)
    return {
        "first_block_error": round(relative(slice(0, first)), 4),
        "stream_error": round(relative(slice(None)), 4),
        "psnr": round(-10 * torch.tensor(max(mse, 1e-10)).log10().item(), 2),
    }


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/puppet_many_steps.yaml", help="of a many-step model")
    parser.add_argument("--data_path", type=Path, default=ROOT / "prompts" / "puppet_world.txt")
    parser.add_argument("--num_prompts", type=int, default=4, help="to measure with; as many others calibrate")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.1, 0.2, 0.4])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "teacache.json")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of utils/config.py")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config_path, ["compile=off", *arguments.overrides, "teacache=0"])
    pipeline, steps = build_pipeline(config), config.sampling_steps
    texts = [prompt.text for prompt in read_prompts(arguments.data_path)]
    prompts, others = texts[: arguments.num_prompts], texts[-arguments.num_prompts :]
    options = {"num_frames": config.num_output_frames, "height": config.height, "width": config.width}
    calibration = calibrate(pipeline, others, *options.values(), weights_fingerprint(config))

    pipeline.teacache = None
    exact, full_seconds = walk(pipeline, prompts, options)
    result = {
        "model": config.model_name,
        "weights": calibration.weights,
        "prompts": len(prompts),
        "latents": config.num_output_frames,
        "solver": config.solver,
        "steps": steps,
        "guidance_scale": config.guidance_scale,
        "machine": torch.cuda.get_device_name() if pipeline.device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "coefficients": calibration.coefficients,
        "seconds_all_steps": round(full_seconds, 2),
        "teacache": [],
    }
    for threshold in arguments.thresholds:
        pipeline.teacache = TeaCache(calibration.coefficients, threshold)
        videos, seconds = walk(pipeline, prompts, options)
        plan = pipeline._steps_computed(0)
        entry = {"threshold": threshold, "computed": sum(plan), "plan": "".join("x" if c else "." for c in plan)}
        entry |= {"seconds": round(seconds, 2), "speed": round(full_seconds / seconds, 2)}
        entry |= errors(pipeline, videos, exact)
        pipeline.teacache, pipeline.sampling_steps = None, sum(plan)
        videos, seconds = walk(pipeline, prompts, options)
        pipeline.sampling_steps = steps
        entry["fewer_steps"] = {"seconds": round(seconds, 2), **errors(pipeline, videos, exact)}
        result["teacache"].append(entry)
        print(json.dumps(entry), flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
