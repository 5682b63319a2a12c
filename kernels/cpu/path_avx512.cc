// CPUs with AVX-512 VNNI (since 2019).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "paths.h"

#define INLINE static inline __attribute__((always_inline))

// Only what follows may use these instructions: nothing of the standard library is compiled here.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,f16c")
#endif

namespace internjax {
namespace avx512 {
namespace {
#include "lanes_avx512.h"
#include "matmul.h"
#include "float_matmul.h"
#include "attention.h"
}  // namespace
}  // namespace avx512

const Path kAvx512 = {"avx512", avx512::quantize, avx512::matmul, avx512::float_matmul,
                      avx512::attend, avx512::merge, avx512::sweep};

}  // namespace internjax

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
