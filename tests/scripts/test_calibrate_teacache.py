"""A calibration is found by the next run, and knows the weights it was made for."""

import json
import shutil

from pipeline.build import build_pipeline
from scripts import calibrate_teacache
from utils.config import load_config


def test_a_calibration_is_used_by_the_pipeline(tiny_model_folder, tmp_path, capsys, caplog):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    settings = [f"model_name={folder}", "device=cpu", "height=32", "width=32", "num_output_frames=3"]
    assert calibrate_teacache.main(["--num_prompts", "2", *settings, "sampling_steps=6"]) == 0
    found = json.loads((folder / "teacache.json").read_text())
    assert len(found["coefficients"]) == 5 and len(found["measured"]) == 5
    assert "step 6: modulation changes by" in capsys.readouterr().out
    pipeline = build_pipeline(load_config(None, [*settings, "teacache=0.2"]))
    assert pipeline.teacache.coefficients == tuple(found["coefficients"]) and "other weights" not in caplog.text
    assert calibrate_teacache.main(["denoising_step_list=[1000]", *settings]) == 1
    assert "a few-step model computes every step" in capsys.readouterr().err
