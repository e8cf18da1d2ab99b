// Runs a kernel block by block on the CPU: one fiber a thread, device memory between guard pages, shared memory full
// of NaN until it is written, barriers and warp masks checked. Compiled without sanitizers (its own bookkeeping is no
// part of the proof) and linked to a kernel that may be compiled with them.
//
// As a library it is called through emulator_launch; with -DEMULATOR_MAIN it is a program that reads one launch from a
// file, so that sanitizers see the kernel alone and not a whole Python process.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "cuda_names.h"

#if !defined(__x86_64__)
#error "the fibers of the emulator are written for x86-64"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// What the linker gives the bounds of the section of all __shared__ variables; absent in a kernel without any.
extern char __start_shared_memory[] __attribute__((weak));
extern char __stop_shared_memory[] __attribute__((weak));

// Present only when the kernel is compiled with the sanitizer.
extern "C" {
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_destroy_fiber(void*) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
void __asan_poison_memory_region(const void*, size_t) __attribute__((weak));
void __asan_unpoison_memory_region(const void*, size_t) __attribute__((weak));
}

// Saves the callee-saved registers and the stack pointer of the caller, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

namespace emulator {
namespace {

constexpr size_t PAGE = 4096, STACK = 256 * 1024, MOST_THREADS = 1024;
enum class State { ready, barrier, warp, done };

struct Fiber {
    void* stack_pointer;
    char* stack;
    void* tsan;
    State state;
    uint3 index;
    int line;
    const char* file;
    Reduce reduce;
    int value;  // deposited at a barrier, then what the barrier returns
    unsigned mask;
    uint32_t bits, all[32];
    unsigned barriers, warp_barriers;  // how many this thread has passed
};

std::vector<Fiber> fibers(MOST_THREADS);
Fiber* current;
void* scheduler_stack_pointer;
void* scheduler_tsan;
void (*kernel_call)(void**);
void** kernel_arguments;
// Addresses that stand for the barrier of a block and its warps' instructions. Never touched, and other ones for each
// block: what is released in one block must not be acquired in the next.
constexpr size_t TAGS = 2 * (1 + MOST_THREADS / 32), TAG_BLOCKS = 1 << 16;
char* tsan_tags;
// Two for each, taken in turns: a thread that is already at the next barrier must not be acquired by one that still has
// to leave this one. `place`: 0 for the block, 1 + n for warp n.
char* tag(size_t place, unsigned count) { return tsan_tags + 8 * (2 * place + count % 2); }
sigjmp_buf failure;
std::string message;
char* dynamic_base;
Kernel* kernels;

// Sanitizers replace memset and memcpy by versions that check and record; what the emulator does is not to be recorded.
void fill_with_nan(char* to, size_t bytes) {
    for (volatile char* p = to; p < to + bytes; ++p) *p = char(0xff);
}
void copy(char* to, const char* from, size_t bytes) {
    for (volatile char* p = to; p < to + bytes; ++p) *p = *from++;
}

// Every block has its own shared memory, but here they all use the same bytes one after the other. Mapping the pages
// afresh is what makes ThreadSanitizer forget what the block before did there, and only there.
void forget(char* from, size_t bytes) {
    if (!__tsan_create_fiber || !bytes) return;
    char* first = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(from) / PAGE * PAGE);
    const size_t room = (from + bytes - first + PAGE - 1) / PAGE * PAGE;
    // Other variables share the first and the last page, the addresses of library functions among them: each page gets
    // its contents back before anything is called, from a copy that lies elsewhere.
    std::vector<char> kept(PAGE);
    char* const storage = kept.data();
    for (char* page = first; page < first + room; page += PAGE) {
        copy(storage, page, PAGE);
        if (mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != page)
            __builtin_trap();
        copy(page, storage, PAGE);
    }
}

void to_scheduler() {
    Fiber* self = current;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler_tsan, 1);
    emulator_switch(&self->stack_pointer, scheduler_stack_pointer);
}

void fiber_main() {
    // what the host wrote before the launch is visible to every thread; nothing else is ordered
    if (__tsan_acquire) __tsan_acquire(&kernel_arguments);
    kernel_call(kernel_arguments);
    if (__tsan_release) __tsan_release(&kernels);  // only the host acquires it, after the last block
    current->state = State::done;
    to_scheduler();
    abort();
}

