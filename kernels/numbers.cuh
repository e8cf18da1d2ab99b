// Numbers in memory -> float registers, one or four at a time, for the three dtypes that a network leaves.
//
// fp16 and bf16 come as bare 16-bit patterns: cuda_fp16.h would have to be found on the user's machine, takes NVRTC
// half a second, and all it would give here is one instruction.
#pragma once

struct Float32 {
    typedef float Bits;
    static __device__ __forceinline__ float value(float bits) { return bits; }
    static __device__ __forceinline__ float4 four(const float* address) { return *(const float4*)address; }
};

// The four 16-bit patterns of 8 bytes, in the order of their addresses.
template <class Kind>
__device__ __forceinline__ float4 four_of_16_bits(const short* address) {
    const uint2 pair = *(const uint2*)address;
    return make_float4(Kind::value((short)(pair.x & 0xffff)), Kind::value((short)(pair.x >> 16)),
                       Kind::value((short)(pair.y & 0xffff)), Kind::value((short)(pair.y >> 16)));
}

struct Float16 {
    typedef short Bits;
    static __device__ __forceinline__ float value(short bits) {
#ifdef __CUDA_ARCH__
        float result;
        asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(bits));
        return result;
#else  // the emulator's compiler knows the type; its test compares all 65536 patterns
        _Float16 half;
        memcpy(&half, &bits, sizeof half);
        return (float)half;
#endif
    }
    static __device__ __forceinline__ float4 four(const short* address) { return four_of_16_bits<Float16>(address); }
};

struct BFloat16 {
    typedef short Bits;
    // the upper half of a float
    static __device__ __forceinline__ float value(short bits) {
        return __uint_as_float((unsigned)(unsigned short)bits << 16);
    }
    static __device__ __forceinline__ float4 four(const short* address) { return four_of_16_bits<BFloat16>(address); }
};

// Four neighbouring floats, with one 16-byte access where the address allows it (`vectors`), else one by one as far as
// the `left` numbers from the address on reach. With `vectors`, `left` must be a multiple of 4.
struct Quad {
    float v[4];
};

__device__ __forceinline__ Quad load_quad(const float* address, int left, bool vectors) {
    Quad quad;
    if (vectors) {
        const float4 four = *(const float4*)address;
        quad.v[0] = four.x, quad.v[1] = four.y, quad.v[2] = four.z, quad.v[3] = four.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.v[i] = i < left ? address[i] : 0.0f;
    }
    return quad;
}

__device__ __forceinline__ void store_quad(float* address, const Quad& quad, int left, bool vectors) {
    if (vectors) {
        *(float4*)address = make_float4(quad.v[0], quad.v[1], quad.v[2], quad.v[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) address[i] = quad.v[i];
    }
}
