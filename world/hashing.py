"""Counter-based randomness: a number is a hash of where it stands, so order, batch size and device change nothing.

splitmix64 (Steele, Lea and Flood, OOPSLA 2014), on Python ints and, element by element, on int64 tensors.
"""

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def hash_int(value: int) -> int:
    """A signed 64-bit hash."""
    z = (value + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _FIRST) & _MASK
    z = ((z ^ (z >> 27)) * _SECOND) & _MASK
    z ^= z >> 31
    return z - 2**64 if z >> 63 else z


def hash_tensor(key: Tensor) -> Tensor:
    """63 random bits for each element of an int64 tensor: non-negative int64 (multiplication wraps)."""

    def shift(x: Tensor, bits: int) -> Tensor:  # logical: int64 >> keeps the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    z = key + (_GOLDEN - 2**64)
    z = (z ^ shift(z, 30)) * (_FIRST - 2**64)
    z = (z ^ shift(z, 27)) * (_SECOND - 2**64)
    return shift(z ^ shift(z, 31), 1)


def uniform(hashed: Tensor) -> Tensor:
    """[0, 1) from the upper 24 of 63 bits: exact in float32, so every device agrees."""
    return (hashed >> 39).float() / (1 << 24)


def normal(hashed: Tensor) -> Tensor:
    """Two independent standard normal float32 [..., 2 n] from 63 bits each [..., n], by Box and Muller (1958).

    The radius takes 32 bits, so values reach 6.7; the angle takes the other 31. Devices agree up to rounding.
    """
    radius = (((hashed >> 31).float() + 0.5) * 2.0**-32).log_().mul_(-2).sqrt_()
    angle = (hashed & (2**31 - 1)).float() * (2 * torch.pi / 2**31)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=-1)
