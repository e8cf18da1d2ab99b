// Splotches (strong colour, low confidence) take the mean of their trusted neighbours, round after round; where there
// are too few, the Gaussian blur. Every cell ends with a finite colour; cells that are no suspects keep theirs to the
// bit.
//
//   suspect: sqrt(a^2 + b^2) >= min_chroma and confidence < max_confidence;  trusted: confidence >= max_confidence
//   a sweep: a suspect with at least min_neighbours trusted cells among the (2r + 1)^2 around it takes their mean ab,
//   and is trusted from the next sweep on; after the last sweep the remaining suspects take gaussian(ab as it came in)
//
// CPU reference: dist_colorize.postprocess.cpu.TorchBackend.repair.
//
// Bytes for a cell: mark reads 12 and writes 1; a sweep reads and writes 9 (ab and state); finish reads 9 and writes 8.
// The floor is 12 read and 8 written if one kernel did all, which the sweeps' dependence on neighbours forbids; the
// grids lie in the L2 cache.
//
// The ladder:
//   1. One thread a suspect, (2r + 1)^2 loads of three values each, in place: wrong, a sweep would see its own
//      results.
//   2. Ping-pong buffers: a sweep reads only what the sweep before left, so the result does not depend on the order.
//   3. Box sums are separable: sums along x into shared memory, then along y: 2 (2r + 1) instead of (2r + 1)^2.
//   4. Blocks without a suspect, most of them, only copy.
//   5. The end: asking the host after each sweep whether anything was repaired would stop the stream each time.
//      Instead all sweeps are launched; each block adds its count of repaired cells to the sweep's counter
//      (__syncthreads_count, one atomic a block), and a sweep whose predecessor counted nothing returns at once.
//      finish finds the last buffer from the counters. Nothing is copied to the host.
//
// Resident threads, at least, on sm_75, 80, 86, 89, 90, 100, 120 (checked by tests/test_kernels_compiled.py):
// occupancy repair_mark: 100 100 100 100 100 100 100 %
// occupancy repair_sweep: 100 75 100 100 75 75 100 %
// occupancy repair_finish: 100 75 100 100 75 75 100 %
#include "gaussian.cuh"

enum State : unsigned char { NEUTRAL = 0, SUSPECT = 1, TRUSTED = 2 };

constexpr int MARK_THREADS = 256;

// ab [B, 2, plane], confidence [B, plane] -> state [B, plane]. Block 256, grid (ceil(plane / 256), B).
extern "C" __global__ void __launch_bounds__(MARK_THREADS)
    repair_mark(const float* __restrict__ ab, const float* __restrict__ confidence, unsigned char* __restrict__ state,
                int plane, float min_chroma, float max_confidence) {
    const int cell = blockIdx.x * MARK_THREADS + threadIdx.x;
    if (cell >= plane) return;
    const size_t image = blockIdx.y;
    const float a = ab[image * 2 * plane + cell], b = ab[(image * 2 + 1) * plane + cell];
    const float sure = confidence[image * plane + cell];
    state[image * plane + cell] = sure >= max_confidence               ? TRUSTED
                                  : sqrtf(a * a + b * b) >= min_chroma ? SUSPECT
                                                                       : NEUTRAL;
}

// The sum of ab and the number of the trusted cells in the window around each of the thread's two cells.
struct Window {
    float a[2], b[2];
    int count[2];
};

__device__ __forceinline__ Window window_sums(const float* __restrict__ ab, const unsigned char* __restrict__ state,
                                              int height, int width, int radius) {
    __shared__ float slab_a[SLAB][TILE_WIDTH], slab_b[SLAB][TILE_WIDTH];
    __shared__ int slab_count[SLAB][TILE_WIDTH];
    const int upper = blockIdx.y * TILE_HEIGHT, column = blockIdx.x * TILE_WIDTH + threadIdx.x,
              row = upper + threadIdx.y;
    const int begin = max(column - radius, 0), end = min(column + radius, width - 1);
    const int plane = height * width;
    Window window = {};
    for (int top = upper - radius; top < upper + TILE_HEIGHT + radius; top += SLAB) {
        __syncthreads();  // the slab before has been read
#pragma unroll 1
        for (int i = threadIdx.y; i < SLAB; i += TILE_ROWS) {
            float a = 0.0f, b = 0.0f;
            int count = 0;
            // cells outside the image are not there
            if (top + i >= 0 && top + i < height) {
                const int line = (top + i) * width;
                for (int x = begin; x <= end; ++x) {
                    if (state[line + x] != TRUSTED) continue;
                    a += ab[line + x];
                    b += ab[plane + line + x];
                    ++count;
                }
            }
            slab_a[i][threadIdx.x] = a;
            slab_b[i][threadIdx.x] = b;
            slab_count[i][threadIdx.x] = count;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            const int centre = row + j * TILE_ROWS - top;
            const int first = max(centre - radius, 0), last = min(centre + radius, SLAB - 1);
            for (int i = first; i <= last; ++i) {
                window.a[j] += slab_a[i][threadIdx.x];
                window.b[j] += slab_b[i][threadIdx.x];
                window.count[j] += slab_count[i][threadIdx.x];
            }
        }
    }
    return window;
}

