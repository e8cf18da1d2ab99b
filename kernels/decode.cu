// Logits -> colour and confidence: softmax over the 313 bins at a temperature, expectation of the bins' centres.
//
//   x_k = clamp(logit_k + bias_k, -1e30, 1e30), NaN counts as -1e30
//   p_k = exp(x_k / T) / sum_j exp(x_j / T)
//   a = sum_k p_k a_k,   b = sum_k p_k b_k,   confidence = max_k p_k
//
// CPU reference: dist_colorize.postprocess.cpu.TorchBackend.decode.
//
// Bytes for a cell, fp32 (16 bit): the logits are read once, 1252 (626), ab and confidence written, 12: that is the
// floor of any kernel that is given logits. The backend gives it logits that never were in device memory: it multiplies
// the 64 features by the head for a chunk of cells whose logits fit into the L2 cache and decodes the chunk at once, so
// device memory sees 256 (128) bytes of features and 12 of results. Its logits are fp32 for every kind of features:
// bf16 logits were off by up to 8 ab units at T = 0.38. The 16-bit kernels are for logits that exist already.
//
// The ladder:
//   1. Softmax, then a product with the centres, then a maximum, as torch would: the probabilities are written and
//      read three times.
//   2. One thread a cell, two passes (maximum, then sums): reads the logits twice.
//   3. One pass ("online softmax"): keep the largest x so far and rescale the sums whenever it grows. Reads once. The
//      rescaling costs as many exponentials again; taking U logits at a time divides that by U and puts U loads in
//      flight.
//   4. One thread a cell gives a 128x128 grid 16384 threads, a tenth of a large GPU, each with one 4-byte load at a
//      time. Here the bins of a cell are shared out among 8 threads, which combine their sums in the end: eight times
//      the threads.
//   5. planar (channels first): neighbouring cells are neighbouring addresses, so a thread takes 4 cells with one
//      16-byte load (8 bytes for 16-bit logits), and the 8 threads of a cell are in 8 warps: combined through shared
//      memory. rows (channels last): the bins of a cell are neighbours, so its 8 threads are neighbouring lanes that
//      read 32 bytes together and combine by shuffles. Rows of 313 logits are aligned to nothing: single loads. A
//      warp a cell (32 lanes x 10 bins) was considered: 5 shuffle steps instead of 3 and a third of the lanes idle in
//      the last load.
// Not taken: tensor-core products inside this kernel. The library's product is already at the machine's rate for every
// architecture; ours would have to be written for each.
//
// Resident threads, at least, on sm_75, 80, 86, 89, 90, 100, 120 (checked by tests/test_kernels_compiled.py):
// occupancy decode_planar_float32: 100 75 83 83 75 75 83 %
// occupancy decode_planar_float16: 100 75 83 83 75 75 83 %
// occupancy decode_planar_bfloat16: 100 75 83 83 75 75 83 %
// occupancy decode_rows_float32: 100 75 100 100 75 75 100 %
// occupancy decode_rows_float16: 100 75 100 100 75 75 100 %
// occupancy decode_rows_bfloat16: 100 75 100 100 75 75 100 %
#include "centers.cuh"
#include "numbers.cuh"
#include "residency.cuh"

constexpr int PARTS = 8;                   // threads that share a cell
constexpr int COMMON_BINS = BINS / PARTS;  // 39 bins for every one of them; the last bin is left to the first
constexpr int PLANAR_CELLS = 128;          // cells of a block: 32 lanes x 4
constexpr int ROWS_CELLS = 32;
static_assert(COMMON_BINS * PARTS == BINS - 1, "exactly one bin must be left over");

// exp2 of -3e38 - x is 0 for every x that can come, and 0 * 0 + ... starts the sums.
constexpr float LOWEST = -3e38f;
constexpr float LIMIT = 1e30f;

// Sums over some bins, relative to the largest exponent among them.
struct Sums {
    float largest, total, a, b;
};

__device__ __forceinline__ Sums nothing() { return {LOWEST, 0.0f, 0.0f, 0.0f}; }

// fmaxf returns the number when the other one is NaN.
__device__ __forceinline__ float exponent(float logit, float bias, float scale) {
    return fminf(fmaxf(logit + bias, -LIMIT), LIMIT) * scale;
}

template <int U>
__device__ __forceinline__ void add(Sums& sums, const float (&x)[U], const float2 (&center)[U]) {
    float largest = sums.largest;
#pragma unroll
    for (int u = 0; u < U; ++u) largest = fmaxf(largest, x[u]);
    const float shrink = exp2f(sums.largest - largest);
    sums.largest = largest;
    sums.total *= shrink;
    sums.a *= shrink;
    sums.b *= shrink;
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const float weight = exp2f(x[u] - largest);
        sums.total += weight;
        sums.a = fmaf(weight, center[u].x, sums.a);
        sums.b = fmaf(weight, center[u].y, sums.b);
    }
}

