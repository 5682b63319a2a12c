// CPUs with AVX2 and F16C (since 2013).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "paths.h"

#define INLINE static inline __attribute__((always_inline))

// Only what follows may use these instructions: nothing of the standard library is compiled here.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

namespace internjax {
namespace avx2 {
namespace {
#include "lanes_avx2.h"
#include "matmul.h"
#include "float_matmul.h"
#include "attention.h"
}  // namespace
}  // namespace avx2

const Path kAvx2 = {"avx2", avx2::quantize, avx2::matmul, avx2::float_matmul,
                    avx2::attend, avx2::merge, avx2::sweep};

}  // namespace internjax

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
