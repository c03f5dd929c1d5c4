// Warpgroup matrix products, one specialisation for each width that a kernel uses; hopper.h includes this. To add a
// width, add a line to the tables at the end.
#pragma once

// Accumulators as operands 0 to COUNT - 1 of an asm statement: their names, and what they are bound to.
#define U4D_JOIN(first, second) first ", " second
#define U4D_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define U4D_NAMES_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define U4D_NAMES_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define U4D_NAMES_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define U4D_NAMES_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define U4D_NAMES_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define U4D_NAMES_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define U4D_NAMES_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define U4D_NAMES_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define U4D_NAMES_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define U4D_NAMES_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define U4D_NAMES_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define U4D_NAMES_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define U4D_NAMES_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define U4D_NAMES_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define U4D_NAMES_15 "%120, %121, %122, %123, %124, %125, %126, %127"
#define U4D_NAMES_TO_8 U4D_NAMES_0
#define U4D_NAMES_TO_16 U4D_JOIN(U4D_NAMES_TO_8, U4D_NAMES_1)
#define U4D_NAMES_TO_24 U4D_JOIN(U4D_NAMES_TO_16, U4D_NAMES_2)
#define U4D_NAMES_TO_32 U4D_JOIN(U4D_NAMES_TO_24, U4D_NAMES_3)
#define U4D_NAMES_TO_40 U4D_JOIN(U4D_NAMES_TO_32, U4D_NAMES_4)
#define U4D_NAMES_TO_48 U4D_JOIN(U4D_NAMES_TO_40, U4D_NAMES_5)
#define U4D_NAMES_TO_56 U4D_JOIN(U4D_NAMES_TO_48, U4D_NAMES_6)
#define U4D_NAMES_TO_64 U4D_JOIN(U4D_NAMES_TO_56, U4D_NAMES_7)
#define U4D_NAMES_TO_72 U4D_JOIN(U4D_NAMES_TO_64, U4D_NAMES_8)
#define U4D_NAMES_TO_80 U4D_JOIN(U4D_NAMES_TO_72, U4D_NAMES_9)
#define U4D_NAMES_TO_88 U4D_JOIN(U4D_NAMES_TO_80, U4D_NAMES_10)
#define U4D_NAMES_TO_96 U4D_JOIN(U4D_NAMES_TO_88, U4D_NAMES_11)
#define U4D_NAMES_TO_104 U4D_JOIN(U4D_NAMES_TO_96, U4D_NAMES_12)
#define U4D_NAMES_TO_112 U4D_JOIN(U4D_NAMES_TO_104, U4D_NAMES_13)
#define U4D_NAMES_TO_120 U4D_JOIN(U4D_NAMES_TO_112, U4D_NAMES_14)
#define U4D_NAMES_TO_128 U4D_JOIN(U4D_NAMES_TO_120, U4D_NAMES_15)
#define U4D_BIND_8(d, i)                                                                                      \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define U4D_BIND_TO_8(d) U4D_BIND_8(d, 0)
#define U4D_BIND_TO_16(d) U4D_BIND_TO_8(d), U4D_BIND_8(d, 8)
#define U4D_BIND_TO_24(d) U4D_BIND_TO_16(d), U4D_BIND_8(d, 16)
#define U4D_BIND_TO_32(d) U4D_BIND_TO_24(d), U4D_BIND_8(d, 24)
#define U4D_BIND_TO_40(d) U4D_BIND_TO_32(d), U4D_BIND_8(d, 32)
#define U4D_BIND_TO_48(d) U4D_BIND_TO_40(d), U4D_BIND_8(d, 40)
#define U4D_BIND_TO_56(d) U4D_BIND_TO_48(d), U4D_BIND_8(d, 48)
#define U4D_BIND_TO_64(d) U4D_BIND_TO_56(d), U4D_BIND_8(d, 56)
#define U4D_BIND_TO_72(d) U4D_BIND_TO_64(d), U4D_BIND_8(d, 64)
#define U4D_BIND_TO_80(d) U4D_BIND_TO_72(d), U4D_BIND_8(d, 72)
#define U4D_BIND_TO_88(d) U4D_BIND_TO_80(d), U4D_BIND_8(d, 80)
#define U4D_BIND_TO_96(d) U4D_BIND_TO_88(d), U4D_BIND_8(d, 88)
#define U4D_BIND_TO_104(d) U4D_BIND_TO_96(d), U4D_BIND_8(d, 96)
#define U4D_BIND_TO_112(d) U4D_BIND_TO_104(d), U4D_BIND_8(d, 104)
#define U4D_BIND_TO_120(d) U4D_BIND_TO_112(d), U4D_BIND_8(d, 112)
#define U4D_BIND_TO_128(d) U4D_BIND_TO_120(d), U4D_BIND_8(d, 120)

