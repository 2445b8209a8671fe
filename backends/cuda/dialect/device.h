// The device half of the dialect: CUDA without any header, for NVRTC and nvcc. Every function has its twin in `host.h`.

#define GO_KERNEL(name, threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks) name
#define GO_FN static __device__ __forceinline__
#define GO_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define GO_PUT(array, index, value) ((array)[index] = (value))
#define GO_GET(array, index) ((array)[index])
#define GO_SYNC() __syncthreads()
#define GO_UNROLL _Pragma("unroll")

// Places ---------------------------------------------------------------------------------------------------------------

GO_FN int go_thread() { return threadIdx.x; }
GO_FN int go_block() { return blockIdx.x; }
GO_FN int go_block_y() { return blockIdx.y; }
GO_FN int go_blocks() { return gridDim.x; }

// Memory ---------------------------------------------------------------------------------------------------------------
// `stream` is for what is read once: it leaves the first cache to the rest.

GO_FN u32 go_bits(float x) { return __float_as_uint(x); }
GO_FN float go_float(u32 x) { return __uint_as_float(x); }

GO_FN u32x4 go_stream4(const u32* p) {
    u32x4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
GO_FN u32x2 go_stream2(const u32* p) {
    u32x2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
GO_FN u32 go_stream1(const u32* p) {
    u32 v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
GO_FN u32x4 go_load4(const u32* p) {
    u32x4 v;
    asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
GO_FN u32x2 go_load2(const u32* p) {
    u32x2 v;
    asm("ld.global.nc.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
GO_FN u32 go_load1(const u32* p) {
    u32 v;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
GO_FN u32 go_load_u16(const u16* p) {
    u16 v;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
GO_FN u32 go_load_u8(const u8* p) {
    u32 v;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
GO_FN void go_store4(u32* p, u32x4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" :: "l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
GO_FN void go_store2(u32* p, u32x2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1,%2};" :: "l"(p), "r"(v.x), "r"(v.y) : "memory");
}
GO_FN void go_store1(u32* p, u32 v) { asm volatile("st.global.u32 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }
GO_FN void go_store_u16(u16* p, u32 v) { asm volatile("st.global.u16 [%0], %1;" :: "l"(p), "h"((u16)v) : "memory"); }
GO_FN void go_store_u8(u8* p, u32 v) { asm volatile("st.global.u8 [%0], %1;" :: "l"(p), "r"(v) : "memory"); }

// What other blocks wrote, behind a ticket: never from the first cache.
GO_FN u32 go_load_fresh(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
// Returns how many blocks came before. What a thread wrote before is seen by who draws a later ticket.
GO_FN u32 go_ticket(u32* counter) {
    u32 v;
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    asm volatile("atom.global.add.u32 %0, [%1], 1;" : "=r"(v) : "l"(counter) : "memory");
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
    return v;
}

// Between lanes --------------------------------------------------------------------------------------------------------

GO_FN u32 go_shuffle_xor(u32 v, int mask) {
    u32 r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(r) : "r"(v), "r"(mask));
    return r;
}

// D = A B + C with A [16, 16], B [16, 8], and C [16, 8] in float32; of halves, then of bfloat16s.
GO_FN void go_mma_h(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
GO_FN void go_mma_b(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// The same of signed bytes with A [16, 32], B [32, 8], and C [16, 8] in int32.
GO_FN void go_mma_s8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Words ----------------------------------------------------------------------------------------------------------------

GO_FN u32 go_and_or(u32 v, u32 mask, u32 bits) {  // (v & mask) | bits
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(v), "r"(mask), "r"(bits));
    return r;
}
// The bytes of {high, low} that the four digits of `selector` name, lowest first.
GO_FN u32 go_bytes(u32 low, u32 high, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(selector));
    return r;
}

// Pairs of halves, of bfloat16s ----------------------------------------------------------------------------------------

GO_FN u32 go_fma_h2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
GO_FN u32 go_fma_b2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// Floats ---------------------------------------------------------------------------------------------------------------

GO_FN float go_add(float a, float b) { return __fadd_rn(a, b); }
GO_FN float go_sub(float a, float b) { return __fsub_rn(a, b); }
GO_FN float go_mul(float a, float b) { return __fmul_rn(a, b); }
GO_FN float go_fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
GO_FN float go_div(float a, float b) { return __fdiv_rn(a, b); }
GO_FN float go_sqrt(float a) { return __fsqrt_rn(a); }
GO_FN float go_of_int(int a) { return __int2float_rn(a); }
GO_FN int go_to_int(float a) { return __float2int_rn(a); }  // to the nearest, of two the even one; NaN gives 0

// The same as a signed byte: what is too large is the end.
GO_FN int go_to_s8(float a) {
    int r;
    asm("cvt.rni.s8.f32 %0, %1;" : "=r"(r) : "f"(a));
    return r;
}

GO_FN float go_of_h(u32 v) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((u16)v));
    return r;
}
GO_FN u32 go_to_h(float v) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
GO_FN float go_of_b(u32 v) { return go_float(v << 16); }
GO_FN u32 go_to_b(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
// Both of a word, the lower first.
GO_FN void go_of_h2(u32 v, float& low, float& high) {
    u16 a, b;
    asm("mov.b32 {%0,%1}, %2;" : "=h"(a), "=h"(b) : "r"(v));
    low = go_of_h(a);
    high = go_of_h(b);
}
GO_FN void go_of_b2(u32 v, float& low, float& high) {
    low = go_float(v << 16);
    high = go_float(v & 0xffff0000u);
}
// Two floats in one word, the first below.
GO_FN u32 go_to_h2(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
GO_FN u32 go_to_b2(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