__device__ __forceinline__ Sums merged(const Sums& one, const Sums& other) {
    const float largest = fmaxf(one.largest, other.largest);
    const float keep = exp2f(one.largest - largest), take = exp2f(other.largest - largest);
    return {largest, one.total * keep + other.total * take, one.a * keep + other.a * take,
            one.b * keep + other.b * take};
}

// Takes bins bin, bin + PARTS, ... (U of them) of four neighbouring cells.
template <class Kind, int U>
__device__ __forceinline__ void take(Sums (&sums)[4], const typename Kind::Bits*& next, size_t step,
                                     const float* __restrict__ bias, int bin, float scale) {
    float4 raw[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        raw[u] = Kind::four(next);
        next += step;
    }
    float x[4][U];
    float2 center[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
        const float offset = bias[bin + u * PARTS];
        center[u] = CENTERS[bin + u * PARTS];
        x[0][u] = exponent(raw[u].x, offset, scale);
        x[1][u] = exponent(raw[u].y, offset, scale);
        x[2][u] = exponent(raw[u].z, offset, scale);
        x[3][u] = exponent(raw[u].w, offset, scale);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) add(sums[i], x[i], center);
}

// Sums of a block, [quantity][part][cell]: the 16-byte stores and the 4-byte loads of a warp both touch every bank
// equally.
typedef float PlanarParts[4][PARTS][PLANAR_CELLS];

// logits: [313, stride], stride a multiple of 4, 16-byte aligned; cells first .. first + cells of one image's ab
// [2, plane] and confidence [plane] are written. scale = log2(e) / T.
template <class Kind>
__device__ __forceinline__ void decode_planar(const typename Kind::Bits* __restrict__ logits,
                                              const float* __restrict__ bias, float* __restrict__ ab,
                                              float* __restrict__ confidence, int cells, int stride, int first,
                                              int plane, float scale, PlanarParts& parts) {
    // Two loads of 16 bytes in flight for every thread; with three, 40 registers do not suffice.
    constexpr int U = 2, PAIRED_BINS = COMMON_BINS / U * U * PARTS;
    static_assert(COMMON_BINS % U == 1, "one common bin is left over after the pairs");
    const int lane = threadIdx.x, part = threadIdx.y;
    const int cell = blockIdx.x * PLANAR_CELLS + 4 * lane;
    Sums sums[4] = {nothing(), nothing(), nothing(), nothing()};
    if (cell < cells) {
        const typename Kind::Bits* next = logits + (size_t)part * stride + cell;
        const size_t step = (size_t)PARTS * stride;
        int bin = part;
#pragma unroll 1
        for (; bin < PAIRED_BINS; bin += U * PARTS) take<Kind, U>(sums, next, step, bias, bin, scale);
        take<Kind, 1>(sums, next, step, bias, bin, scale);
        if (part == 0) take<Kind, 1>(sums, next, step, bias, BINS - 1, scale);
    }
    *(float4*)&parts[0][part][4 * lane] =
        make_float4(sums[0].largest, sums[1].largest, sums[2].largest, sums[3].largest);
    *(float4*)&parts[1][part][4 * lane] = make_float4(sums[0].total, sums[1].total, sums[2].total, sums[3].total);
    *(float4*)&parts[2][part][4 * lane] = make_float4(sums[0].a, sums[1].a, sums[2].a, sums[3].a);
    *(float4*)&parts[3][part][4 * lane] = make_float4(sums[0].b, sums[1].b, sums[2].b, sums[3].b);
    __syncthreads();
    const int mine = part * 32 + lane;
    const int target = blockIdx.x * PLANAR_CELLS + mine;
    if (mine >= PLANAR_CELLS || target >= cells) return;
    Sums all = {parts[0][0][mine], parts[1][0][mine], parts[2][0][mine], parts[3][0][mine]};
#pragma unroll
    for (int i = 1; i < PARTS; ++i)
        all = merged(all, {parts[0][i][mine], parts[1][i][mine], parts[2][i][mine], parts[3][i][mine]});
    // The likeliest bin has weight 1, so its probability is 1 / total.
    const float share = __fdividef(1.0f, all.total);
    ab[first + target] = all.a * share;
    ab[plane + first + target] = all.b * share;
    confidence[first + target] = share;
}

// In shared memory, because neighbouring lanes ask for different bins: constant memory would serve them one by one.
struct RowsShared {
    float2 centers[BINS];
    float offsets[BINS];
    float results[3][ROWS_CELLS];
};

