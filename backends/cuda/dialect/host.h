// The host half of the dialect: the threads of a block are fibers of one CPU thread, blocks run one after the other.
//
// A fiber runs until it waits for others (a barrier, a shuffle, a matrix product) or ends. In which order fibers are
// resumed is the caller's choice, so that what depends on it shows. Checked all along:
//
//   - global memory: every access lies in one of the buffers given, aligned, and writes only where writing is meant
//   - shared memory: inside the array; NaN until written; no two threads at one place between two barriers, one of them
//     writing
//   - all lanes of a warp meet at the same place of the text, all threads of a block at the same barrier, and somebody
//     always can go on
//
// The first thing found ends the run; the message names the line of the kernel. Not modelled: memory that is slow to be
// seen by other blocks, copies that arrive late, bank conflicts, time.

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define GO_KERNEL(name, threads, blocks) static void name
#define GO_FN static inline
#define GO_UNROLL

// Fibers ---------------------------------------------------------------------------------------------------------------

static const size_t GO_STACK = 128 << 10;

#if defined(__x86_64__)
extern "C" void go_switch(void** from, void* to);
asm(R"(
.text
.globl go_switch
.hidden go_switch
.type go_switch,@function
go_switch:
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
.size go_switch,.-go_switch
)");
#endif

struct go_fiber {
    bool done;
    const int* waits_for;  // goes on when this is no longer what it was
    int was;
    const char* stack;
#if defined(__x86_64__)
    void* top;
#else
    ucontext_t context;
#endif
};

struct go_buffer { const char* start; const char* end; bool writable; };

// Who was at a cell of shared memory last, and before which barrier.
struct go_cell { int writer, written, reader, read, readers; };

struct go_warp {
    int arrived, generation, line;
    u32 slot[2][32][6];
};

struct go_state {
    // What is run.
    std::function<void()> kernel;
    int grid_x, grid_y, threads;
    std::vector<go_buffer> buffers;
    // Where it is.
    int block_x, block_y, thread;
    std::vector<go_fiber> fibers;
    std::vector<go_warp> warps;
    int live, arrived, generation, barrier_line, barrier_thread, epoch;
    // Shared memory: an arena that arrays are cut from in the order of their declaration.
    std::vector<u32> arena;
    std::vector<go_cell> cells;
    std::vector<std::pair<int, u32*>> arrays;  // line of the declaration, start
    size_t used;
    // The scheduler's own context.
#if defined(__x86_64__)
    void* top;
#else
    ucontext_t context;
#endif
    const void* own_stack;
    size_t own_size;
    char* message;
    int message_size;
    bool failed;
};
static go_state* go_s;

static void go_resume_scheduler(bool ending) {
    go_fiber& me = go_s->fibers[go_s->thread];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(ending ? nullptr : &fake, go_s->own_stack, go_s->own_size);
#endif
#if defined(__x86_64__)
    go_switch(&me.top, go_s->top);
#else
    swapcontext(&me.context, &go_s->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &go_s->own_stack, &go_s->own_size);
#endif
    (void)ending;
}

// Ends the run: nothing is resumed any more.
static void go_fail(const char* format, ...) {
    if (!go_s->failed) {
        go_s->failed = true;
        int n = snprintf(go_s->message, go_s->message_size, "block (%d, %d), thread %d: ", go_s->block_x, go_s->block_y, go_s->thread);
        va_list rest;
        va_start(rest, format);
        vsnprintf(go_s->message + n, go_s->message_size - n, format, rest);
        va_end(rest);
    }
    for (;;) go_resume_scheduler(false);
}

static void go_wait(const int* what) {
    go_fiber& me = go_s->fibers[go_s->thread];
    me.waits_for = what;
    me.was = *what;
    go_resume_scheduler(false);
    me.waits_for = nullptr;
}

static void go_release_barrier() {
    go_s->arrived = 0;
    go_s->generation++;
    go_s->epoch++;
}

static void go_body() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &go_s->own_stack, &go_s->own_size);
#endif
    go_s->kernel();
    go_s->fibers[go_s->thread].done = true;
    go_s->live--;
    if (go_s->arrived && go_s->arrived == go_s->live) go_release_barrier();
    for (;;) go_resume_scheduler(true);
}

static void go_start(go_fiber& fiber, char* stack) {
    fiber = go_fiber{};
    fiber.stack = stack;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, GO_STACK);  // the fiber that was here before never returned
