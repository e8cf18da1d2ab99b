// Lightness at full resolution + ab of the working grid -> sRGB pixels, ready to be copied to the host.
//
//   ab at a pixel: bilinear between the cells' centres (align_corners = False), the border cells extended
//   pulled towards neutral at fixed L until every channel of sRGB lies in -1e-4 .. 1 + 1e-4 (12 bisection steps)
//   Lab -> XYZ -> linear sRGB -> sRGB, clipped to 0..1, times 255 or 65535, rounded to the nearest
//
// CPU reference: dist_colorize.postprocess.cpu.TorchBackend.compose (and color.lab).
//
// Bytes for a pixel: lightness read, 4, pixel written, 3 (6 for 16 bits); the ab grid, small and read again and again,
// is served by the caches. That is the floor.
//
// The ladder:
//   1. Upsample, clamp, convert, round, interleave as torch operations: more than 200 bytes a pixel.
//   2. One thread a pixel, all in registers: 7 bytes, but three 1-byte stores a thread.
//   3. Four neighbouring pixels a thread: one 16-byte load of lightness; the two columns of cells that surround a
//      pixel stay in registers for the next one (upsampling: mostly the same two). But 12 bytes a thread, stored as
//      three words 12 bytes apart, use a third of every sector a warp touches.
//   4. The block's pixels are collected in shared memory and stored as 16-byte pieces in the order of their
//      addresses.
//   5. Pixels are numbered through the strip, whatever its width: one division a thread finds row and column, rows of
//      odd width stay aligned, and the last block alone is not full.
// Whether a colour is inside the gamut is decided in linear light, so the power of the sRGB curve is taken three times
// a pixel; only pixels outside run the bisection.
//
// Resident threads, at least, on sm_75, 80, 86, 89, 90, 100, 120 (checked by tests/test_kernels_compiled.py):
// occupancy compose8: 100 75 100 100 75 75 100 %
// occupancy compose16: 100 75 100 100 75 75 100 %
#include "lab.cuh"
#include "residency.cuh"

constexpr int COMPOSE_THREADS = 256;
constexpr int PIXELS = 4;  // of a thread
constexpr int BLOCK_PIXELS = COMPOSE_THREADS * PIXELS;

// One column of cells, interpolated along the rows at this pixel's height.
struct Column {
    float a, b;
};

__device__ __forceinline__ Column column_of(const float* __restrict__ ab, int plane, int upper, int lower, float down,
                                            int x) {
    const float a0 = ab[upper + x], a1 = ab[lower + x], b0 = ab[plane + upper + x], b1 = ab[plane + lower + x];
    return {fmaf(down, a1 - a0, a0), fmaf(down, b1 - b0, b0)};
}

__device__ __forceinline__ void put(unsigned char* to, float share) {
    *to = (unsigned char)__float2int_rn(share * 255.0f);
}
__device__ __forceinline__ void put(unsigned short* to, float share) {
    *to = (unsigned short)__float2int_rn(share * 65535.0f);
}

// Cell coordinate of a pixel's centre along an axis of `cells`, ratio = cells / pixels.
__device__ __forceinline__ float coordinate(int pixel, float ratio, int cells) {
    return fminf(fmaxf(fmaf((float)pixel + 0.5f, ratio, -0.5f), 0.0f), (float)(cells - 1));
}

// lightness [rows, width] (16-byte aligned), ab [2, h, w], out [rows, width, 3] (16-byte aligned); the strip begins at
// row row0 of a picture with height_ratio = h / its height and width_ratio = w / width. pixels = rows * width.
template <class Level>
__device__ __forceinline__ void compose(const float* __restrict__ lightness, const float* __restrict__ ab,
                                        Level* __restrict__ out, int pixels, int width, int row0, int h, int w,
                                        float height_ratio, float width_ratio, Level (&levels)[BLOCK_PIXELS * 3]) {
    constexpr int PIECE = 16 / sizeof(Level);
    const int start = blockIdx.x * BLOCK_PIXELS, first = start + threadIdx.x * PIXELS;
    if (first < pixels) {
        int row = first / width, x = first - row * width;
        float light[PIXELS];
        if (first + PIXELS <= pixels) {
            const float4 four = *(const float4*)(lightness + first);
            light[0] = four.x, light[1] = four.y, light[2] = four.z, light[3] = four.w;
        } else {
#pragma unroll
            for (int i = 0; i < PIXELS; ++i) light[i] = first + i < pixels ? lightness[first + i] : 0.0f;
        }
        int upper = 0, lower = 0, held = -1;
        float down = 0.0f;
        Column left = {}, right = {};
        bool new_row = true;
#pragma unroll
        for (int i = 0; i < PIXELS; ++i) {
            if (new_row) {
                const float y = coordinate(row0 + row, height_ratio, h);
                const int top = (int)y;
                upper = top * w;
                lower = min(top + 1, h - 1) * w;
                down = y - (float)top;
                held = -1;
                new_row = false;
            }
            const float at = coordinate(x, width_ratio, w);
            const int cell = (int)at;
            if (cell != held) {
                left = column_of(ab, h * w, upper, lower, down, cell);
                right = column_of(ab, h * w, upper, lower, down, min(cell + 1, w - 1));
                held = cell;
            }
            const float along = at - (float)cell;
            const Rgb linear =
                linear_in_gamut(light[i], fmaf(along, right.a - left.a, left.a), fmaf(along, right.b - left.b, left.b));
            Level* to = levels + (threadIdx.x * PIXELS + i) * 3;
            put(to, srgb_from_linear(linear.red));
            put(to + 1, srgb_from_linear(linear.green));
            put(to + 2, srgb_from_linear(linear.blue));
            // the strip's last thread runs past the last row: those pixels are computed and not stored
            if (++x == width) x = 0, ++row, new_row = true;
        }
    }
    __syncthreads();
    const int count = min(pixels - start, BLOCK_PIXELS) * 3;
    Level* const to = out + (size_t)start * 3;
    for (int i = threadIdx.x * PIECE; i + PIECE <= count; i += COMPOSE_THREADS * PIECE)
        *(uint4*)(to + i) = *(const uint4*)(levels + i);
    const int rest = count / PIECE * PIECE + threadIdx.x;
    if (rest < count) to[rest] = levels[rest];
}

// Block 256, grid ceil(pixels / 1024).
extern "C" __global__ void __launch_bounds__(COMPOSE_THREADS, RESIDENT)
    compose8(const float* __restrict__ lightness, const float* __restrict__ ab, unsigned char* __restrict__ out,
             int pixels, int width, int row0, int h, int w, float height_ratio, float width_ratio) {
    __shared__ __align__(16) unsigned char levels[BLOCK_PIXELS * 3];
    compose<unsigned char>(lightness, ab, out, pixels, width, row0, h, w, height_ratio, width_ratio, levels);
}

extern "C" __global__ void __launch_bounds__(COMPOSE_THREADS, RESIDENT)
    compose16(const float* __restrict__ lightness, const float* __restrict__ ab, unsigned short* __restrict__ out,
              int pixels, int width, int row0, int h, int w, float height_ratio, float width_ratio) {
    __shared__ __align__(16) unsigned short levels[BLOCK_PIXELS * 3];
    compose<unsigned short>(lightness, ab, out, pixels, width, row0, h, w, height_ratio, width_ratio, levels);
}