void start(Fiber& fiber) {
    if (!fiber.stack) {
        char* memory = static_cast<char*>(
            mmap(nullptr, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        if (memory == MAP_FAILED) fail("no memory for the stack of a fiber");
        mprotect(memory, PAGE, PROT_NONE);
        fiber.stack = memory + PAGE;
    }
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack, STACK);
    // six registers that emulator_switch pops, its return address, and a slot that aligns the stack as after a call
    void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 8;
    memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(fiber_main);
    fiber.stack_pointer = top;
    fiber.state = State::ready;
    fiber.barriers = fiber.warp_barriers = 0;
    if (__tsan_create_fiber) fiber.tsan = __tsan_create_fiber(0);
}

void resume(Fiber& fiber) {
    current = &fiber;
    threadIdx = fiber.index;
    // flag 1: a switch of fibers does not order memory, or no race could ever be seen
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, 1);
    emulator_switch(&scheduler_stack_pointer, fiber.stack_pointer);
    current = nullptr;
}

// Releases the block's barrier when every thread stands at it. Returns whether it did.
bool release_barrier(unsigned threads) {
    const Fiber& first = fibers[0];
    int count = 0;
    for (unsigned i = 0; i < threads; ++i) {
        const Fiber& fiber = fibers[i];
        if (fiber.state != State::barrier || fiber.line != first.line || fiber.file != first.file) return false;
        count += fiber.value != 0;
    }
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.value = fiber.reduce == Reduce::count ? count
                      : fiber.reduce == Reduce::any ? count > 0
                                                    : count == int(threads);
        fiber.state = State::ready;
    }
    return true;
}

// Releases every group of lanes that have all reached the same warp instruction with the same mask.
bool release_warps(unsigned threads) {
    bool released = false;
    for (unsigned base = 0; base < threads; base += 32) {
        for (unsigned i = base; i < base + 32 && i < threads; ++i) {
            if (fibers[i].state != State::warp) continue;
            const unsigned mask = fibers[i].mask;
            bool complete = true;
            for (unsigned lane = 0; lane < 32; ++lane) {
                if (!(mask >> lane & 1)) continue;
                const unsigned other = base + lane;
                complete = complete && other < threads && fibers[other].state == State::warp &&
                           fibers[other].mask == mask && fibers[other].line == fibers[i].line &&
                           fibers[other].file == fibers[i].file;
            }
            if (!complete) continue;
            for (unsigned to = 0; to < 32; ++to) {
                if (!(mask >> to & 1)) continue;
                for (unsigned from = 0; from < 32; ++from)
                    // a lane that takes no part has an undefined value: NaN
                    fibers[base + to].all[from] = mask >> from & 1 ? fibers[base + from].bits : 0xffffffffu;
                fibers[base + to].state = State::ready;
            }
            released = true;
        }
    }
    return released;
}

std::vector<void*> finished;
constexpr size_t MOST_FINISHED = 1024;  // each costs ThreadSanitizer a quarter of a megabyte

void destroy_finished() {
    for (void* fiber : finished) __tsan_destroy_fiber(fiber);
    finished.clear();
}

