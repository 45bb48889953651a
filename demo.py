"""A page that shows a video while it is made: http://127.0.0.1:7860, the embedded model, no network.

    python demo.py
    python demo.py --config_path configs/self_forcing_dmd.yaml --port 8000

One video is made at a time; a second browser tab waits its turn and says so. The page listens on this machine only.
"""

import argparse
import base64
import contextlib
import io
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from PIL import Image
from torch import Tensor

from utils.config import Config, load_config
from utils.distributed import resolve_device
from utils.errors import MissingPackageError, plain_errors, user_message
from utils.prompts import video_seed
from utils.video import to_uint8

logger = logging.getLogger(__name__)
DEFAULT_CONFIG = "configs/puppet_tiny.yaml"
FRAMES_AHEAD = 48  # made but not yet shown; the maker waits when the page falls further behind
POLL_SECONDS = 0.2  # how soon a waiting maker or page notices Stop


def jpeg_html(frame: Tensor) -> str:
    """A uint8 picture `[H, W, 3]` as an HTML image that carries its own data."""
    file = io.BytesIO()
    Image.fromarray(frame.numpy()).save(file, format="JPEG", quality=90)
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return (
        f'<img alt="video" style="width:100%;max-height:70vh;object-fit:contain" src="data:image/jpeg;base64,{data}">'
    )


