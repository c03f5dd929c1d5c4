// Marks for CPU code that is to be compiled once per instruction set.
//
// U4D_CLONES goes before a free function with the hot loop: the compiler makes one copy per x86-64 level and the loader
// picks the best that the machine has, so one wheel runs everywhere. Mark the function that an OpenMP loop calls, not
// the one that holds the `#pragma omp parallel` (GCC compiles the outlined loop body for the baseline only), and mark
// what it calls U4D_INLINE, since a call that is not inlined falls back to the baseline too. Lambdas do not inherit the
// level.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define U4D_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define U4D_CLONES
#endif

#define U4D_INLINE inline __attribute__((always_inline))

// Goes between a lambda's parameters and its body, in a hot loop: what is not inlined is not vectorised.
#if defined(__CUDACC__)
#define U4D_INLINE_LAMBDA
#else
#define U4D_INLINE_LAMBDA __attribute__((always_inline))
#endif