void run_block(unsigned threads, bool reversed, size_t dynamic_bytes) {
    if (__start_shared_memory) forget(__start_shared_memory, __stop_shared_memory - __start_shared_memory);
    if (dynamic_base) forget(dynamic_base, dynamic_bytes);
    if (__tsan_release) __tsan_release(&kernel_arguments);
    if (__start_shared_memory) fill_with_nan(__start_shared_memory, __stop_shared_memory - __start_shared_memory);
    if (dynamic_base) fill_with_nan(dynamic_base, dynamic_bytes);
    for (unsigned i = 0; i < threads; ++i) {
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        start(fibers[i]);
    }
    for (;;) {
        unsigned done = 0;
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = fibers[reversed ? threads - 1 - i : i];
            if (fiber.state == State::ready) resume(fiber);
            done += fiber.state == State::done;
        }
        if (done == threads) break;
        if (release_warps(threads) || release_barrier(threads)) continue;
        bool ready = false;
        std::string where;
        for (unsigned i = 0; i < threads; ++i) {
            ready = ready || fibers[i].state == State::ready;
            if (i && fibers[i].state == fibers[i - 1].state && fibers[i].line == fibers[i - 1].line) continue;
            char text[200];
            if (fibers[i].state == State::done)
                snprintf(text, sizeof text, "; from thread %u on: ended", i);
            else
                snprintf(text, sizeof text, "; from thread %u on: at %s of line %d", i,
                         fibers[i].state == State::warp ? "a warp instruction" : "the barrier", fibers[i].line);
            if (where.size() < 600) where += text;
        }
        if (!ready)
            fail("threads of block (%u, %u, %u) wait for each other for ever%s", blockIdx.x, blockIdx.y, blockIdx.z,
                 where.c_str());
    }
    // A destroyed fiber's identity is used again, which would hide races between blocks: keep as many as there may be.
    if (__tsan_create_fiber)
        for (unsigned i = 0; i < threads; ++i) finished.push_back(fibers[i].tsan);
    if (finished.size() > MOST_FINISHED) destroy_finished();
}

// Device memory: pages of its own between two pages that nobody may touch.
struct Guarded {
    static constexpr char SLACK = char(0xfe);
    char *pages = nullptr, *data = nullptr;
    size_t bytes = 0, room = 0;

    // `phase`: what the address must be modulo 16, as on the device, whose allocations are aligned to 256
    void allocate(size_t size, size_t phase, bool at_start) {
        bytes = size;
        room = (size + 32 + PAGE - 1) / PAGE * PAGE;
        pages = static_cast<char*>(
            mmap(nullptr, room + 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (pages == MAP_FAILED) fail("no memory for %zu bytes of an array", size);
        // NaN would look untouched after a NaN was computed from it and written over it
        memset(pages + PAGE, SLACK, room);
        const size_t last = room - size;  // the latest possible start: then step back to the phase
        data = pages + PAGE + (at_start ? phase : last - (last - phase) % 16);
        mprotect(pages, PAGE, PROT_NONE);
        mprotect(pages + PAGE + room, PAGE, PROT_NONE);
        if (__asan_poison_memory_region) {
            __asan_poison_memory_region(pages + PAGE, room);
            __asan_unpoison_memory_region(data, bytes);
        }
    }
    bool slack_is_untouched() const {
        for (const char* p = pages + PAGE; p < pages + PAGE + room; ++p)
            if ((p < data || p >= data + bytes) && *p != SLACK) return false;
        return true;
    }
    void release() {
        if (__asan_unpoison_memory_region && pages) __asan_unpoison_memory_region(pages + PAGE, room);
        if (pages) munmap(pages, room + 2 * PAGE);
        pages = nullptr;
    }
};
std::vector<Guarded> arrays;
Guarded dynamic_shared_memory;
const char* running = "";

void on_signal(int number, siginfo_t* info, void*) {
    char text[400];
    const char* address = static_cast<const char*>(info->si_addr);
    snprintf(text, sizeof text, "signal %d (%s) at address %p", number,
             number == SIGILL ? "misaligned vector or trap" : "memory access", info->si_addr);
    for (size_t i = 0; i < arrays.size(); ++i) {
        const Guarded& array = arrays[i];
        if (!array.pages || address < array.pages || address >= array.pages + array.room + 2 * PAGE) continue;
        if (address >= array.data && address < array.data + array.bytes)
            snprintf(text, sizeof text, "array argument %zu is const and was written", i);
        else
            snprintf(text, sizeof text, "array argument %zu was touched %td bytes from its start; it has %zu", i,
                     address - array.data, array.bytes);
    }
    if (dynamic_shared_memory.pages && address >= dynamic_shared_memory.pages &&
        address < dynamic_shared_memory.pages + dynamic_shared_memory.room + 2 * PAGE)
        snprintf(text, sizeof text, "dynamic shared memory was touched %td bytes from its start; it has %zu",
                 address - dynamic_shared_memory.data, dynamic_shared_memory.bytes);
    message = text;
    siglongjmp(failure, 1);
}

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};

}  // namespace