// logits: [cells, stride]; cell i is the cell first + i of all images' cells, ab [B, 2, plane], confidence [B, plane].
template <class Kind>
__device__ __forceinline__ void decode_rows(const typename Kind::Bits* __restrict__ logits,
                                            const float* __restrict__ bias, float* __restrict__ ab,
                                            float* __restrict__ confidence, int cells, int stride, int first, int plane,
                                            float scale, RowsShared& shared) {
    constexpr int U = 13;
    static_assert(COMMON_BINS % U == 0, "whole groups");
    const int part = threadIdx.x, cell = threadIdx.y, thread = cell * PARTS + part;
    for (int bin = thread; bin < BINS; bin += PARTS * ROWS_CELLS) {
        shared.centers[bin] = CENTERS[bin];
        shared.offsets[bin] = bias[bin];
    }
    __syncthreads();
    const int source = blockIdx.x * ROWS_CELLS + cell;
    Sums sums = nothing();
    if (source < cells) {
        const typename Kind::Bits* row = logits + (size_t)source * stride;
#pragma unroll 1
        for (int bin = part; bin < BINS - 1; bin += U * PARTS) {
            typename Kind::Bits raw[U];
#pragma unroll
            for (int u = 0; u < U; ++u) raw[u] = row[bin + u * PARTS];
            float x[U];
            float2 center[U];
#pragma unroll
            for (int u = 0; u < U; ++u) {
                x[u] = exponent(Kind::value(raw[u]), shared.offsets[bin + u * PARTS], scale);
                center[u] = shared.centers[bin + u * PARTS];
            }
            add(sums, x, center);
        }
        if (part == 0) {
            const float x[1] = {exponent(Kind::value(row[BINS - 1]), shared.offsets[BINS - 1], scale)};
            const float2 center[1] = {shared.centers[BINS - 1]};
            add(sums, x, center);
        }
    }
#pragma unroll
    for (int distance = 1; distance < PARTS; distance *= 2) {
        const Sums other = {
            __shfl_xor_sync(0xffffffffu, sums.largest, distance), __shfl_xor_sync(0xffffffffu, sums.total, distance),
            __shfl_xor_sync(0xffffffffu, sums.a, distance), __shfl_xor_sync(0xffffffffu, sums.b, distance)};
        sums = merged(sums, other);
    }
    if (part == 0) {
        const float share = __fdividef(1.0f, sums.total);
        shared.results[0][cell] = sums.a * share;
        shared.results[1][cell] = sums.b * share;
        shared.results[2][cell] = share;
    }
    __syncthreads();
    // One warp writes one quantity of the block's 32 cells: whole sectors.
    const int quantity = thread / ROWS_CELLS, mine = thread % ROWS_CELLS;
    const int target = blockIdx.x * ROWS_CELLS + mine;
    if (quantity >= 3 || target >= cells) return;
    const int image = (first + target) / plane, position = first + target - image * plane;
    float* out = quantity < 2 ? ab + ((size_t)image * 2 + quantity) * plane : confidence + (size_t)image * plane;
    out[position] = shared.results[quantity][mine];
}

// Block (32, 8), grid ceil(cells / 128).
#define DECODE_PLANAR(name, Kind)                                                                           \
    extern "C" __global__ void __launch_bounds__(256, RESIDENT)                                             \
        name(const Kind::Bits* __restrict__ logits, const float* __restrict__ bias, float* __restrict__ ab, \
             float* __restrict__ confidence, int cells, int stride, int first, int plane, float scale) {    \
        __shared__ __align__(16) PlanarParts parts;                                                         \
        decode_planar<Kind>(logits, bias, ab, confidence, cells, stride, first, plane, scale, parts);       \
    }
DECODE_PLANAR(decode_planar_float32, Float32)
DECODE_PLANAR(decode_planar_float16, Float16)
DECODE_PLANAR(decode_planar_bfloat16, BFloat16)

// Block (8, 32), grid ceil(cells / 32).
#define DECODE_ROWS(name, Kind)                                                                             \
    extern "C" __global__ void __launch_bounds__(256, RESIDENT)                                             \
        name(const Kind::Bits* __restrict__ logits, const float* __restrict__ bias, float* __restrict__ ab, \
             float* __restrict__ confidence, int cells, int stride, int first, int plane, float scale) {    \
        __shared__ RowsShared shared;                                                                       \
        decode_rows<Kind>(logits, bias, ab, confidence, cells, stride, first, plane, scale, shared);        \
    }
DECODE_ROWS(decode_rows_float32, Float32)
DECODE_ROWS(decode_rows_float16, Float16)
DECODE_ROWS(decode_rows_bfloat16, BFloat16)