#endif
#if defined(__x86_64__)
    void** top = (void**)(stack + GO_STACK);
    *--top = nullptr;  // where the caller's address would be: the stack is then aligned as at a call
    *--top = (void*)go_body;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber.top = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = GO_STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, go_body, 0);
#endif
}

static void go_resume(int thread) {
    go_fiber& fiber = go_s->fibers[thread];
    go_s->thread = thread;
#if defined(__SANITIZE_ADDRESS__)
    void* fake;
    __sanitizer_start_switch_fiber(&fake, fiber.stack, GO_STACK);
#endif
#if defined(__x86_64__)
    go_switch(&go_s->top, fiber.top);
#else
    swapcontext(&go_s->context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

static bool go_ready(const go_fiber& fiber) { return !fiber.done && !(fiber.waits_for && *fiber.waits_for == fiber.was); }

// 0: as they are numbered; 1: the other way round; else shuffled.
static void go_order(std::vector<int>& order, unsigned seed, u64& random) {
    int n = order.size();
    for (int i = 0; i < n; i++) order[i] = seed == 1 ? n - 1 - i : i;
    for (int i = n - 1; seed > 1 && i > 0; i--) {
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i], order[(random >> 33) % (i + 1)]);
    }
}

static void go_stuck() {
    int at = -1;
    for (int i = 0; i < go_s->threads && at < 0; i++) if (!go_s->fibers[i].done) at = i;
    go_s->thread = at;
    go_s->failed = true;
    const go_warp& warp = go_s->warps[at / 32];
    bool in_warp = go_s->fibers[at].waits_for == &warp.generation;
    snprintf(go_s->message, go_s->message_size,
        "block (%d, %d), thread %d: waits at line %d for others that never come: %d of %d are there, %d of %d threads have ended",
        go_s->block_x, go_s->block_y, at, in_warp ? warp.line : go_s->barrier_line, in_warp ? warp.arrived : go_s->arrived,
        in_warp ? 32 : go_s->live, go_s->threads - go_s->live, go_s->threads);
}

static void go_run_block(char* stacks, std::vector<int>& order, unsigned seed, u64& random) {
    go_state& s = *go_s;
    s.fibers.resize(s.threads);
    s.warps.assign((s.threads + 31) / 32, go_warp{});
    s.arena.assign(s.arena.size(), 0x7fffdeadu);  // a NaN, however it is read
    s.cells.assign(s.arena.size(), go_cell{-1, -1, -1, -1, 0});
    s.arrays.clear();
    s.used = 0;
    s.live = s.threads;
    s.arrived = s.generation = s.epoch = 0;
    for (int i = 0; i < s.threads; i++) go_start(s.fibers[i], stacks + i * (GO_STACK + 4096) + 4096);
    while (s.live && !s.failed) {
        bool moved = false;
        go_order(order, seed, random);
        for (int i = 0; i < s.threads && !s.failed; i++) {
            if (!go_ready(s.fibers[order[i]])) continue;
            moved = true;
            go_resume(order[i]);
        }
        if (!moved && !s.failed) go_stuck();
    }
}

// What is called from outside. `args` holds pointers and whole numbers, `bytes` the size of what a pointer points at and
// 0 for a number; bit i of `writable`: the kernel may write there. Returns 0, or 1 with a message.
struct go_launch {
    int grid_x, grid_y, threads;
    unsigned seed;
    int count;
    const u64* args;
    const u64* bytes;
    u64 writable;
    char* message;
    int message_size;
};

static int go_execute(const go_launch& launch, std::function<void()> kernel) {
    go_state state{};
    go_s = &state;
    state.kernel = kernel;
    state.grid_x = launch.grid_x, state.grid_y = launch.grid_y, state.threads = launch.threads;
    state.message = launch.message, state.message_size = launch.message_size;
    state.arena.resize((227 << 10) / 4);
    for (int i = 0; i < launch.count; i++) {
        const char* start = (const char*)launch.args[i];
        if (launch.bytes[i]) state.buffers.push_back({start, start + launch.bytes[i], bool(launch.writable >> i & 1)});
    }
    size_t each = GO_STACK + 4096, size = each * launch.threads;
    char* stacks = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) {
        snprintf(launch.message, launch.message_size, "there is no memory for %d stacks", launch.threads);
        return 1;
    }
    for (int i = 0; i < launch.threads; i++) mprotect(stacks + i * each, 4096, PROT_NONE);  // too deep a stack stops here
    std::vector<int> order(launch.threads), blocks(launch.grid_x * launch.grid_y);
    u64 random = launch.seed;
    go_order(blocks, launch.seed, random);
    for (int block : blocks) {
        state.block_x = block % launch.grid_x, state.block_y = block / launch.grid_x;
        if (!state.failed) go_run_block(stacks, order, launch.seed, random);
    }
    munmap(stacks, size);
    return state.failed;
}