class Studio:
    """One pipeline behind many browser tabs: one video at a time is made, in a thread, and handed to its tab."""

    def __init__(self, pipeline, config: Config):
        self.pipeline = pipeline
        self.config = config
        self._busy = threading.Lock()
        self._stops: dict[str, threading.Event] = {}  # of the video each tab is watching

    def stop(self, tab: str) -> None:
        """End the tab's video, if it has one, at the next block."""
        if tab in self._stops:
            self._stops.pop(tab).set()

    def watch(self, prompt: str, seed: int, steps: int, seconds: float, tab: str = "") -> Iterator[tuple[str, str]]:
        """(picture as HTML, status) for every frame, at the model's frame rate or as fast as they come.

        A tab that starts again ends its earlier video.
        """
        self.stop(tab)
        if not (prompt or "").strip():
            yield "", "Type a prompt first."
            return
        stop = self._stops[tab] = threading.Event()
        items: queue.Queue = queue.Queue(FRAMES_AHEAD)
        settings = {"prompt": prompt.strip(), "seed": int(seed or 0), "steps": int(steps), "seconds": float(seconds)}
        threading.Thread(target=self._make, kwargs={**settings, "items": items, "stop": stop}, daemon=True).start()
        picture, shown, began = "", 0, None
        try:
            yield picture, "Starting ..."
            while not stop.is_set():
                try:
                    item = items.get(timeout=POLL_SECONDS)
                except queue.Empty:
                    continue
                if item is None:
                    yield picture, f"Done: {shown} frames."
                    return
                if isinstance(item, str):
                    yield picture, item
                    continue
                began = began or time.perf_counter()
                time.sleep(max(0.0, began + shown / self.config.fps - time.perf_counter()))
                picture, shown = jpeg_html(item), shown + 1
                speed = shown / max(time.perf_counter() - began, 1 / self.config.fps)
                yield picture, f"Frame {shown}, {speed:.1f} frames/s"
            yield picture, f"Stopped after {shown} frames."
        finally:  # also when the tab is closed
            stop.set()
            if self._stops.get(tab) is stop:
                del self._stops[tab]

    def _make(self, *, prompt, seed, steps, seconds, items: queue.Queue, stop: threading.Event) -> None:
        """Fill `items` with pictures and messages, None at the end; runs in a thread."""

        def hand_over(item) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    items.put(item, timeout=POLL_SECONDS)
                    return

        if not self._busy.acquire(blocking=False):
            hand_over("Another video is being made; yours starts when it is finished or stopped.")
            while not self._busy.acquire(timeout=POLL_SECONDS):
                if stop.is_set():
                    return
        try:
            self.pipeline.sampling_steps = steps
            for pixels in self.pipeline.stream(
                text_prompts=[prompt],
                seeds=[video_seed(seed, prompt)],  # the video that inference.py makes of the same words and seed
                num_frames=self.latent_frames(seconds),
                height=self.config.height,
                width=self.config.width,
                first_frame_alone=True,
            ):
                for frame in to_uint8(pixels[0]):
                    hand_over(frame)
                if stop.is_set():
                    return
            hand_over(None)
        except Exception as error:
            logger.exception("the video could not be made")
            hand_over(f"Error: {user_message(error) or error}")
            hand_over(None)
        finally:
            self._busy.release()

    def latent_frames(self, seconds: float) -> int | None:
        """Whole blocks that last at least `seconds`; None, endless, for 0."""
        if seconds <= 0:
            return None
        first, block = int(self.config.independent_first_frame), self.config.num_frame_per_block
        latents = 1 + max(0, -(-(round(seconds * self.config.fps) - 1) // 4))
        return first + max(1, -(-(latents - first) // block)) * block


def warm_up(pipeline, config: Config) -> None:
    """Make a video that nobody sees: compiling and recording happens now, not before a visitor's eyes."""
    began = time.perf_counter()
    size = {"height": config.height, "width": config.width}
    options = {"num_frames": config.num_output_frames, "first_frame_alone": True, **size}
    done = 0
    for pixels in pipeline.stream(text_prompts=["warming up"], seeds=[0], **options):
        done, seconds = done + pixels.shape[1], time.perf_counter() - began
        logger.info("compile=%s: %d frames of a first video, %.0f s", config.compile, done, seconds)


def build_page(studio: Studio):
    """The Gradio page around a studio."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # else start-up looks for the internet
    try:
        import gradio as gr
    except ImportError as error:
        raise MissingPackageError('the demo needs Gradio: pip install -e ".[demo]"') from error

    def start(prompt, seed, steps, seconds, request: gr.Request):
        yield from studio.watch(prompt, seed, steps, seconds, tab=request.session_hash)

    def stop(request: gr.Request):
        studio.stop(request.session_hash)

    config = studio.config
    many_steps = config.denoising_step_list is None
    with gr.Blocks(title="LongTake", analytics_enabled=False) as page:
        gr.Markdown(f"# LongTake\n{config.model_name}, {config.width}x{config.height}, {config.fps} frames per second")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Prompt", lines=4, placeholder="a red puppet waves before a blue wall")
                with gr.Row():
                    seed = gr.Number(label="Seed", value=config.seed, precision=0)
                    length = gr.Slider(0, 60, value=5, step=1, label="Seconds (0: until stopped)")
                steps = gr.Slider(
                    2, 50, value=config.sampling_steps, step=1, label="Steps per block", visible=many_steps
                )
                with gr.Row():
                    start_button = gr.Button("Start", variant="primary")
                    stop_button = gr.Button("Stop")
            with gr.Column(scale=3):
                picture = gr.HTML(label="Video", min_height=360)
                status = gr.Textbox(label="Status", interactive=False)
        gr.on(
            [start_button.click, prompt.submit],
            start,
            [prompt, seed, steps, length],
            [picture, status],
            concurrency_limit=None,  # the studio queues, and says so
            show_progress="hidden",
            trigger_mode="multiple",  # Start during a video begins the next one
            api_name="watch",
        )
        stop_button.click(stop, queue=False, api_name="stop")
        page.unload(stop)
    return page


@plain_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default=DEFAULT_CONFIG, help=f"YAML of settings (default: {DEFAULT_CONFIG})")
    parser.add_argument("--checkpoint_path", help="the generator's weights; none: those of the model folder")
    parser.add_argument("--use_ema", action="store_true", help="take generator_ema from the checkpoint")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--port", type=int, default=7860, help="of http://127.0.0.1 (default: 7860)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any setting of utils/config.py")
    arguments = parser.parse_intermixed_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    flags = {
        "generator_ckpt": arguments.checkpoint_path,
        "use_ema": arguments.use_ema or None,
        "device": arguments.device,
    }
    config = replace(
        load_config(arguments.config_path, arguments.overrides),
        **{name: value for name, value in flags.items() if value is not None},
    )

    from pipeline.build import build_pipeline

    pipeline = build_pipeline(config, resolve_device(config.device))
    if config.compiles:
        warm_up(pipeline, config)
    build_page(Studio(pipeline, config)).launch(server_name="127.0.0.1", server_port=arguments.port, share=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
