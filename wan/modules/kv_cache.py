"""What the past looks like to the transformer: keys and values of committed frames, in static memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import check_window, runs, visible_ranges

Keys = tuple[Tensor, Tensor]  # keys and values of a prompt or an image, [B, T, N, D] each


@dataclass(eq=False)
class KVCache:
    """Context of one path through the generator: keys and values of committed frames, per layer.

    The slab of each layer has room for `capacity` frames. Frame f lies in slot f until the slab is full; then the
    newest frame takes the slot of the oldest one after the sink. Attention does not care about the order of rotated
    keys, so nothing is ever moved. capacity 6, sink_size 1, blocks of 2:

        after block 0:  0 1 . . . .      after block 2:  0 1 2 3 4 5
        after block 1:  0 1 2 3 . .      after block 3:  0 6 7 3 4 5      frames 1 and 2 are gone, 0 is the sink

    A walk's rhythm for one block of n frames: any number of passes with `context(n)`, the last of them on the clean
    block, then `commit(n)`. Networks write the block's own keys into its slots but never move `start_frame`.

    `capacity` above the window keeps the whole past: nothing is overwritten, so that a checkpointed training pass may
    be recomputed later; the window is honoured when reading (sink included), exactly as by a full slab.
    """

    keys: list[Tensor]  # num_layers x [B, capacity * frame_seqlen, N, D]
    values: list[Tensor]
    frame_seqlen: int
    num_frame_per_block: int
    local_attn_size: int = -1
    sink_size: int = 0
    start_frame: int = 0  # absolute index of the next frame; a Python int, never read back from the device
    keeps_last_pass: bool = False  # passes with gradient leave their keys too, for walks without a clean pass
    text: list[Keys | None] = field(default_factory=list)  # cross-attention K/V per layer
    image: list[Keys | None] = field(default_factory=list)
    _places: dict[tuple[str, int], Keys] = field(default_factory=dict, init=False, repr=False)  # of the last such keys

    def __post_init__(self):
        check_window(self.local_attn_size, self.sink_size, self.num_frame_per_block)
        self.forget_prompt()
        self.forget_image()

    @property
    def capacity(self) -> int:
        """Frames that the slab has room for."""
        return self.keys[0].shape[1] // self.frame_seqlen

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))

    def fits(self, batch_size: int, capacity: int, frame_seqlen: int, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether this memory can serve another video of that shape."""
        slab = self.keys[0]
        mine = (slab.shape[0], self.capacity, self.frame_seqlen, slab.dtype, slab.device)
        return mine == (batch_size, capacity, frame_seqlen, dtype, device)

    def slot(self, frame: int) -> int:
        """Where frame `frame` lies in the slab (once it has been written, and until it is overwritten)."""
        if frame < self.capacity:
            return frame
        return self.sink_size + (frame - self.sink_size) % (self.capacity - self.sink_size)

    def context(self, num_frames: int) -> "KVContext":
        """Frozen view for passes over the next `num_frames` frames; ValueError when they outgrow the slab."""
        start, stop = self.start_frame, self.start_frame + num_frames
        if stop > self.capacity and self.capacity != self.local_attn_size:  # only a slab of the window's size is a ring
            raise ValueError(
                f"the KV cache has room for {self.capacity} latent frames, frame {stop - 1} does not fit; make it with "
                f"num_frames>={stop}, or set local_attn_size to stream without end"
            )
        return KVContext(self, start, stop)

    def commit(self, num_frames: int) -> None:
        """The block just written becomes context."""
        self.start_frame += num_frames

    def reset(self) -> None:
        """Forget video, prompt and image; the memory stays."""
        self.start_frame = 0
        self.forget_prompt()
        self.forget_image()

    def forget_prompt(self) -> None:
        """Forget the text's cross-attention keys and values: the next pass reads the text anew. The image stays."""
        self.text = [None] * len(self.keys)

    def forget_image(self) -> None:
        """The same for the image's."""
        self.image = [None] * len(self.keys)

    def remember_text(self, layer: int, keys: Keys) -> None:
        """Keep a layer's keys and values of the prompt."""
        self.text[layer] = self._settle("text", layer, keys)

    def remember_image(self, layer: int, keys: Keys) -> None:
        """The same of the image."""
        self.image[layer] = self._settle("image", layer, keys)

    def _settle(self, kind: str, layer: int, keys: Keys) -> Keys:
        """The keys, copied to where the last prompt's lay, if they fit: captured passes read that memory."""
        place = self._places.get((kind, layer))
        if place is None or any(not alike(old, new) for old, new in zip(place, keys, strict=True)):
            self._places[kind, layer] = keys
            return keys
        for old, new in zip(place, keys, strict=True):
            old.copy_(new)
        return place


def alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


class KVContext:
    """What a pass over frames [start_frame, stop_frame) sees of a cache. Networks write their block, move nothing."""

    def __init__(self, cache: KVCache, start_frame: int, stop_frame: int):
        self.start_frame, self.stop_frame = start_frame, stop_frame
        self._cache = cache
        visible = visible_ranges(stop_frame, cache.local_attn_size, cache.sink_size)
        self._past = [cache.slot(f) for first, last in visible for f in range(first, min(last, start_frame))]
        self._own = [cache.slot(f) for f in range(start_frame, stop_frame)]

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Slots that a pass writes and slots that it reads: all that tells its kernels from those of another block.

        A ring comes back to the same slots, so a stream without end has few: window 12, sink 3, blocks of 3 has six.
        """
        return tuple(self._own), tuple(self._slots())

    @property
    def frames(self) -> list[int]:
        """Absolute index of every key frame that `extend` returns, in its order."""
        by_slot = {self._cache.slot(f): f for f in self._frame_order()}
        return [by_slot[slot] for slot in self._slots()]

    def _frame_order(self) -> Iterator[int]:
        for first, last in visible_ranges(self.stop_frame, self._cache.local_attn_size, self._cache.sink_size):
            yield from range(first, last)

    def _slots(self) -> list[int]:
        """Slots in the order of the returned keys: slab order when the slab is read in place, else past then own."""
        if self._reads_in_place():
            return sorted(self._past + self._own)
        return self._past + self._own

    def _reads_in_place(self) -> bool:
        """Without gradient, and when past and block together fill a prefix of the slab, no key need be copied."""
        used = sorted(self._past + self._own)
        return not torch.is_grad_enabled() and used == list(range(len(used)))

    def places(self, layer: int, batch_size: int) -> tuple[Keys, Keys] | None:
        """Of a pass without gradient: where the block's keys and values go in the slab, [B, n * frame_seqlen, N, D],
        and what `extend` returns once they lie there. None where they are not side by side, or keys must be copied.
        """
        own = list(runs(self._own))
        if len(own) > 1 or not self._reads_in_place():
            return None
        slabs, size = self._slabs(layer, batch_size), self._cache.frame_seqlen
        first, last = own[0][0] * size, own[0][1] * size
        seen = (len(self._past) + len(self._own)) * size
        return tuple(slab[:, first:last] for slab in slabs), tuple(slab[:, :seen] for slab in slabs)

    def _slabs(self, layer: int, batch_size: int) -> Keys:
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        if batch_size != keys.shape[0]:
            raise ValueError(
                f"the KV cache was made for batch {keys.shape[0]}, this pass has batch {batch_size}; make a new cache"
            )
        return keys, values

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of context and block: key, value [B, n * frame_seqlen, N, D] -> [B, visible, N, D] each.

        Without gradient the block is written into its slots (in place). With gradient nothing is written (unless the
        cache keeps_last_pass, when a recomputed pass writes the same once more): the context is a detached copy, so
        that no gradient crosses blocks and a recomputed pass reads what the first one read.
        """
        keys, values = self._slabs(layer, key.shape[0])
        if self._cache.keeps_last_pass or not torch.is_grad_enabled():
            self._write(keys, key.detach())
            self._write(values, value.detach())
        if self._reads_in_place():
            length = (len(self._past) + len(self._own)) * self._cache.frame_seqlen
            return keys[:, :length], values[:, :length]
        past = list(runs(self._past))
        return self._join(keys, past, key), self._join(values, past, value)

    def _write(self, slab: Tensor, block: Tensor) -> None:
        done = 0
        for first, last in runs(self._own):
            first, last = first * self._cache.frame_seqlen, last * self._cache.frame_seqlen
            slab[:, first:last] = block[:, done : done + last - first]
            done += last - first

    def _join(self, slab: Tensor, past: list[tuple[int, int]], block: Tensor) -> Tensor:
        size = self._cache.frame_seqlen
        context = [slab[:, first * size : last * size].detach() for first, last in past]
        return torch.cat([*context, block.to(slab.dtype)], dim=1)
