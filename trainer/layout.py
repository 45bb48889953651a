"""How a run lies on its machines: passes per step, and over which ranks networks are cut."""

import torch

from utils.config import Config, ConfigError
from utils.distributed import Ranks, ranks_per_node
from utils.sharding import Sharding, make_mesh


def count_passes(config: Config, ranks: Ranks) -> int:
    """Passes that each rank accumulates per step so that total_batch_size is met exactly."""
    per_pass = config.batch_size * ranks.size
    total = config.total_batch_size or per_pass
    passes, rest = divmod(total, per_pass)
    if rest or passes == 0:
        raise ConfigError(
            f"total_batch_size {total} does not split into {ranks.size} GPU(s) x batch_size {config.batch_size}; "
            f"use {max(1, passes) * per_pass} or {(passes + 1) * per_pass}"
        )
    return passes


def make_sharding(config: Config, ranks: Ranks, trainer: str, *, can_shard: bool) -> Sharding:
    """Of the config's strategy, for a trainer of that name that can shard or cannot."""
    if config.sharding_strategy != "no_shard" and ranks.size > 1 and not can_shard:
        raise ConfigError(
            f"sharding_strategy is {config.sharding_strategy!r}, but the {trainer} trainer keeps whole replicas "
            "on every GPU; set sharding_strategy: no_shard"
        )
    mesh = None
    if can_shard:
        mesh = make_mesh(config.sharding_strategy, ranks, config.sharding_group_size, ranks_per_node(ranks))
    if config.cpu_offload and mesh is None:
        raise ConfigError(
            "cpu_offload moves sharded weights, and this run shards none; start it under torchrun (also on one "
            "GPU) with sharding_strategy: full, or set cpu_offload: false"
        )
    mixed = config.mixed_precision and ranks.device.type == "cuda"
    return Sharding(ranks, mesh, torch.bfloat16 if mixed else None, config.cpu_offload)