// counts [sweeps], zero at first: how many cells each sweep repaired. Block (32, 8), grid (ceil(width/32),
// ceil(height/16), B).
extern "C" __global__ void __launch_bounds__(TILE_THREADS, RESIDENT)
    repair_sweep(const float* __restrict__ ab, const unsigned char* __restrict__ state, float* __restrict__ new_ab,
                 unsigned char* __restrict__ new_state, int* __restrict__ counts, int sweep, int height, int width,
                 int radius, int min_neighbours) {
    if (sweep > 0 && counts[sweep - 1] == 0) return;
    const int plane = height * width;
    ab += (size_t)blockIdx.z * 2 * plane;
    new_ab += (size_t)blockIdx.z * 2 * plane;
    state += (size_t)blockIdx.z * plane;
    new_state += (size_t)blockIdx.z * plane;
    const int column = blockIdx.x * TILE_WIDTH + threadIdx.x, row = blockIdx.y * TILE_HEIGHT + threadIdx.y;
    unsigned char own[2] = {NEUTRAL, NEUTRAL};
#pragma unroll
    for (int j = 0; j < 2; ++j)
        if (column < width && row + j * TILE_ROWS < height) own[j] = state[(row + j * TILE_ROWS) * width + column];
    Window window = {};
    if (__syncthreads_or(own[0] == SUSPECT || own[1] == SUSPECT))
        window = window_sums(ab, state, height, width, radius);
    int repaired = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (column >= width || row + j * TILE_ROWS >= height) continue;
        const int cell = (row + j * TILE_ROWS) * width + column;
        const bool ready = own[j] == SUSPECT && window.count[j] >= min_neighbours;
        const float share = __fdividef(1.0f, (float)max(window.count[j], 1));
        new_ab[cell] = ready ? window.a[j] * share : ab[cell];
        new_ab[plane + cell] = ready ? window.b[j] * share : ab[plane + cell];
        new_state[cell] = ready ? TRUSTED : own[j];
        // both cells of a thread, one bit each: the barrier below counts threads
        repaired |= ready << j;
    }
    const int first = __syncthreads_count(repaired & 1), second = __syncthreads_count(repaired & 2);
    if (threadIdx.x == 0 && threadIdx.y == 0 && first + second > 0) atomicAdd(counts + sweep, first + second);
}

// original [B, 2, h, w] as it came in; sweep 0 wrote ping, sweep 1 pong, and so on; state0 is repair_mark's. Block (32,
// 8), grid (ceil(width / 32), ceil(height / 16), 2 B).
extern "C" __global__ void __launch_bounds__(TILE_THREADS, RESIDENT)
    repair_finish(const float* __restrict__ original, const float* __restrict__ ping, const float* __restrict__ pong,
                  const unsigned char* __restrict__ state0, const unsigned char* __restrict__ ping_state,
                  const unsigned char* __restrict__ pong_state, const int* __restrict__ counts,
                  const float* __restrict__ taps, float* __restrict__ out, int sweeps, int height, int width,
                  int radius) {
    // the sweeps that ran: up to the first one that repaired nothing
    int ran = 0;
    while (ran < sweeps && (ran == 0 || counts[ran - 1] > 0)) ++ran;
    const float* ab = ran == 0 ? original : ran % 2 ? ping : pong;
    const unsigned char* state = ran == 0 ? state0 : ran % 2 ? ping_state : pong_state;
    const int plane = height * width;
    original += (size_t)blockIdx.z * plane;
    ab += (size_t)blockIdx.z * plane;
    out += (size_t)blockIdx.z * plane;
    state += (size_t)(blockIdx.z / 2) * plane;
    const int column = blockIdx.x * TILE_WIDTH + threadIdx.x, row = blockIdx.y * TILE_HEIGHT + threadIdx.y;
    bool suspect[2] = {false, false};
#pragma unroll
    for (int j = 0; j < 2; ++j)
        if (column < width && row + j * TILE_ROWS < height)
            suspect[j] = state[(row + j * TILE_ROWS) * width + column] == SUSPECT;
    float blur[2] = {0.0f, 0.0f};
    if (__syncthreads_or(suspect[0] || suspect[1])) blurred(original, height, width, taps, radius, blur);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (column >= width || row + j * TILE_ROWS >= height) continue;
        const int cell = (row + j * TILE_ROWS) * width + column;
        out[cell] = suspect[j] ? blur[j] : ab[cell];
    }
}
