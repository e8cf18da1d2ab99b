// Colour mixed with its Gaussian blur, the more the less confident the network was.
//
//   w = clamp((confidence - low) / (high - low), 0, 1);  low = high: w = 1 where confidence >= low, else 0
//   out = w ab + (1 - w) gaussian(ab),  out = ab to the bit where w = 1
//   gaussian: taps of stages.gaussian_taps along both axes, borders d c b a | a b c d | d c b a
//
// CPU reference: dist_colorize.postprocess.cpu.TorchBackend.blend.
//
// Bytes for a cell: ab read and written, 16, confidence read once for each of the two channels, 8; the floor is 20. A
// working-size grid (256 x 256: 0.5 MB) lies in the L2 cache, so what the halo reads again costs no device memory.
//
// The ladder:
//   1. Blur along x, blur along y, mix: three kernels, 44 bytes a cell, three launches.
//   2. One kernel that holds a tile with its halo in shared memory: 20 bytes, but the (32 + 2r) (16 + 2r) floats of a
//      large sigma keep threads out of sm_75, 86, 89 and 120, and a larger one does not fit at all.
//   3. One kernel that blurs the rows from global memory and keeps only those sums, slab after slab: 4 KB at any
//      sigma, full occupancy (gaussian.cuh). Four rows share each tap that is loaded, and the tap loop of inner tiles
//      is free of index arithmetic.
//   4. Blocks in which every cell is confident copy and leave: typically most of a photograph.
// One channel a block: twice the blocks of one cell a thread, which a single small image needs to fill a GPU.
//
// Resident threads, at least, on sm_75, 80, 86, 89, 90, 100, 120 (checked by tests/test_kernels_compiled.py):
// occupancy blend: 100 75 100 100 75 75 100 %
#include "gaussian.cuh"

// ab, out [B, 2, height, width], confidence [B, height, width]; inverse = 1 / (high - low), 0 for low = high.
// Block (32, 8), grid (ceil(width / 32), ceil(height / 16), 2 B).
extern "C" __global__ void __launch_bounds__(TILE_THREADS, RESIDENT)
    blend(const float* __restrict__ ab, const float* __restrict__ confidence, const float* __restrict__ taps,
          float* __restrict__ out, int height, int width, int radius, float low, float high, float inverse) {
    const int plane = height * width;
    const float* channel = ab + (size_t)blockIdx.z * plane;
    const float* sure = confidence + (size_t)(blockIdx.z / 2) * plane;
    out += (size_t)blockIdx.z * plane;
    const int column = blockIdx.x * TILE_WIDTH + threadIdx.x, row = blockIdx.y * TILE_HEIGHT + threadIdx.y;
    float share[2] = {1.0f, 1.0f};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (column >= width || row + j * TILE_ROWS >= height) continue;
        const float here = sure[(row + j * TILE_ROWS) * width + column];
        share[j] = here >= high ? 1.0f : fmaxf((here - low) * inverse, 0.0f);
    }
    float blur[2] = {0.0f, 0.0f};
    if (__syncthreads_or(share[0] != 1.0f || share[1] != 1.0f)) blurred(channel, height, width, taps, radius, blur);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (column >= width || row + j * TILE_ROWS >= height) continue;
        const int cell = (row + j * TILE_ROWS) * width + column;
        const float own = channel[cell];
        out[cell] = share[j] == 1.0f ? own : share[j] * own + (1.0f - share[j]) * blur[j];
    }
}