// Places and meetings --------------------------------------------------------------------------------------------------

GO_FN int go_thread() { return go_s->thread; }
GO_FN int go_block() { return go_s->block_x; }
GO_FN int go_block_y() { return go_s->block_y; }
GO_FN int go_blocks() { return go_s->grid_x; }

static void go_sync(int line) {
    if (go_s->arrived == 0) {
        go_s->barrier_line = line;
        go_s->barrier_thread = go_s->thread;
    } else if (go_s->barrier_line != line) {
        go_fail("is at the barrier of line %d while thread %d waits at that of line %d", line, go_s->barrier_thread, go_s->barrier_line);
    }
    if (++go_s->arrived == go_s->live) go_release_barrier();
    else go_wait(&go_s->generation);
}
#define GO_SYNC() go_sync(__LINE__)

// Publishes words, waits for the other lanes, and returns what all 32 published.
static u32 (*go_meet(const u32* words, int count, int line))[6] {
    go_warp& warp = go_s->warps[go_s->thread / 32];
    u32 (*slot)[6] = warp.slot[warp.generation & 1];
    memcpy(slot[go_s->thread % 32], words, count * 4);
    if (warp.arrived == 0) warp.line = line;
    else if (warp.line != line) go_fail("is at line %d while lanes of its warp wait at line %d", line, warp.line);
    if (++warp.arrived == 32) {
        warp.arrived = 0;
        warp.generation++;
    } else {
        go_wait(&warp.generation);
    }
    return slot;
}

// Memory ---------------------------------------------------------------------------------------------------------------

static const char* go_checked(const void* pointer, size_t bytes, bool writes, int line) {
    const char* p = (const char*)pointer;
    if ((uintptr_t)p % bytes) go_fail("line %d: an access of %zu bytes is not aligned", line, bytes);
    for (const go_buffer& each : go_s->buffers) {
        if (p < each.start || p + bytes > each.end) continue;
        if (writes && !each.writable) go_fail("line %d: writes into what is only to be read", line);
        return p;
    }
    go_fail("line %d: %s %zu bytes outside of every buffer", line, writes ? "writes" : "reads", bytes);
    return p;
}
template <class T> static T go_read(const void* p, int line) {
    T v;
    memcpy(&v, go_checked(p, sizeof v, false, line), sizeof v);
    return v;
}
template <class T> static void go_write(void* p, T v, int line) {
    go_checked(p, sizeof v, true, line);
    memcpy(p, &v, sizeof v);
}
// Macros, for the line of the kernel.
#define go_stream4(p) go_read<u32x4>(p, __LINE__)
#define go_stream2(p) go_read<u32x2>(p, __LINE__)
#define go_stream1(p) go_read<u32>(p, __LINE__)
#define go_load4(p) go_read<u32x4>(p, __LINE__)
#define go_load2(p) go_read<u32x2>(p, __LINE__)
#define go_load1(p) go_read<u32>(p, __LINE__)
#define go_load_u16(p) u32(go_read<u16>(p, __LINE__))
#define go_load_u8(p) u32(go_read<u8>(p, __LINE__))
#define go_store4(p, ...) go_write<u32x4>(p, __VA_ARGS__, __LINE__)
#define go_store2(p, ...) go_write<u32x2>(p, __VA_ARGS__, __LINE__)
#define go_store1(p, ...) go_write<u32>(p, __VA_ARGS__, __LINE__)
#define go_store_u16(p, v) go_write<u16>(p, u16(v), __LINE__)
#define go_store_u8(p, v) go_write<u8>(p, u8(v), __LINE__)
#define go_load_fresh(p) go_read<u32>(p, __LINE__)

static u32 go_draw(u32* counter, int line) {
    u32 v = go_read<u32>(counter, line);
    go_write<u32>(counter, v + 1, line);
    return v;
}
#define go_ticket(counter) go_draw(counter, __LINE__)

