"""The walk: noise -> blocks of latents -> pixels. On this floor: build > the pipelines > rollout > samplers."""

from pipeline.bidirectional_inference import BidirectionalInferencePipeline
from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline
from pipeline.self_forcing_training import SelfForcingTrainingPipeline, Trajectory

__all__ = [
    "BidirectionalInferencePipeline",
    "CausalDiffusionInferencePipeline",
    "SelfForcingTrainingPipeline",
    "Trajectory",
]
