"""Machine code behind data/order.py: a keyed permutation of any number of places, and random numbers, from hashes.

All numbers are uint64 and wrap round at 2^64; what is multiplied to be scaled stays below 2^32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_colorize.compiled import compiled

# Four rounds make a Feistel network pseudorandom in theory. In data sets of a few photographs the coordinates have two
# or three values, and each round does so little that all 8! orders of 8 samples come equally often only from 24 rounds.
_ROUNDS = 10
_ROUNDS_WHEN_SMALL = 24
_SMALL = np.uint64(1 << 12)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of splitmix64
_SPREAD = np.uint64(0xD1342543DE82EF95)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_0, _1, _11, _27, _30, _31, _32 = (np.uint64(n) for n in (0, 1, 11, 27, 30, 31, 32))

UInt64s = NDArray[np.uint64]


@compiled
def draw(
    positions: UInt64s,
    size: np.uint64,
    columns: np.uint64,
    permutation_key: np.uint64,
    crop_key: np.uint64,
    sample: NDArray[np.int64],
    uniforms: NDArray[np.float64],
) -> None:
    """For n positions of the stream: sample [n] and uniforms [n, k], which are written in place.

    The permutation is a Feistel network in residues instead of bits (Black and Rogaway 2002, "Ciphers with arbitrary
    finite domains"): places are cells (left, right) of a rectangle barely larger than `size`, and rounds add a hash of
    one coordinate to the other. A place that leaves [0, size) is sent through again until it is back (cycle walking).
    """
    rows = (size + columns - _1) // columns
    rounds = _ROUNDS_WHEN_SMALL if size < _SMALL else _ROUNDS
    for n in range(len(positions)):
        epoch = positions[n] // size
        key = _mix(permutation_key + epoch * _GOLDEN)
        place = _encipher(positions[n] - epoch * size, key, rows, columns, rounds)
        while place >= size:
            place = _encipher(place, key, rows, columns, rounds)
        sample[n] = np.int64(place)
        state = _mix(crop_key + positions[n] * _GOLDEN)
        for k in range(uniforms.shape[1]):
            state += _GOLDEN
            uniforms[n, k] = np.float64(_mix(state) >> _11) * 2.0**-53  # the upper 53 bits, in [0, 1)


@compiled
def substitute(position: np.uint64, attempt: np.uint64, size: np.uint64, key: np.uint64) -> np.uint64:
    """A random place below `size` for each position and attempt."""
    return _mix(_mix(key + position * _GOLDEN) + attempt * _GOLDEN) % size


@compiled
def _encipher(place: np.uint64, key: np.uint64, rows: np.uint64, columns: np.uint64, rounds: int) -> np.uint64:
    """A permutation of [0, rows * columns) for each key."""
    left = place // columns
    right = place - left * columns
    salt = key
    for turn in range(rounds):
        salt += _GOLDEN
        # Multiplied by _SPREAD, small neighbouring numbers cannot cancel against a key that differs by little.
        if turn % 2 == 0:
            left = _add_modulo(left, _below(_mix(salt ^ (right * _SPREAD)), rows), rows)
        else:
            right = _add_modulo(right, _below(_mix(salt ^ (left * _SPREAD)), columns), columns)
    return left * columns + right


@compiled
def _mix(z: np.uint64) -> np.uint64:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits in which each bit moves all."""
    z = (z ^ (z >> _30)) * _MIX_1
    z = (z ^ (z >> _27)) * _MIX_2
    return z ^ (z >> _31)


@compiled
def _below(bits: np.uint64, limit: np.uint64) -> np.uint64:
    """The upper 32 bits scaled to [0, limit): a multiplication where `%` would divide."""
    return ((bits >> _32) * limit) >> _32


@compiled
def _add_modulo(a: np.uint64, b: np.uint64, modulus: np.uint64) -> np.uint64:
    """(a + b) % modulus for a, b < modulus."""
    return a + b if a + b < modulus else a + b - modulus