template <class T> struct go_shared {
    static_assert(sizeof(T) == 4, "shared memory is made of words");
    u32* start;
    int count;
};
template <class T> static go_shared<T> go_array(int count, int line) {
    for (auto& each : go_s->arrays) if (each.first == line) return {each.second, count};
    u32* start = go_s->arena.data() + go_s->used;
    go_s->used += (count + 3) / 4 * 4;
    if (go_s->used > go_s->arena.size()) go_fail("line %d: there is no more shared memory", line);
    go_s->arrays.push_back({line, start});
    return {start, count};
}
template <class T> static u32* go_touch(go_shared<T> array, int index, bool writes, int line) {
    if (index < 0 || index >= array.count) go_fail("line %d: place %d of a shared array of %d", line, index, array.count);
    go_cell& cell = go_s->cells[array.start + index - go_s->arena.data()];
    int me = go_s->thread, now = go_s->epoch;
    if (cell.written == now && cell.writer != me)
        go_fail("line %d: %s place %d of shared memory, which thread %d wrote with no barrier between", line, writes ? "writes" : "reads", index, cell.writer);
    if (writes && cell.read == now && (cell.readers > 1 || cell.reader != me))
        go_fail("line %d: writes place %d of shared memory, which thread %d read with no barrier between", line, index, cell.reader);
    if (writes) {
        cell.writer = me, cell.written = now;
    } else {
        cell.readers = cell.read == now ? cell.readers + (cell.reader != me) : 1;
        cell.reader = me, cell.read = now;
    }
    return array.start + index;
}
template <class T> static T go_get(go_shared<T> array, int index, int line) {
    T v;
    memcpy(&v, go_touch(array, index, false, line), 4);
    return v;
}
template <class T> static void go_put(go_shared<T> array, int index, T v, int line) { memcpy(go_touch(array, index, true, line), &v, 4); }
#define GO_SHARED(type, name, count) go_shared<type> name = go_array<type>(count, __LINE__)
#define GO_PUT(array, index, value) go_put(array, index, value, __LINE__)
#define GO_GET(array, index) go_get(array, index, __LINE__)

// Halves and bfloat16s -------------------------------------------------------------------------------------------------

GO_FN u32 go_bits(float x) { u32 v; memcpy(&v, &x, 4); return v; }
GO_FN float go_float(u32 x) { float v; memcpy(&v, &x, 4); return v; }

static double go_half_value(u32 bits) {
    static std::vector<double> table;
    if (table.empty()) {
        table.resize(1 << 16);
        for (u32 i = 0; i < 1 << 16; i++) {
            int exponent = i >> 10 & 31, mantissa = i & 1023;
            double v = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
            table[i] = i >> 15 ? -v : v;
        }
    }
    return table[bits & 0xffff];
}
// To the nearest number with `digits` binary digits and exponents from `least` on; of two the even one.
static double go_rounded(double v, int digits, int least) {
    if (v == 0 || !std::isfinite(v)) return v;
    int exponent;
    frexp(v, &exponent);
    int unit = (exponent - digits > least ? exponent - digits : least);
    return ldexp(nearbyint(ldexp(v, -unit)), unit);
}
static u32 go_half_bits(double v) {
    if (std::isnan(v)) return 0x7fff;
    u32 sign = std::signbit(v) ? 0x8000 : 0;
    double m = fabs(go_rounded(v, 11, -24));
    if (m >= 65536) return sign | 0x7c00;
    if (m < 0x1p-14) return sign | u32(m * 0x1p24);
    int exponent;
    frexp(m, &exponent);
    return sign | u32(exponent + 14) << 10 | (u32(ldexp(m, 11 - exponent)) & 1023);
}
static u32 go_bfloat_bits(double v) {
    if (std::isnan(v)) return 0x7fff;
    double r = go_rounded(v, 8, -133);
    return go_bits(float(r)) >> 16;  // exact, or infinity
}
GO_FN float go_of_h(u32 v) { return go_half_value(v); }
GO_FN u32 go_to_h(float v) { return go_half_bits(v); }
GO_FN float go_of_b(u32 v) { return go_float(v << 16); }
GO_FN u32 go_to_b(float v) { return go_bfloat_bits(v); }
GO_FN void go_of_h2(u32 v, float& low, float& high) { low = go_of_h(v), high = go_of_h(v >> 16); }
GO_FN void go_of_b2(u32 v, float& low, float& high) { low = go_of_b(v & 0xffff), high = go_of_b(v >> 16); }
GO_FN u32 go_to_h2(float low, float high) { return go_to_h(low) | go_to_h(high) << 16; }
GO_FN u32 go_to_b2(float low, float high) { return go_to_b(low) | go_to_b(high) << 16; }

