#include "cpu.h"

#include <cstdlib>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

namespace internjax {
namespace {

#if defined(__x86_64__)
// What the operating system saves on a switch of threads (XCR0); 0 where it does not say.
unsigned long long saved_state() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

// Intel's manual, volume 1, 14.3 (AVX2, F16C) and 15.2 (AVX-512): CPUID bits and XCR0.
std::vector<const Path*> legal_paths() {
  std::vector<const Path*> paths;
  unsigned a, b, c, d, f16c = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) f16c = c & bit_F16C;
  const unsigned long long state = saved_state();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) b = c = 0;
  constexpr unsigned kAvx512Bits = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  const bool avx = (state & 0x6) == 0x6 && f16c && (b & bit_AVX2);
  if (avx && (state & 0xe6) == 0xe6 && (b & kAvx512Bits) == kAvx512Bits && (c & bit_AVX512VNNI))
    paths.push_back(&kAvx512);
  if (avx) paths.push_back(&kAvx2);
  paths.push_back(&kPortable);
  return paths;
}
#else
std::vector<const Path*> legal_paths() { return {&kPortable}; }
#endif

}  // namespace

const Path* find_path(std::string_view name) {
  static const std::vector<const Path*> paths = legal_paths();
  static const char* const asked = std::getenv("INTERNJAX_CPU_PATH");
  const std::string_view wanted = name.empty() && asked ? asked : name;
  if (wanted.empty()) return paths.front();
  for (const Path* path : paths)
    if (wanted == path->name) return path;
  return nullptr;
}

#if defined(__x86_64__)
PlainFloats::PlainFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
PlainFloats::~PlainFloats() { _mm_setcsr(before_); }
#else
PlainFloats::PlainFloats() {}
PlainFloats::~PlainFloats() {}
#endif

}  // namespace internjax
