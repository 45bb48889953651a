"""What benchmarks/realtime.py measured, as a Markdown table: one column per run, one row per figure."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROWS = {  # title: (path into the JSON, format)
    "frames/s, transformer": ("fps_transformer", "{:.1f}"),
    "frames/s, with VAE": ("fps_with_vae", "{:.1f}"),
    "frames/s, a client's": ("fps_client", "{:.1f}"),
    "first frame, s": ("first_frame_s", "{:.2f}"),
    "first frame, cold, s": ("cold_first_frame_s", "{:.2f}"),
    "first frame, from the process's start, s": ("process_first_frame_s", "{:.1f}"),
    "full speed, from the process's start, s": ("process_full_speed_s", "{:.1f}"),
    "block with VAE, p50, s": ("block_with_vae_s.p50", "{:.3f}"),
    "block with VAE, p99, s": ("block_with_vae_s.p99", "{:.3f}"),
    "CPU seconds a block, with VAE": ("cpu_s_per_block", "{:.3f}"),
    "block, transformer, p50, s": ("block_transformer_s.p50", "{:.3f}"),
    "block, transformer, p99, s": ("block_transformer_s.p99", "{:.3f}"),
    "steady frames/s, transformer": ("steady_fps_transformer", "{:.1f}"),
    "steady frames/s, with VAE": ("steady_fps_with_vae", "{:.1f}"),
    "steady block, first tenth, p50, s": ("steady_tenths.0.p50", "{:.3f}"),
    "steady block, last tenth, p50, s": ("steady_tenths.-1.p50", "{:.3f}"),
    "steady block, first tenth, CPU s": ("steady_tenths.0.cpu_s", "{:.4f}"),
    "steady block, last tenth, CPU s": ("steady_tenths.-1.cpu_s", "{:.4f}"),
    "memory in the first tenth, GB": ("steady_tenths.0.gb", "{:.3f}"),
    "memory in the last tenth, GB": ("steady_tenths.-1.gb", "{:.3f}"),
    "peak memory, GB": ("peak_gb", "{:.2f}"),
    "KV cache, GB": ("kv_cache_gb", "{:.3f}"),
    "GFLOP a block, transformer": ("flops.transformer_block", "{:.1f}"),
    "GFLOP a block, VAE": ("flops.vae_block", "{:.1f}"),
    "passes a block": ("flops.passes", "{:.0f}"),
    "error of latents, relative": ("error.latents_relative", "{:.1e}"),
    "error of pixels, dB PSNR": ("error.pixels_psnr_db", "{:.1f}"),
    "loading, s": ("load_s", "{:.1f}"),
}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile (the slowest of fewer than 100)."""
    ordered = sorted(seconds)
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What the figures hang on: hardware, clocks and versions."""
    facts: dict[str, str | int] = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,driver_version", "--format=csv,noheader"]
        answer = subprocess.run([*query, f"--id={device.index or 0}"], capture_output=True, text=True, check=False)
        facts |= {
            "device": torch.cuda.get_device_name(device),
            "clocks, power, driver": answer.stdout.strip(),
            "cuda": torch.version.cuda or "",
            "cudnn": torch.backends.cudnn.version() or 0,
        }
    else:
        threads, load = torch.get_num_threads(), os.getloadavg()[0]
        facts |= {"device": f"{processor()}, {os.cpu_count()} cores", "threads": threads, "load average": f"{load:.1f}"}
    return facts


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def look_up(result: Mapping, path: str):
    """What lies at a path like "flops.passes" or "steady_tenths.-1.gb"; None where nothing does."""
    for key in path.split("."):
        if isinstance(result, Sequence):
            result = result[int(key)]
        else:
            result = result.get(key) if isinstance(result, Mapping) else None
    return result


def cell(result: Mapping, path: str, form: str) -> str:
    value = look_up(result, path)
    if value is None:
        equal = path == "error.pixels_psnr_db" and "error" in result
        return "equal" if equal else ""
    return form.format(value / 1e9 if path.startswith("flops.") and path != "flops.passes" else value)


def markdown(results: Mapping[str, Mapping]) -> str:
    """One column per named result; with two, a third: what the second makes of the first."""
    names, two = list(results), len(results) == 2
    lines = [row("", names, "ratio" if two else None), "|---|" + "--:|" * (len(names) + two)]
    for key in sorted({key for result in results.values() for key in result["settings"]} - {"preset"}):
        values = [result["settings"].get(key, "") for result in results.values()]
        if len(names) == 1 or any(value != values[0] for value in values):
            lines.append(row(key, values, "" if two else None))
    for title, (path, form) in ROWS.items():
        cells = [cell(result, path, form) for result in results.values()]
        if any(cells):
            lines.append(row(title, cells, quotient(results, path) if two else None))
    machines = {", ".join(f"{key} {value}" for key, value in r["machine"].items()): name for name, r in results.items()}
    lines += ["", *(f"{name}: {machine}  " for machine, name in machines.items())]
    return "\n".join(lines) + "\n"


def row(title: str, cells: Sequence, last: str | None = None) -> str:
    return "| " + " | ".join(str(item) for item in (title, *cells, *([] if last is None else [last]))) + " |"


def quotient(results: Mapping[str, Mapping], path: str) -> str:
    first, second = (look_up(result, path) for result in results.values())
    return f"{second / first:.2f}" if first and second else ""