// Products of two halves, and sums with a third, are exact in float64 as far as the rounding to halves can tell.
static u32 go_fma_h(u32 a, u32 b, u32 c) { return go_half_bits(go_half_value(a) * go_half_value(b) + go_half_value(c)); }
static u32 go_fma_b(u32 a, u32 b, u32 c) { return go_bfloat_bits(double(go_of_b(a & 0xffff)) * go_of_b(b & 0xffff) + go_of_b(c & 0xffff)); }
GO_FN u32 go_fma_h2(u32 a, u32 b, u32 c) { return go_fma_h(a, b, c) | go_fma_h(a >> 16, b >> 16, c >> 16) << 16; }
GO_FN u32 go_fma_b2(u32 a, u32 b, u32 c) { return go_fma_b(a, b, c) | go_fma_b(a >> 16, b >> 16, c >> 16) << 16; }

// Floats and words -----------------------------------------------------------------------------------------------------

GO_FN float go_add(float a, float b) { return a + b; }
GO_FN float go_sub(float a, float b) { return a - b; }
GO_FN float go_mul(float a, float b) { return a * b; }
GO_FN float go_fma(float a, float b, float c) { return fmaf(a, b, c); }
GO_FN float go_div(float a, float b) { return a / b; }
GO_FN float go_sqrt(float a) { return sqrtf(a); }
GO_FN float go_of_int(int a) { return float(a); }
GO_FN int go_to_int(float a) {
    if (a != a) return 0;
    return a >= 2147483648.0f ? 2147483647 : a < -2147483648.0f ? -2147483647 - 1 : int(nearbyintf(a));
}
GO_FN int go_to_s8(float a) {
    int v = go_to_int(a);
    return v < -128 ? -128 : v > 127 ? 127 : v;
}
GO_FN u32 go_and_or(u32 v, u32 mask, u32 bits) { return (v & mask) | bits; }
GO_FN u32 go_bytes(u32 low, u32 high, u32 selector) {
    u64 both = u64(high) << 32 | low;
    u32 r = 0;
    for (int i = 0; i < 4; i++) r |= u32(both >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
    return r;
}

// Between lanes --------------------------------------------------------------------------------------------------------

static u32 go_exchange(u32 v, int mask, int line) { return go_meet(&v, 1, line)[(go_s->thread % 32) ^ mask][0]; }
#define go_shuffle_xor(v, mask) go_exchange(v, mask, __LINE__)

// The tensor core as an ideal: the sixteen products are added to c one after the other in float64, and the sum is rounded
// once. Real ones add in an order and a precision of their own.
template <class Value> static void go_mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, Value value, int line) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    u32 (*all)[6] = go_meet(mine, 6, line);
    int lane = go_s->thread % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        double sum = c[i];
        for (int k = 0; k < 16; k++) {
            int owner = k % 8 / 2, half = k / 8, shift = 16 * (k % 2);
            u32 x = all[4 * g + owner][i / 2 + 2 * half] >> shift, y = all[4 * (2 * t + i % 2) + owner][4 + half] >> shift;
            sum += value(x & 0xffff) * value(y & 0xffff);
        }
        c[i] = float(sum);
    }
}
#define go_mma_h(c, a, b0, b1) go_mma(c, a, b0, b1, go_half_value, __LINE__)
#define go_mma_b(c, a, b0, b1) go_mma(c, a, b0, b1, [](u32 v) { return double(go_of_b(v)); }, __LINE__)

static void go_mma_bytes(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, int line) {
    u32 mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    u32 (*all)[6] = go_meet(mine, 6, line);
    int lane = go_s->thread % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {
        for (int k = 0; k < 32; k++) {
            int owner = k % 16 / 4, half = k / 16, shift = 8 * (k % 4);
            c[i] += int(s8(all[4 * g + owner][i / 2 + 2 * half] >> shift)) * int(s8(all[4 * (2 * t + i % 2) + owner][4 + half] >> shift));
        }
    }
}
#define go_mma_s8(c, a, b0, b1) go_mma_bytes(c, a, b0, b1, __LINE__)
