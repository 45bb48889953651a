"""pipeline/attention_choice.py: measured, told, and refused; on a CPU 8 bits are slow and as coarse as on a GPU."""

import pytest
import torch

from pipeline.attention_choice import choose, choose_attention, measure, own_samples, random_sample
from pipeline.build import build_pipeline
from tests.wan.modules.test_causal_model import toy_model
from utils.config import ConfigError, load_config
from wan.modules.attention import attention
from wan.modules.attention_8bit import MIN_KEYS
from wan.modules.rope import rope_frequencies

CPU = torch.device("cpu")
SIZES = {"num_frames": 4, "num_block_frames": 2, "height": 4, "width": 4}


def samples() -> dict:
    return {
        name: random_sample((1, num_queries, 1, 64), MIN_KEYS, CPU, torch.float32)
        for name, num_queries in (("random numbers", 40), ("layer 0", 30))
    }


def choice(caplog, candidates: list[str], gate: float, insisted: bool = False) -> tuple[str, str]:
    with caplog.at_level("INFO", logger="pipeline.attention_choice"):
        best = choose(candidates, samples(), gate, insisted=insisted)
    (note,) = (record.message for record in caplog.records)
    return best, note


def test_the_fastest_within_the_gate_is_taken_and_one_line_tells_why(caplog):
    best, note = choice(caplog, ["int8", "sdpa"], 0.06)
    assert best == "sdpa"  # here; in 8 bits a CPU does the same work and the rounding
    assert note.startswith(f"attention, 40 queries and {MIN_KEYS} keys: int8 ")
    assert "% off (random numbers); sdpa " in note and note.endswith("-> sdpa") and "over the gate" not in note


def test_what_is_too_coarse_is_not_taken_however_fast(caplog):
    best, note = choice(caplog, ["float8", "int8_scores"], 0.03)
    assert best == "int8_scores" and "over the gate of 3.00%; int8_scores" in note


def test_what_does_not_run_is_told(caplog):
    best, note = choice(caplog, ["cudnn", "sdpa"], 0.06)
    assert best == "sdpa" and "cudnn does not run here (RuntimeError: " in note


def test_what_was_insisted_on_is_refused(caplog):
    assert choice(caplog, ["int8"], 0.06, insisted=True)[0] == "int8"
    with pytest.raises(
        ValueError, match=r"'int8' is [34]\.\d\d% off exact attention \(.*\), attention_gate allows 1.00%"
    ):
        choose(["int8"], samples(), 0.01, insisted=True)
    with pytest.raises(RuntimeError):
        choose(["cudnn"], samples(), 0.06, insisted=True)
    with pytest.raises(ValueError, match="no attention backend is within it: int8 .*; set a larger attention_gate, or"):
        choose(["int8", "float8"], samples(), 0.01, insisted=False)


def test_nan_is_over_every_gate():
    q, k, v = random_sample((1, 4, 1, 64), 9, CPU, torch.float32)
    found = measure("sdpa", {"poisoned": (q, k, v * float("nan"))}, {"poisoned": attention(q, k, v)})
    assert found.error == float("inf")


@pytest.mark.parametrize("causal", [True, False])
def test_a_models_own_numbers_are_what_its_layers_see(causal: bool):
    """Of the first layer computed by hand; queries are those of the last block."""
    model = toy_model(num_frame_per_block=2)
    found = own_samples(model, **(SIZES if causal else SIZES | {"num_block_frames": 4}))
    tokens = 4 * model.config.tokens_per_frame(4, 4)
    num_queries = tokens // 2 if causal else tokens
    assert {name: [x.shape[1] for x in sample] for name, sample in found.items()} == {
        f"layer {layer}": [num_queries, tokens, tokens] for layer in range(2)
    }
    x = torch.randn(1, model.config.in_dim, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded, grid = model.embed(x, None, None)
        _, modulation = model.embed_time(torch.full((1, 4), 500.0))
        q, k, v = model.blocks[0].before_attention(embedded, modulation)
        rope = rope_frequencies(model.config.head_dim, range(4), *grid[1:])
        expected = model.rotate(q, rope)[:, -num_queries:], model.rotate(k, rope), v
    for ours, theirs in zip(found["layer 0"], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(found["layer 0"][2], found["layer 1"][2])


def test_a_model_is_told(caplog):
    model = toy_model(num_frame_per_block=2)
    model.attention_backend = "fastest"
    with caplog.at_level("INFO", logger="pipeline.attention_choice"):
        choose_attention(model, 0.06, **SIZES)
    assert model.attention_backend == "sdpa" and "sdpa" in caplog.records[0].message
    model.attention_backend = "int8"
    with pytest.raises(ValueError, match="'int8' needs triton and a GPU .*, this is a CPU; set attention_backend=auto"):
        choose_attention(model, 0.06, **SIZES)
    model.attention_backend = "auto"
    caplog.clear()
    choose_attention(model, 0.06, **SIZES)
    assert model.attention_backend == "auto" and not caplog.records


def test_a_setting_chooses(tiny_model_folder):
    settings = [f"model_name={tiny_model_folder}", "device=cpu", "height=32", "width=32", "num_output_frames=3"]
    for extra in ([], ["causal=false"]):
        pipeline = build_pipeline(load_config(None, [*settings, "attention_backend=fastest", *extra]))
        assert pipeline.generator.model.attention_backend == "sdpa"
    with pytest.raises(ValueError, match="'int8' needs triton and a GPU"):
        build_pipeline(load_config(None, [*settings, "attention_backend=int8"]))
    with pytest.raises(ConfigError, match="attention_gate is 0.0; it is a relative error above 0"):
        load_config(None, [*settings, "attention_gate=0"])


@pytest.mark.gpu
def test_a_gpu_chooses_among_several(caplog):
    """Kernels in 8 bits run, are measured and within the gate; which one is fastest is not ours to say."""
    shape = (1, 4680, 12, 128)
    drawn = {"random numbers": random_sample(shape, 18720, torch.device("cuda", 0), torch.bfloat16)}
    with caplog.at_level("INFO", logger="pipeline.attention_choice"):
        choose(["sdpa", "int8", "float8", "int8_scores"], drawn, 0.08, insisted=False)
    assert caplog.records[0].message.count(" ms, ") == 4 and "over the gate" not in caplog.records[0].message
