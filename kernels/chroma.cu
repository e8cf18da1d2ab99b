// Tones down strong colours that the network was unsure of, in all hues or around one (red, saturation suppression).
//
//   c = sqrt(a^2 + b^2); masked: c > min_chroma, confidence < max_confidence and a cos(h) + b sin(h) >= c cos(width /
//   2) ab' = ab (min_chroma + (c - min_chroma) factor) / c where masked, else ab to the bit
//
// CPU reference: dist_colorize.postprocess.cpu.TorchBackend.scale_chroma.
//
// Bytes for a cell: ab read and written, confidence read: 20, the floor.
//
// The ladder:
//   1. Torch, operation by operation: a dozen kernels, some 150 bytes a cell.
//   2. One cell a thread: 20 bytes, single loads.
//   3. Four cells a thread with 16-byte loads and stores: a quarter of the load instructions and four times the bytes
//      in flight. A plane whose size is no multiple of 4 has its second channel misaligned and takes single loads.
// The angle is never computed: comparing the projection on the hue's direction with c cos(width / 2) needs no atan2.
//
// Resident threads, at least, on sm_75, 80, 86, 89, 90, 100, 120 (checked by tests/test_kernels_compiled.py):
// occupancy scale_chroma: 100 100 100 100 100 100 100 %
#include "numbers.cuh"

constexpr int THREADS = 256;

// ab, out [B, 2, plane], confidence [B, plane]. all_hues: the hue does not matter. Block 256, grid (ceil(plane / 1024),
// B).
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_chroma(const float* __restrict__ ab, const float* __restrict__ confidence, float* __restrict__ out, int plane,
                 float min_chroma, float max_confidence, float hue_cosine, float hue_sine, float width_cosine,
                 int all_hues, float factor) {
    const int first = (blockIdx.x * THREADS + threadIdx.x) * 4;
    if (first >= plane) return;
    const bool vectors = plane % 4 == 0;
    const size_t image = blockIdx.y, at = image * 2 * plane + first;
    const Quad a = load_quad(ab + at, plane - first, vectors);
    const Quad b = load_quad(ab + at + plane, plane - first, vectors);
    const Quad sure = load_quad(confidence + image * plane + first, plane - first, vectors);
    Quad new_a, new_b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float chroma = sqrtf(a.v[i] * a.v[i] + b.v[i] * b.v[i]);
        const bool hue = all_hues || a.v[i] * hue_cosine + b.v[i] * hue_sine >= chroma * width_cosine;
        const bool masked = chroma > min_chroma && sure.v[i] < max_confidence && hue;
        const float scale = __fdividef(min_chroma + (chroma - min_chroma) * factor, chroma);
        new_a.v[i] = masked ? a.v[i] * scale : a.v[i];
        new_b.v[i] = masked ? b.v[i] * scale : b.v[i];
    }
    store_quad(out + at, new_a, plane - first, vectors);
    store_quad(out + at + plane, new_b, plane - first, vectors);
}
