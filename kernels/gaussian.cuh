// The Gaussian blur of one channel at the two cells of each thread of a tile: shared by blend.cu and repair.cu.
//
// Separable: 2 (2r + 1) products a cell instead of (2r + 1)^2. The rows of a slab are blurred along x from global
// memory (neighbouring lanes read neighbouring cells, the L1 cache holds the overlap) into shared memory, then summed
// along y. Slab after slab the same 4 KB serve any radius, so the occupancy does not depend on sigma.
#pragma once
#include "grid.cuh"

// taps [2 * radius + 1]; all threads of the block must call it. result[j] is the cell (column, row + j * TILE_ROWS).
__device__ __forceinline__ void blurred(const float* __restrict__ channel, int height, int width,
                                        const float* __restrict__ taps, int radius, float (&result)[2]) {
    __shared__ float slab[SLAB][TILE_WIDTH];
    const int left = blockIdx.x * TILE_WIDTH, upper = blockIdx.y * TILE_HEIGHT;
    const int column = left + threadIdx.x, row = upper + threadIdx.y;
    // the same for the whole block: inside the image the columns need no reflection
    const bool interior = left >= radius && left + TILE_WIDTH + radius <= width;
    result[0] = result[1] = 0.0f;
    for (int top = upper - radius; top < upper + TILE_HEIGHT + radius; top += SLAB) {
        int rows[SLAB / TILE_ROWS];
        float sums[SLAB / TILE_ROWS];
#pragma unroll
        for (int j = 0; j < SLAB / TILE_ROWS; ++j) {
            rows[j] = reflect(top + (int)threadIdx.y + j * TILE_ROWS, height) * width;
            sums[j] = 0.0f;
        }
        if (interior) {
            const float* inner = channel + column - radius;
#pragma unroll 2
            for (int k = 0; k <= 2 * radius; ++k) {
                const float tap = taps[k];
#pragma unroll
                for (int j = 0; j < SLAB / TILE_ROWS; ++j) sums[j] = fmaf(tap, inner[rows[j] + k], sums[j]);
            }
        } else {
#pragma unroll 1
            for (int k = 0; k <= 2 * radius; ++k) {
                const float tap = taps[k];
                const int source = reflect(column - radius + k, width);
#pragma unroll
                for (int j = 0; j < SLAB / TILE_ROWS; ++j) sums[j] = fmaf(tap, channel[rows[j] + source], sums[j]);
            }
        }
        __syncthreads();  // the slab before has been read
#pragma unroll
        for (int j = 0; j < SLAB / TILE_ROWS; ++j) slab[threadIdx.y + j * TILE_ROWS][threadIdx.x] = sums[j];
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            // the rows of the slab within reach of this cell
            const int centre = row + j * TILE_ROWS - top;
            const int begin = max(centre - radius, 0), end = min(centre + radius, SLAB - 1);
            for (int i = begin; i <= end; ++i)
                result[j] = fmaf(taps[i - centre + radius], slab[i][threadIdx.x], result[j]);
        }
    }
}
