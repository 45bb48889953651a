"""All players' states between a run and its folder: copied to be written, gathered to be small, and put back."""

from collections.abc import Sequence

from torch import Tensor

from trainer.learner import Learner
from utils.distributed import Ranks
from utils.sharding import Sharding, dress, local, whole
from utils.training_state import StoredState
from wan.modules.weights import check_same_tensors

OWN = "own/"  # begins the names of what a recipe keeps beside its players


def copied_state(learners: Sequence[Learner], sharding: Sharding) -> dict[str, Tensor]:
    """The parts of everything a run is made of that this rank saves, copied to main memory."""
    return {
        name: dress(part.to("cpu", copy=True), learner.source(name))
        for learner in learners
        for name, part in learner.state().items()
        if sharding.keeps(learner.source(name))
    }


def compact_state(learners: Sequence[Learner], ranks: Ranks) -> dict[str, Tensor]:
    """Whole weights and averages in bfloat16, in main memory on rank 0 (collective when sharded)."""
    state = {}
    for learner in learners:
        parts = learner.state()
        for name in learner.expected():
            full = whole(parts[name], learner.source(name))
            if ranks.is_main:
                state[name] = full.bfloat16().cpu()
    return state


def restore_state(learners: Sequence[Learner], stored: StoredState) -> None:
    """Put every player back to where it was; every rank reads its own parts. ValueError where they do not fit."""
    found = {n: shape for n, shape in stored.shapes.items() if "/optimizer/" not in n and not n.startswith(OWN)}
    expected = {name: shape for learner in learners for name, shape in learner.expected().items()}
    check_same_tensors(expected, found, f"the saved state {stored.folder}")
    targets = {name: t for learner in learners for name, t in learner.targets(set(stored.shapes)).items()}
    stored.read(targets)
    parts = {name: local(target) for name, target in targets.items()}
    for learner in learners:
        learner.load(parts)