// A and B from shared memory. COUNT = N / 2 accumulators come first; then a is operand number COUNT, and B and
// P are the numbers of the next two. TAIL: what says, for types that have a choice, that both operands are K-major.
#define U4D_WGMMA_SHARED(FUNCTION, SHAPE, TYPES, TAIL, N, COUNT, B, P)                                \
  template <>                                                                                         \
  U4D_HOPPER void FUNCTION<N>(float (&d)[COUNT], uint64_t a, uint64_t b, int accumulate) {            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                              \
                 ", 0;\n"                                                                             \
                 "wgmma.mma_async.sync.aligned.m64n" #N SHAPE ".f32." TYPES " {" U4D_NAMES_TO_##COUNT \
                 "}, %" #COUNT ", %" #B ", p, 1, 1" TAIL ";\n}\n"                                     \
                 : U4D_BIND_TO_##COUNT(d)                                                             \
                 : "l"(a), "l"(b), "r"(accumulate));                                                  \
  }

// A from registers. TAIL: for bfloat16, that B is MN-major.
#define U4D_WGMMA_REGISTERS(FUNCTION, SHAPE, TYPES, TAIL, N, COUNT, A1, A2, A3, B, P)                            \
  template <>                                                                                                    \
  U4D_HOPPER void FUNCTION<N>(float (&d)[COUNT], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b, \
                              int accumulate) {                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                                         \
                 ", 0;\n"                                                                                        \
                 "wgmma.mma_async.sync.aligned.m64n" #N SHAPE ".f32." TYPES " {" U4D_NAMES_TO_##COUNT            \
                 "}, {%" #COUNT ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1" TAIL ";\n}\n"                \
                 : U4D_BIND_TO_##COUNT(d)                                                                        \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate));                                 \
  }

#define U4D_BF16_SHARED(N, COUNT, B, P) U4D_WGMMA_SHARED(wgmma_shared, "k16", "bf16.bf16", ", 0, 0", N, COUNT, B, P)
#define U4D_E4M3_SHARED(N, COUNT, B, P) U4D_WGMMA_SHARED(wgmma_shared_e4m3, "k32", "e4m3.e4m3", "", N, COUNT, B, P)
#define U4D_BF16_REGISTERS(N, COUNT, A1, A2, A3, B, P) \
  U4D_WGMMA_REGISTERS(wgmma_registers, "k16", "bf16.bf16", ", 1", N, COUNT, A1, A2, A3, B, P)
#define U4D_E4M3_REGISTERS(N, COUNT, A1, A2, A3, B, P) \
  U4D_WGMMA_REGISTERS(wgmma_registers_e4m3, "k32", "e4m3.e4m3", "", N, COUNT, A1, A2, A3, B, P)

namespace u4d::hopper {

// "wgmma.mma_async": d[64,N] (+)= a[64,16] b[16,N] from bfloat16; a and b in shared memory, both K-major.
// accumulate = 0: d is overwritten.
template <int N>
U4D_HOPPER void wgmma_shared(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

// The same; a in registers, b in shared memory, MN-major.
template <int N>
U4D_HOPPER void wgmma_registers(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                                int accumulate);

// The same from e4m3: d[64,N] (+)= a[64,32] b[32,N]; a and b in shared memory, both K-major (there is no other way).
// The sum keeps about 14 bits while it is in the tensor core.
template <int N>
U4D_HOPPER void wgmma_shared_e4m3(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate);

// The same; a in registers, four e4m3 each, the lowest column in the lowest byte. With q = t % 4 and the row of d:
//   a0: that row, columns 4 q .. 4 q + 3;  a1: row + 8;  a2: the row, columns + 16;  a3: row + 8, columns + 16.
template <int N>
U4D_HOPPER void wgmma_registers_e4m3(float (&d)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b,
                                     int accumulate);

U4D_BF16_SHARED(64, 32, 33, 34)
U4D_BF16_SHARED(96, 48, 49, 50)
U4D_BF16_SHARED(128, 64, 65, 66)
U4D_BF16_SHARED(160, 80, 81, 82)
U4D_BF16_SHARED(176, 88, 89, 90)
U4D_BF16_SHARED(192, 96, 97, 98)
U4D_BF16_SHARED(256, 128, 129, 130)

U4D_E4M3_SHARED(64, 32, 33, 34)
U4D_E4M3_SHARED(96, 48, 49, 50)
U4D_E4M3_SHARED(128, 64, 65, 66)
U4D_E4M3_SHARED(160, 80, 81, 82)
U4D_E4M3_SHARED(176, 88, 89, 90)
U4D_E4M3_SHARED(192, 96, 97, 98)
U4D_E4M3_SHARED(256, 128, 129, 130)

U4D_BF16_REGISTERS(64, 32, 33, 34, 35, 36, 37)
U4D_BF16_REGISTERS(128, 64, 65, 66, 67, 68, 69)

U4D_E4M3_REGISTERS(64, 32, 33, 34, 35, 36, 37)
U4D_E4M3_REGISTERS(128, 64, 65, 66, 67, 68, 69)

}  // namespace u4d::hopper