void fail(const char* format, ...) {
    char text[1200];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    message = text;
    siglongjmp(failure, 1);
}

unsigned lane() { return unsigned(current - fibers.data()) % 32; }

void* dynamic_shared_bytes() {
    if (!dynamic_base) fail("the kernel uses dynamic shared memory, and the launch gives none");
    return dynamic_base;
}

int barrier(Reduce reduce, int value, int line, const char* file) {
    Fiber* self = current;
    self->state = State::barrier;
    self->reduce = reduce;
    self->value = value;
    self->line = line;
    self->file = file;
    char* const here = tag(0, self->barriers++);
    if (__tsan_release) __tsan_release(here);
    to_scheduler();
    if (__tsan_acquire) __tsan_acquire(here);
    return self->value;
}

const uint32_t* exchange(unsigned mask, uint32_t bits, int line, const char* file, bool orders_memory) {
    Fiber* self = current;
    if (!(mask >> lane() & 1))
        fail("%s:%d: lane %u calls a warp instruction with mask %08x, which leaves it out", file, line, lane(), mask);
    self->state = State::warp;
    self->mask = mask;
    self->bits = bits;
    self->line = line;
    self->file = file;
    if (!orders_memory) {
        to_scheduler();
        return self->all;
    }
    char* const here = tag(1 + (self - fibers.data()) / 32, self->warp_barriers++);
    if (__tsan_release) __tsan_release(here);
    to_scheduler();
    if (__tsan_acquire) __tsan_acquire(here);
    return self->all;
}

Kernel::Kernel(const char* name, int largest_block, const char* signature, void (*call)(void**))
    : name(name), largest_block(largest_block), signature(signature), call(call), next(kernels) {
    kernels = this;
}
}  // namespace emulator

using namespace emulator;

struct Argument {
    void* data;
    uint64_t bytes;
    uint32_t kind;   // 0: scalar, 1: array that the kernel may only read, 2: array
    uint32_t phase;  // the address modulo 16
};
struct Launch {
    uint32_t grid[3], block[3];
    uint64_t shared_bytes;
    uint32_t reversed;  // threads and blocks run in descending order
    uint32_t at_start;  // arrays begin at a guard page instead of ending at one
    uint32_t arguments, unused;
};

static Kernel* find(const char* name) {
    for (Kernel* kernel = kernels; kernel; kernel = kernel->next)
        if (!strcmp(kernel->name, name)) return kernel;
    return nullptr;
}

extern "C" const char* emulator_signature(const char* name) {
    Kernel* kernel = find(name);
    return kernel ? kernel->signature : nullptr;
}

extern "C" int emulator_largest_block(const char* name) { return find(name)->largest_block; }

