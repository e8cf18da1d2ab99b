// The CUDA names that the kernels use, for a host C++ compiler. Included in front of a .cu file by compiler.py.
//
// Every thread of a block is a fiber of runtime.cpp. A barrier or a warp instruction gives control back to the
// scheduler, which lets the fibers go on only when all that must take part have arrived, at the same line.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#define __CUDA_EMULATOR__ 1
#define __global__ __attribute__((used))
#define __device__
#define __host__
#define __align__(n) __attribute__((aligned(n)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __constant__ static const
// Shared memory is one section of this library: the scheduler fills it with NaN at the start of every block.
#define __shared__ static __attribute__((section("shared_memory")))
// Unknown to the host compiler, read by compiler.py from the preprocessed text.
#define __launch_bounds__(...) __attribute__((launch_bounds(__VA_ARGS__)))

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
#define EMULATOR_VECTOR(type, scalar, alignment, ...) \
    struct alignas(alignment) type {                  \
        scalar __VA_ARGS__;                           \
    };
EMULATOR_VECTOR(float2, float, 8, x, y)
EMULATOR_VECTOR(float4, float, 16, x, y, z, w)
EMULATOR_VECTOR(int2, int, 8, x, y)
EMULATOR_VECTOR(int4, int, 16, x, y, z, w)
EMULATOR_VECTOR(uint2, unsigned, 8, x, y)
EMULATOR_VECTOR(uint4, unsigned, 16, x, y, z, w)
EMULATOR_VECTOR(ushort4, unsigned short, 8, x, y, z, w)
EMULATOR_VECTOR(uchar4, unsigned char, 4, x, y, z, w)
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uchar4 make_uchar4(unsigned char x, unsigned char y, unsigned char z, unsigned char w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {
enum class Reduce { none, count, any, all };
int barrier(Reduce reduce, int value, int line, const char* file);
// Deposits `bits` of this lane and returns those of all 32 lanes once every lane of `mask` has deposited. Shuffles and
// votes do not order memory, __syncwarp does.
const uint32_t* exchange(unsigned mask, uint32_t bits, int line, const char* file, bool orders_memory = false);
[[noreturn]] void fail(const char* format, ...);
void* dynamic_shared_bytes();
unsigned lane();

template <class T>
T* dynamic_shared() {
    return static_cast<T*>(dynamic_shared_bytes());
}
template <class T>
uint32_t bits_of(T value) {
    static_assert(sizeof(T) == 4, "warp instructions move 32 bits");
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}
template <class T>
T value_of(uint32_t bits) {
    T value;
    memcpy(&value, &bits, 4);
    return value;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned source, int line, const char* file) {
    const uint32_t* all = exchange(mask, bits_of(value), line, file);
    if (!(mask >> source & 1))
        fail("%s:%d: lane %u reads lane %u, which is not in the mask %08x", file, line, lane(), source, mask);
    return value_of<T>(all[source]);
}
}  // namespace emulator

// __builtin_LINE as a default argument is the line of the caller
#define EMULATOR_SITE int line = __builtin_LINE(), const char *file = __builtin_FILE()
inline void __syncthreads(EMULATOR_SITE) { emulator::barrier(emulator::Reduce::none, 0, line, file); }
inline int __syncthreads_count(int value, EMULATOR_SITE) {
    return emulator::barrier(emulator::Reduce::count, value, line, file);
}
inline int __syncthreads_or(int value, EMULATOR_SITE) {
    return emulator::barrier(emulator::Reduce::any, value, line, file);
}
inline int __syncthreads_and(int value, EMULATOR_SITE) {
    return emulator::barrier(emulator::Reduce::all, value, line, file);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATOR_SITE) { emulator::exchange(mask, 0, line, file, true); }
inline unsigned __ballot_sync(unsigned mask, int value, EMULATOR_SITE) {
    const uint32_t* all = emulator::exchange(mask, value != 0, line, file);
    unsigned ballot = 0;
    for (int i = 0; i < 32; ++i) ballot |= (mask >> i & 1 && all[i]) ? 1u << i : 0;
    return ballot;
}
inline int __any_sync(unsigned mask, int value, EMULATOR_SITE) { return __ballot_sync(mask, value, line, file) != 0; }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, EMULATOR_SITE) {
    unsigned source = emulator::lane() ^ distance;
    // beyond the end of its segment a lane gets its own value
    if (source / width > emulator::lane() / width) source = emulator::lane();
    return emulator::shuffle(mask, value, source, line, file);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATOR_SITE) {
    return emulator::shuffle(mask, value, emulator::lane() / width * width + unsigned(source) % width, line, file);
}

// Relaxed, as on the device: an atomic orders nothing but itself, and ThreadSanitizer sees it as one.
template <class T>
T atomicAdd(T* address, typename std::common_type<T>::type value) {
    static_assert(std::is_same<T, int>::value || std::is_same<T, unsigned>::value,
                  "integer atomics only: float sums depend on the order");
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

template <class T>
T __ldg(const T* address) {
    return *address;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }  // NaN gives 0, as on the device
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __uint_as_float(unsigned bits) { return emulator::value_of<float>(bits); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __float2int_rn(float x) {
    // The device saturates, a host CPU does not: a kernel must clamp before it converts.
    if (!(x >= -2147483648.0f && x < 2147483648.0f)) emulator::fail("float %g is out of int's range", x);
    return int(lrintf(x));
}

namespace emulator {
// What compiler.py's generated lines register: name, largest block, signature, and how to call it with untyped
// arguments.
struct Kernel {
    const char* name;
    int largest_block;
    const char* signature;
    void (*call)(void** arguments);
    Kernel* next;
    Kernel(const char* name, int largest_block, const char* signature, void (*call)(void**));
};

template <class T>
struct TypeName;
#define EMULATOR_TYPE(type, text)                  \
    template <>                                    \
    struct TypeName<type> {                        \
        static constexpr const char* value = text; \
    };
EMULATOR_TYPE(int, "int32")
EMULATOR_TYPE(unsigned, "uint32")
EMULATOR_TYPE(float, "float32")
#define EMULATOR_POINTER(type, text) \
    EMULATOR_TYPE(type*, "*" text)   \
    EMULATOR_TYPE(const type*, "const*" text)
EMULATOR_POINTER(int, "int32")
EMULATOR_POINTER(unsigned, "uint32")
EMULATOR_POINTER(float, "float32")
EMULATOR_POINTER(short, "int16")
EMULATOR_POINTER(unsigned short, "uint16")
EMULATOR_POINTER(unsigned char, "uint8")

template <class F>
struct Caller;
template <class... P>
struct Caller<void (*)(P...)> {
    static const char* signature() {
        static char text[1024];
        text[0] = 0;
        ((strcat(text, TypeName<P>::value), strcat(text, ",")), ...);
        return text;
    }
    template <void (*function)(P...), size_t... I>
    static void unpack(void** arguments, std::integer_sequence<size_t, I...>) {
        function(*static_cast<P*>(arguments[I])...);
    }
    template <void (*function)(P...)>
    static void call(void** arguments) {
        unpack<function>(arguments, std::make_integer_sequence<size_t, sizeof...(P)>());
    }
};
}  // namespace emulator

#define EMULATOR_KERNEL(function, bounds)                                                                              \
    static emulator::Kernel register_##function(#function, bounds, emulator::Caller<decltype(&function)>::signature(), \
                                                emulator::Caller<decltype(&function)>::call<&function>);
