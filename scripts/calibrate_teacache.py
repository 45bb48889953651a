"""Learn how much a model's denoising steps differ, so that `teacache=0.1` can leave out those that differ little.

    python scripts/calibrate_teacache.py                                     # the embedded model
    python scripts/calibrate_teacache.py --config_path CONFIG sampling_steps=50

A few videos are made with every step computed. The fit goes to teacache.json in the model's folder (or --output), where
inference.py finds it. Other settings of the sampler (steps, solver, shift) use the same fit, other weights need their
own.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.build import TEACACHE_FILE, build_pipeline, weights_fingerprint  # noqa: E402 (ROOT is not on the path yet)
from pipeline.teacache import Calibration, ChangeMeter, TeaCache, fit, modulation_changes  # noqa: E402
from utils.config import ConfigError, load_config  # noqa: E402
from utils.errors import plain_errors  # noqa: E402
from utils.prompts import read_prompts, video_seed  # noqa: E402
from utils.solvers import make_solver  # noqa: E402
from wan.configs import find_model_folder  # noqa: E402


def calibrate(pipeline, prompts: Sequence[str], num_frames: int, height: int, width: int, weights: str) -> Calibration:
    """Make a video of each prompt, all steps computed, and fit what was measured."""
    pipeline.teacache = TeaCache((0.0,), 0.0)
    with ChangeMeter(pipeline.generator.model) as meter:
        for prompt in prompts:
            seeds = [video_seed(0, prompt)]
            pipeline.inference(text_prompts=[prompt], seeds=seeds, num_frames=num_frames, height=height, width=width)
    schedule = (pipeline.solver, pipeline.sampling_steps, pipeline.generator.scheduler.shift)
    estimated_from = modulation_changes(pipeline.generator.model, make_solver(*schedule, "cpu").timesteps)
    measured = meter.changes()
    coefficients = fit(estimated_from, measured)
    return Calibration(coefficients, weights, *schedule, tuple(estimated_from.tolist()), tuple(measured.tolist()))


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/puppet_many_steps.yaml", help="of a many-step model")
    parser.add_argument(
        "--data_path", type=Path, default=ROOT / "prompts" / "puppet_world.txt", help="prompts, one a line"
    )
    parser.add_argument("--num_prompts", type=int, default=4, help="videos to make (default: 4)")
    parser.add_argument("--output", type=Path, help=f"default: {TEACACHE_FILE} in the model's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of utils/config.py")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = load_config(arguments.config_path, ["compile=off", *arguments.overrides, "teacache=0"])
    if config.denoising_step_list is not None:
        raise ConfigError("a few-step model computes every step; calibrate a many-step one (denoising_step_list=null)")
    prompts = [prompt.text for prompt in read_prompts(arguments.data_path)][: arguments.num_prompts]
    size = (config.num_output_frames, config.height, config.width)
    found = calibrate(build_pipeline(config), prompts, *size, weights_fingerprint(config))
    output = arguments.output or find_model_folder(config.model_name) / TEACACHE_FILE
    found.save(output)
    for number, (change, measured) in enumerate(zip(found.estimated_from, found.measured, strict=True), start=2):
        print(f"step {number}: modulation changes by {change:.3f}, what the blocks add by {measured:.3f}")
    print(f"{output}: use it with teacache=0.1 (more leaves out more)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
