// Sixteen lanes in one AVX-512 register; dot products by VNNI (vpdpbusd: unsigned x signed bytes).

struct Floats { __m512 v; };
struct Ints { __m512i v; };
struct Bytes { __m512i v; };

constexpr int kRows = 8;  // rows that share a tile while it is unpacked
constexpr int kFloatRows = 8;  // rows that share a load of floats
constexpr int kSums = 16;  // of floats, that registers hold side by side
constexpr int kKeys = 16;  // whose scores are summed side by side
constexpr int kGroup = 32;  // groups of this size are compiled apart, loops unrolled
#define UNROLL _Pragma("GCC unroll 16")

INLINE Floats splat(float x) { return {_mm512_set1_ps(x)}; }
INLINE Ints splat(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
INLINE void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
INLINE void store(float* p, Floats a, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE Ints larger(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
INLINE Floats larger(Floats x, Floats y) { return {_mm512_max_ps(x.v, y.v)}; }
INLINE Floats where_above(Floats x, Floats low, Floats y) {
  const __m512 kept = _mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q), x.v);
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, low.v, _CMP_NLE_UQ), kept)};
}
INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
INLINE Ints nearest(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
INLINE Ints bits_of(Floats a) { return {_mm512_castps_si512(a.v)}; }
INLINE Floats floats_of(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
INLINE Ints magnitude(Floats a) {
  return {_mm512_and_si512(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x7fffffff))};
}
INLINE Ints shift_left(Ints a, int n) { return {_mm512_slli_epi32(a.v, n)}; }
INLINE void store_int8(int8_t* p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
INLINE __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
INLINE Floats load_int8(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16(p)))};
}
INLINE Floats load_bfloat16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16))};
}
INLINE Floats load_half(const uint16_t* p) { return {_mm512_cvtph_ps(load32(p))}; }

INLINE Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
INLINE Bytes low_nibbles(Bytes a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
INLINE Bytes high_nibbles(Bytes a) {
  return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}
INLINE __m512i four(const int8_t* x) {
  int32_t word;
  std::memcpy(&word, x, 4);
  return _mm512_set1_epi32(word);
}
INLINE Ints dot4(Ints sum, Bytes w, const int8_t* x) {
  return {_mm512_dpbusd_epi32(sum.v, w.v, four(x))};
}
// w + 128 is unsigned; what that adds is taken off before the first product.
INLINE Ints start8(int32_t total) { return splat(-128 * total); }
INLINE Ints dot4_int8(Ints sum, Bytes w, const int8_t* x) {
  return {_mm512_dpbusd_epi32(sum.v, _mm512_xor_si512(w.v, _mm512_set1_epi8(-128)), four(x))};
}
INLINE Floats input(Bytes w, int j) {
  const __m512i byte = _mm512_and_si512(_mm512_srli_epi32(w.v, 8 * j), _mm512_set1_epi32(255));
  return {_mm512_cvtepi32_ps(byte)};
}
INLINE Floats input_int8(Bytes w, int j) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(w.v, 24 - 8 * j), 24))};
}

INLINE float sum(Floats a) {
  const __m256 high = _mm512_castps512_ps256(_mm512_shuffle_f32x4(a.v, a.v, 0xEE));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
// Lane i is the sum of a[i], by the tree of `sum`: each step halves two vectors into one.
INLINE Floats sums(const Floats (&a)[16]) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i high = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  __m512 b[8];
UNROLL
  for (int i = 0; i < 8; ++i)
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i].v, a[i + 8].v, 0x44),
                         _mm512_shuffle_f32x4(a[i].v, a[i + 8].v, 0xEE));
  __m512d c[4];
UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[i]), y = _mm512_castps_pd(b[i + 4]);
    c[i] = _mm512_castps_pd(_mm512_add_ps(_mm512_castpd_ps(_mm512_permutex2var_pd(x, low, y)),
                                          _mm512_castpd_ps(_mm512_permutex2var_pd(x, high, y))));
  }
  __m512 d[2];
UNROLL
  for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c[i], c[i + 2])),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(c[i], c[i + 2])));
  return {_mm512_add_ps(_mm512_mask_moveldup_ps(d[0], 0xAAAA, d[1]),
                        _mm512_mask_movehdup_ps(d[1], 0x5555, d[0]))};
}
INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
INLINE int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
INLINE int32_t largest(Ints a) { return _mm512_reduce_max_epi32(a.v); }
