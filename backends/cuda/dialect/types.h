// Words, and how kernels are written: the part of the dialect that device and host have in common.
//
// A kernel is C++ that computes on 32-bit words, floats and pointers only by the go_* functions of `device.h` or `host.h`
// and those below. Float arithmetic is written as calls, each with one rounding to nearest: `a * b + c` would be rounded
// once by a compiler that contracts it and twice by one that does not.

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(8) u32x2 { u32 x, y; };
struct alignas(16) u32x4 { u32 x, y, z, w; };
