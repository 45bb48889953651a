"""Attention kernels at the shapes of the presets, beside each other: milliseconds, TFLOP/s, error against float32.

    python benchmarks/attention.py --json attention.json            # under a minute on one GPU, compiling included
    python benchmarks/attention.py --backends sdpa int8 --shapes 4680x18720 --no_tiles

Queries are those of a block of 3 latents of 832x480 (and of three of them), keys those of windows of 9, 12 and 21.
Inputs are normally distributed bfloat16, keys with an offset per channel; keys and values are a view of a longer cache.
Milliseconds are GPU time, the median of several replays of a CUDA graph, so that launches do not count; a product is
4 Lq Lk N D operations, whatever its precision. Rounding of keys and values is part of an 8-bit backend's time, and told
on its own. Then other tiles of the 8-bit kernels are tried (`TILES` of wan/modules/triton_attention.py).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.stream_report import describe_machine
from pipeline.attention_choice import exact, relative_error, spread
from wan.modules.attention import attention, available_backends
from wan.modules.attention_8bit import ROUNDINGS

SHAPES = ["4680x14040", "4680x18720", "4680x32760", "14040x18720", "14040x32760"]
OTHER_TILES = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3)]


def make_inputs(num_queries: int, num_keys: int, heads: int, head_dim: int, device: torch.device) -> tuple[Tensor, ...]:
    """q [1, Lq, N, D], k and v [1, Lk, N, D]; what lies behind the last key is NaN."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, heads, head_dim, generator=generator, device=device)

    slabs = [torch.full((1, num_keys + 64, heads, head_dim), float("nan"), device=device) for _ in range(2)]
    for slab, offset in zip(slabs, (draw(1), 0), strict=True):
        slab[:, :num_keys] = draw(num_keys) + offset
    return draw(num_queries).bfloat16(), *(slab.bfloat16()[:, :num_keys] for slab in slabs)


def milliseconds(function: Callable[[], object], device: torch.device, budget: float = 0.1) -> float:
    """Median time of a call."""
    function()
    if device.type != "cuda":
        return statistics.median(timed_call(function) for _ in range(3))
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    times: list[float] = []
    while len(times) < 5 or (sum(times) < budget * 1e3 and len(times) < 100):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[1:])


def timed_call(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def figures(function: Callable[[], Tensor], tensors: tuple[Tensor, ...], expected: Tensor) -> dict[str, float]:
    """Time, rate and error of one way to compute attention."""
    q, k, _ = tensors
    ms = milliseconds(function, q.device)
    work = 4 * q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
    return {"ms": ms, "tflops": work / ms / 1e9, "error": relative_error(spread(function()), expected)}


def line(result: dict[str, float] | str) -> str:
    if isinstance(result, str) or "error" not in result:
        return result if isinstance(result, str) else f"{result['ms']:8.3f} ms"
    return f"{result['ms']:8.3f} ms {result['tflops']:7.0f} TFLOP/s  error {result['error']:.2e}"


def rounding_alone(backend: str, tensors: tuple[Tensor, ...]) -> float:
    """Milliseconds of what comes before the attention of an 8-bit backend."""
    from wan.modules.triton_attention import TILES, round_keys

    _, k, v = tensors
    scores, values, _ = ROUNDINGS[backend]
    return milliseconds(lambda: round_keys(k, v, int8_scores=scores, values_8bit=values, tile=TILES[values]), k.device)


def with_tile(backend: str, tile: Sequence[int], tensors: tuple[Tensor, ...], expected: Tensor) -> dict | str:
    """Figures of one 8-bit backend with another tile, or why there are none."""
    from wan.modules.triton_attention import Tile
    from wan.modules.triton_attention import attention as rounded_attention

    scores, values, _ = ROUNDINGS[backend]
    try:
        return figures(lambda: rounded_attention(*tensors, scores, values, Tile(*tile)), tensors, expected)
    except Exception as error:  # shared memory or registers of this GPU: the other tiles are still worth a look
        return told(error)


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.120}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", help="default: all that can be had here")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="LqxLk", help=" ".join(SHAPES))
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--no_tiles", action="store_true", help="only the default tile of 8-bit kernels")
    parser.add_argument("--seconds", type=float, default=45, help="nothing new begins after so many")
    parser.add_argument("--json", type=Path, help="write the figures here, anew after every one")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    began = time.perf_counter()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    backends = arguments.backends or available_backends(device)
    results: dict = {"machine": describe_machine(device), "heads": [arguments.heads, arguments.head_dim], "shapes": {}}
    print(", ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)

    def report(shape: str, name: str, result: dict[str, float] | str) -> None:
        results["shapes"].setdefault(shape, {})[name] = result
        print(f"{shape:>12} {name:<28} {line(result)}  [{time.perf_counter() - began:.0f} s]", flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def is_over() -> bool:
        return time.perf_counter() - began > arguments.seconds

    for shape in arguments.shapes:
        num_queries, num_keys = map(int, shape.split("x"))
        tensors = make_inputs(num_queries, num_keys, arguments.heads, arguments.head_dim, device)
        expected = exact(*tensors)
        for backend in backends:
            if is_over():
                print(f"{shape} {backend}: left out, the time is over", flush=True)
                continue
            try:
                report(shape, backend, figures(lambda b=backend, t=tensors: attention(*t, b), tensors, expected))
            except Exception as error:  # the other backends are still worth the GPU's time
                report(shape, backend, told(error))
                continue
            if backend in ROUNDINGS and device.type == "cuda":
                report(shape, f"{backend}, rounding alone", {"ms": rounding_alone(backend, tensors)})
    if device.type == "cuda" and not arguments.no_tiles:
        shape = "4680x18720"
        tensors = make_inputs(4680, 18720, arguments.heads, arguments.head_dim, device)
        expected = exact(*tensors)
        for backend, tile in product((name for name in backends if name in ROUNDINGS), OTHER_TILES):
            name = f"{backend} tile {'x'.join(map(str, tile))}"
            if is_over():
                print(f"{name}: left out, the time is over", flush=True)
            else:
                report(shape, name, with_tile(backend, tile, tensors, expected))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
