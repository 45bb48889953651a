"""The TeaCache benchmark on a tiny model: every figure is there, and nothing left out is no error."""

import json

from benchmarks import teacache


def test_figures_are_written(tiny_model_folder, tmp_path):
    out = tmp_path / "teacache.json"
    settings = [f"model_name={tiny_model_folder}", "device=cpu", "height=32", "width=32", "num_output_frames=6"]
    arguments = ["--num_prompts", "1", "--out", str(out), "--thresholds", "0", "1e9", "--"]
    assert teacache.main([*arguments, *settings, "sampling_steps=6"]) == 0
    nothing, much = json.loads(out.read_text())["teacache"]
    assert nothing["plan"] == "xxxxxx" and nothing["first_block_error"] == nothing["stream_error"] == 0
    assert much["plan"] == "x....x" and much["first_block_error"] > 0 and much["fewer_steps"]["psnr"] < 100