// Runs one launch. Returns a message when something is wrong, else a null pointer.
extern "C" const char* emulator_launch(const char* name, const Launch* launch, Argument* arguments) {
    Kernel* kernel = find(name);
    running = name;
    message.clear();
    struct sigaction old[sizeof SIGNALS / sizeof *SIGNALS], action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    static std::vector<char> signal_stack(64 * 1024);
    stack_t alternative = {}, old_stack = {};
    alternative.ss_sp = signal_stack.data();
    alternative.ss_size = signal_stack.size();
    const bool sanitized =
        __tsan_create_fiber || __asan_poison_memory_region;  // they report signals themselves, better
    if (!sanitized) {
        sigaltstack(&alternative, &old_stack);
        for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; ++i) sigaction(SIGNALS[i], &action, &old[i]);
    }
    if (!sigsetjmp(failure, 1)) {
        if (!kernel) fail("there is no such kernel");
        std::vector<void*> pointers(launch->arguments), slots(launch->arguments);
        arrays.assign(launch->arguments, {});
        for (unsigned i = 0; i < launch->arguments; ++i) {
            slots[i] = arguments[i].data;
            if (arguments[i].kind == 0) continue;
            arrays[i].allocate(arguments[i].bytes, arguments[i].phase, launch->at_start);
            memcpy(arrays[i].data, arguments[i].data, arguments[i].bytes);
            if (arguments[i].kind == 1) mprotect(arrays[i].pages + PAGE, arrays[i].room, PROT_READ);
            pointers[i] = arrays[i].data;
            slots[i] = &pointers[i];
        }
        dynamic_base = nullptr;
        if (launch->shared_bytes) {
            dynamic_shared_memory.allocate(launch->shared_bytes, 0, false);
            dynamic_base = dynamic_shared_memory.data;
        }
        kernel_call = kernel->call;
        kernel_arguments = slots.data();
        gridDim = {launch->grid[0], launch->grid[1], launch->grid[2]};
        blockDim = {launch->block[0], launch->block[1], launch->block[2]};
        const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
        const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
        if (__tsan_get_current_fiber) scheduler_tsan = __tsan_get_current_fiber();
        char* const tags = static_cast<char*>(
            mmap(nullptr, 8 * TAGS * TAG_BLOCKS, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
        for (uint64_t i = 0; i < blocks; ++i) {
            tsan_tags = tags + 8 * TAGS * (i % TAG_BLOCKS);
            const uint64_t at = launch->reversed ? blocks - 1 - i : i;
            blockIdx = {unsigned(at % gridDim.x), unsigned(at / gridDim.x % gridDim.y),
                        unsigned(at / gridDim.x / gridDim.y)};
            run_block(threads, launch->reversed, launch->shared_bytes);
        }
        munmap(tags, 8 * TAGS * TAG_BLOCKS);
        if (__tsan_acquire) __tsan_acquire(&kernels);
        destroy_finished();
        for (unsigned i = 0; i < launch->arguments; ++i) {
            if (arguments[i].kind != 2) continue;
            if (!__asan_poison_memory_region && !arrays[i].slack_is_untouched())
                fail("array argument %u was written outside its bounds", i);
            copy(static_cast<char*>(arguments[i].data), arrays[i].data, arguments[i].bytes);
        }
    } else if (current) {
        char text[300];
        snprintf(text, sizeof text, " [block (%u, %u, %u), thread (%u, %u, %u)]", blockIdx.x, blockIdx.y, blockIdx.z,
                 threadIdx.x, threadIdx.y, threadIdx.z);
        message += text;
        current = nullptr;
    }
    for (Guarded& array : arrays) array.release();
    dynamic_shared_memory.release();
    if (!sanitized) {
        for (size_t i = 0; i < sizeof SIGNALS / sizeof *SIGNALS; ++i) sigaction(SIGNALS[i], &old[i], nullptr);
        sigaltstack(&old_stack, nullptr);
    }
    return message.empty() ? nullptr : message.c_str();
}

#ifdef EMULATOR_MAIN
// program KERNEL FILE: FILE holds a Launch, then every Argument (data is ignored) followed by its bytes; arrays that
// the kernel may write are written back in place.
int main(int, char** words) {
    FILE* file = fopen(words[2], "r+b");
    Launch launch;
    if (!file || fread(&launch, sizeof launch, 1, file) != 1) return perror(words[2]), 3;
    std::vector<Argument> arguments(launch.arguments);
    std::vector<std::vector<char>> contents(launch.arguments);
    std::vector<long> offsets(launch.arguments);
    for (unsigned i = 0; i < launch.arguments; ++i) {
        if (fread(&arguments[i], sizeof(Argument), 1, file) != 1) return perror(words[2]), 3;
        offsets[i] = ftell(file);
        contents[i].resize(arguments[i].bytes);
        if (arguments[i].bytes && fread(contents[i].data(), arguments[i].bytes, 1, file) != 1)
            return perror(words[2]), 3;
        arguments[i].data = contents[i].data();
    }
    if (const char* error = emulator_launch(words[1], &launch, arguments.data())) {
        fprintf(stderr, "EMULATOR: %s\n", error);
        return 4;
    }
    for (unsigned i = 0; i < launch.arguments; ++i) {
        if (arguments[i].kind != 2 || !arguments[i].bytes) continue;
        if (fseek(file, offsets[i], SEEK_SET) || fwrite(contents[i].data(), arguments[i].bytes, 1, file) != 1)
            return perror(words[2]), 3;
    }
    return fclose(file) ? 3 : 0;
}
#endif
