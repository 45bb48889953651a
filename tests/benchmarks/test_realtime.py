"""benchmarks/realtime.py and compare.py on the CPU: the whole road at toy size, and the arithmetic of the figures."""

import json
from pathlib import Path

import pytest

from benchmarks import compare, realtime, variants
from benchmarks.stream_report import markdown, percentiles
from utils.config import load_config

PRESETS = sorted(realtime.PRESETS.glob("*.yaml"))
FOUR = ("fps_transformer", "fps_with_vae", "fps_client", "first_frame_s")


def run(folder: Path, model: Path, name: str, *more: str) -> dict:
    files = ["--json", str(folder / f"{name}.json"), "--markdown", str(folder / f"{name}.md")]
    settings = [f"model_name={model}", "lora_ckpt=null", "height=32", "width=32", "num_output_frames=6", "device=cpu"]
    assert realtime.main(["--preset", "embedded", *files, *settings, *more]) == 0
    return json.loads((folder / f"{name}.json").read_text())


def test_four_figures_an_error_and_a_report(tmp_path: Path, tiny_model_folder: Path, capsys):
    full = run(tmp_path, tiny_model_folder, "full", "--repeats", "2", "--steady_blocks", "4")
    assert all(full[name] > 0 for name in (*FOUR, "cold_first_frame_s", "steady_fps_with_vae", "peak_gb"))
    assert full["fps_with_vae"] == max(figures["fps_with_vae"] for figures in full["rounds"])
    assert full["error"] == {"latents_relative": 0, "latents_largest": 0, "pixels_psnr_db": None}
    assert [tenth["gb"] > 0 and tenth["cpu_s"] > 0 for tenth in full["steady_tenths"]] == [True] * 4
    assert full["flops"]["passes"] == 5 and full["flops"]["vae_block"] > 0
    tiny = run(tmp_path, tiny_model_folder, "tiny", "vae_decoder=tiny", "clean_context=false")
    assert tiny["flops"]["passes"] == 4 and tiny["flops"]["vae_block"] < full["flops"]["vae_block"]
    assert tiny["error"]["latents_relative"] == 0 and tiny["error"]["pixels_psnr_db"] < 60  # only the decoder differs
    for result, name in ((full, "full"), (tiny, "tiny")):
        assert (tmp_path / f"{name}.md").read_text() == markdown({"embedded": result})
    capsys.readouterr()
    assert compare.main([str(tmp_path / "full.json"), str(tmp_path / "tiny.json")]) == 0
    table = capsys.readouterr().out
    assert "| vae_decoder | full | tiny |  |" in table and "| passes a block | 5 | 4 | 0.80 |" in table
    assert "| sink |" not in table  # settings that agree are left out
    assert "| error of pixels, dB PSNR | equal |" in table


def test_a_file_that_is_no_report_is_refused(tmp_path: Path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"other\.json is no report of benchmarks/realtime\.py"):
        compare.main([str(tmp_path / "other.json")])
    with pytest.raises(SystemExit, match="cannot be read as a report"):
        compare.main([str(tmp_path / "nowhere.json")])


def test_percentiles_of_few_and_of_many():
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 3.0}
    assert percentiles([float(i) for i in range(1000)]) == {"p50": 500.0, "p99": 990.0}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_loads(path: Path):
    config = load_config(path)
    assert config.denoising_step_list and config.guidance_scale == 1
    window = config.model_kwargs
    assert window.local_attn_size == -1 or window.sink_size == 3


def test_variants_share_their_networks_and_are_compared_with_launches(tmp_path: Path, tiny_model_folder, capsys):
    settings = [
        f"model_name={tiny_model_folder}",
        "lora_ckpt=null",
        "height=32",
        "width=32",
        "num_output_frames=6",
        "device=cpu",
    ]
    words = ["off", "off+tiny", "window+off+overlap", "off+fp8"]
    options = ["--preset", "embedded", "--json", str(tmp_path / "variants.json"), "--steady_blocks", "1"]
    assert variants.main([*options, "--variants", *words, "--settings", *settings]) == 1
    results = json.loads((tmp_path / "variants.json").read_text())
    assert list(results) == words[:3]  # float8 is refused on a CPU, and that ends only its own measurement
    equal = {"latents_relative": 0, "latents_largest": 0, "pixels_psnr_db": None}
    assert results["off"]["error"] == results["window+off+overlap"]["error"] == equal
    assert results["off+tiny"]["error"]["latents_relative"] == 0 < results["off+tiny"]["error"]["pixels_psnr_db"] < 60
    assert all(result[name] > 0 for result in results.values() for name in (*FOUR, "last_block_s", "cold_full_speed_s"))
    told = capsys.readouterr().out
    assert "linear_dtype=float8 needs a GPU" in told and "off+tiny: transformer" in told
    assert variants.main([*options, "--seconds", "0", "--settings", *settings]) == 0
    assert "max+fp8: left out, the time is over" in capsys.readouterr().out
    with pytest.raises(
        SystemExit,
        match="variant 'max\\+fp4': no word 'fp4'; there are off, default, max, fp8, int8, fastest, tiny, plainvae",
    ):
        variants.main(["--variants", "max+fp4"])


def test_every_variant_is_a_config():
    for variant in variants.VARIANTS:
        load_config(realtime.PRESETS / "exact.yaml", variants.settings_of(variant))
