// Walking over a grid of cells [h, w] in tiles of 32 x 16 with blocks of (32, 8) threads, two cells a thread.
#pragma once
#include "residency.cuh"

constexpr int TILE_WIDTH = 32;
constexpr int TILE_HEIGHT = 16;
constexpr int TILE_ROWS = 8;  // rows of threads: a thread has the cells of rows y and y + TILE_ROWS
constexpr int SLAB = 32;      // rows that a vertical sum holds in shared memory at a time
constexpr int TILE_THREADS = TILE_WIDTH * TILE_ROWS;

// The cell that index i means under scipy's mode "reflect", d c b a | a b c d | d c b a, for any i. A remainder would
// do it without a loop, and cost two thirds of the inner loop that calls it; nearly every i is inside or one step away.
__device__ __forceinline__ int reflect(int i, int n) {
    while ((unsigned)i >= (unsigned)n) i = i < 0 ? -1 - i : 2 * n - 1 - i;
    return i;
}
