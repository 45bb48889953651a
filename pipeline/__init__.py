"""The walk: noise -> blocks of latents -> pixels. On this floor: build > the pipelines > rollout > samplers."""

from pipeline.bidirectional_inference import BidirectionalInferencePipeline
from pipeline.causal_diffusion_inference import CausalDiffusionInferencePipeline

__all__ = ["BidirectionalInferencePipeline", "CausalDiffusionInferencePipeline"]
