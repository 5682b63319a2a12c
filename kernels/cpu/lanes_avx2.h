// Sixteen lanes in two AVX2 registers: columns 0-7 and 8-15.

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };
struct Bytes { __m256i a, b; };

constexpr int kRows = 2;  // rows that share a tile while it is unpacked
constexpr int kFloatRows = 4;  // rows that share a load of floats
constexpr int kSums = 4;  // of floats, that registers hold side by side
constexpr int kKeys = 4;  // whose scores are summed side by side
constexpr int kGroup = 32;  // groups of this size are compiled apart, loops unrolled
#define UNROLL _Pragma("GCC unroll 16")

INLINE Floats splat(float x) { const __m256 v = _mm256_set1_ps(x); return {v, v}; }
INLINE Ints splat(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
INLINE Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
INLINE void store(float* p, Floats x, int64_t n) {
  float all[16];
  store(all, x);
  std::memcpy(p, all, n * 4);
}
INLINE Floats operator+(Floats x, Floats y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
INLINE Floats operator-(Floats x, Floats y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
INLINE Floats operator*(Floats x, Floats y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
INLINE Ints operator+(Ints x, Ints y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
INLINE Ints larger(Ints x, Ints y) {
  return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)};
}
INLINE Floats larger(Floats x, Floats y) {
  return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)};
}
INLINE __m256 where_above(__m256 x, __m256 low, __m256 y) {
  const __m256 kept = _mm256_blendv_ps(y, x, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_and_ps(kept, _mm256_cmp_ps(x, low, _CMP_NLE_UQ));
}
INLINE Floats where_above(Floats x, Floats low, Floats y) {
  return {where_above(x.a, low.a, y.a), where_above(x.b, low.b, y.b)};
}
INLINE Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE Ints nearest(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE Ints bits_of(Floats x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
INLINE Floats floats_of(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
INLINE Ints magnitude(Floats x) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  const Ints bits = bits_of(x);
  return {_mm256_and_si256(bits.a, mask), _mm256_and_si256(bits.b, mask)};
}
INLINE Ints shift_left(Ints x, int n) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
INLINE void store_int8(int8_t* p, Ints x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Floats load_int8(const int8_t* p) {
  const __m128i x = load16(p);
  return to_floats({_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))});
}
INLINE Floats load_bfloat16(const uint16_t* p) {
  return floats_of(shift_left(
      {_mm256_cvtepu16_epi32(load16(p)), _mm256_cvtepu16_epi32(load16(p + 8))}, 16));
}
INLINE Floats load_half(const uint16_t* p) {
  return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))};
}

INLINE Bytes load_bytes(const uint8_t* p) { return {load32(p), load32(p + 32)}; }
INLINE Bytes low_nibbles(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
INLINE Bytes high_nibbles(Bytes x) {
  return low_nibbles({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)});
}
INLINE __m256i four(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm256_set1_epi32(word);
}
INLINE __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
// vpmaddubsw saturates its pairs at 32,767; nibbles reach 2 * 15 * 127.
INLINE Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  const __m256i v = four(x);
  return sum + Ints{widen(_mm256_maddubs_epi16(w.a, v)), widen(_mm256_maddubs_epi16(w.b, v))};
}
// |w| times x with the sign of w: 2 * 128 * 127 = 32,512 still fits.
INLINE Ints start8(int32_t) { return splat(0); }
INLINE __m256i signed_pairs(__m256i w, __m256i x) {
  return widen(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}
INLINE Ints dot4_int8(Ints sum, Bytes w, const int8_t* x) {
  const __m256i v = four(x);
  return sum + Ints{signed_pairs(w.a, v), signed_pairs(w.b, v)};
}
INLINE Floats input(Bytes w, int j) {
  const __m256i mask = _mm256_set1_epi32(255);
  return to_floats({_mm256_and_si256(_mm256_srli_epi32(w.a, 8 * j), mask),
                    _mm256_and_si256(_mm256_srli_epi32(w.b, 8 * j), mask)});
}
INLINE Floats input_int8(Bytes w, int j) {
  const Ints up = shift_left({w.a, w.b}, 24 - 8 * j);
  return to_floats({_mm256_srai_epi32(up.a, 24), _mm256_srai_epi32(up.b, 24)});
}

INLINE float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
INLINE Floats sums(const Floats (&x)[16]) {
  float all[16];
  for (int i = 0; i < 16; ++i) all[i] = sum(x[i]);
  return load(all);
}
INLINE float largest(Floats x) {
  float all[8], s = -INFINITY;
  _mm256_storeu_ps(all, _mm256_max_ps(x.a, x.b));
  for (float each : all) s = each > s ? each : s;
  return s;
}
INLINE int32_t sum(Ints x) {
  int32_t all[8], s = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(all), _mm256_add_epi32(x.a, x.b));
  for (int32_t each : all) s += each;
  return s;
}
INLINE int32_t largest(Ints x) {
  int32_t all[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(all), _mm256_max_epi32(x.a, x.b));
  int32_t s = all[0];
  for (int32_t each : all) s = each > s ? each : s;
  return s;
}
