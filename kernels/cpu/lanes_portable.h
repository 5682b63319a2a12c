// Sixteen lanes in plain C++: what every compiler turns into the vectors that its target has.
// The reference for the other lanes: each function there gives the bits that it gives here.

struct Floats { float v[16]; };
struct Ints { int32_t v[16]; };
struct Bytes { uint8_t v[64]; };  // 16 columns x 4 inputs

constexpr int kRows = 2;  // rows that share a tile while it is unpacked
constexpr int kFloatRows = 4;  // rows that share a load of floats
constexpr int kSums = 4;  // of floats, that registers hold side by side
constexpr int kKeys = 4;  // whose scores are summed side by side
constexpr int kGroup = 0;  // no size of a group is compiled apart
#define UNROLL

#define EACH for (int i = 0; i < 16; ++i)

INLINE Floats splat(float x) { Floats r; EACH r.v[i] = x; return r; }
INLINE Ints splat(int32_t x) { Ints r; EACH r.v[i] = x; return r; }
INLINE Floats load(const float* p) { Floats r; std::memcpy(r.v, p, 64); return r; }
INLINE void store(float* p, const Floats& a) { std::memcpy(p, a.v, 64); }
INLINE void store(float* p, const Floats& a, int64_t n) { std::memcpy(p, a.v, n * 4); }
INLINE Floats operator+(const Floats& a, const Floats& b) {
  Floats r; EACH r.v[i] = a.v[i] + b.v[i]; return r;
}
INLINE Floats operator-(const Floats& a, const Floats& b) {
  Floats r; EACH r.v[i] = a.v[i] - b.v[i]; return r;
}
INLINE Floats operator*(const Floats& a, const Floats& b) {
  Floats r; EACH r.v[i] = a.v[i] * b.v[i]; return r;
}
INLINE Ints operator+(const Ints& a, const Ints& b) {
  Ints r; EACH r.v[i] = a.v[i] + b.v[i]; return r;
}
INLINE Ints larger(const Ints& a, const Ints& b) {
  Ints r; EACH r.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return r;
}
// The larger; y where either is NaN.
INLINE Floats larger(const Floats& x, const Floats& y) {
  Floats r; EACH r.v[i] = x.v[i] > y.v[i] ? x.v[i] : y.v[i]; return r;
}
// y where x > low, 0 where it is not; x where it is NaN.
INLINE Floats where_above(const Floats& x, const Floats& low, const Floats& y) {
  Floats r;
  EACH r.v[i] = x.v[i] <= low.v[i] ? 0.0f : x.v[i] == x.v[i] ? y.v[i] : x.v[i];
  return r;
}
INLINE Floats to_floats(const Ints& a) {
  Floats r; EACH r.v[i] = static_cast<float>(a.v[i]); return r;
}
// To the nearest integer, ties to even.
INLINE Ints nearest(const Floats& a) {
  Ints r; EACH r.v[i] = static_cast<int32_t>(std::nearbyintf(a.v[i])); return r;
}
INLINE Ints bits_of(const Floats& a) { Ints r; std::memcpy(r.v, a.v, 64); return r; }
INLINE Floats floats_of(const Ints& a) { Floats r; std::memcpy(r.v, a.v, 64); return r; }
INLINE Ints magnitude(const Floats& a) {  // the bits of |a|: in the order of |a|, NaN last
  Ints r = bits_of(a); EACH r.v[i] &= 0x7fffffff; return r;
}
INLINE Ints shift_left(const Ints& a, int n) {
  Ints r; EACH r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << n); return r;
}
INLINE void store_int8(int8_t* p, const Ints& a) { EACH p[i] = static_cast<int8_t>(a.v[i]); }
INLINE Floats load_int8(const int8_t* p) { Floats r; EACH r.v[i] = p[i]; return r; }
INLINE Floats load_bfloat16(const uint16_t* p) {
  Ints r; EACH r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return floats_of(r);
}
INLINE Floats load_half(const uint16_t* p) {
  Ints r; Floats f;
  EACH r.v[i] = (p[i] & 0x7fff) << 13;
  std::memcpy(f.v, r.v, 64);
  EACH f.v[i] *= 0x1p112f;  // moves the exponent; subnormals become what they are
  std::memcpy(r.v, f.v, 64);
  EACH r.v[i] |= ((p[i] & 0x7c00) == 0x7c00 ? 0x7f800000 : 0) | static_cast<int32_t>(
      static_cast<uint32_t>(p[i] & 0x8000) << 16);
  return floats_of(r);
}

INLINE Bytes load_bytes(const uint8_t* p) { Bytes r; std::memcpy(r.v, p, 64); return r; }
INLINE Bytes low_nibbles(const Bytes& a) {
  Bytes r; for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] & 15; return r;
}
INLINE Bytes high_nibbles(const Bytes& a) {
  Bytes r; for (int i = 0; i < 64; ++i) r.v[i] = a.v[i] >> 4; return r;
}
// Column c gains sum_j w[c, j] x[j] over 4 inputs; w is 0..255, x -127..127.
INLINE Ints dot4(const Ints& sum, const Bytes& w, const int8_t* x) {
  Ints r;
  EACH r.v[i] = sum.v[i] + w.v[4 * i] * x[0] + w.v[4 * i + 1] * x[1] + w.v[4 * i + 2] * x[2] +
                w.v[4 * i + 3] * x[3];
  return r;
}
// The same with w as int8; `start8` is the sum to begin with, given the sum of all x.
INLINE Ints start8(int32_t) { return splat(0); }
INLINE Ints dot4_int8(const Ints& sum, const Bytes& w, const int8_t* x) {
  Ints r;
  EACH {
    const int8_t* c = reinterpret_cast<const int8_t*>(w.v) + 4 * i;
    r.v[i] = sum.v[i] + c[0] * x[0] + c[1] * x[1] + c[2] * x[2] + c[3] * x[3];
  }
  return r;
}
// Input j of 4 as floats.
INLINE Floats input(const Bytes& w, int j) {
  Floats r; EACH r.v[i] = w.v[4 * i + j]; return r;
}
INLINE Floats input_int8(const Bytes& w, int j) {
  Floats r; EACH r.v[i] = static_cast<int8_t>(w.v[4 * i + j]); return r;
}

// Lane i + lane i + 8, then + 4, + 2, + 1: the tree that all paths share.
INLINE float sum(Floats a) {
  for (int n = 8; n; n /= 2) for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
  return a.v[0];
}
// Lane i is the sum of a[i].
INLINE Floats sums(const Floats (&a)[16]) { Floats r; EACH r.v[i] = sum(a[i]); return r; }
INLINE float largest(Floats a) { float s = a.v[0]; EACH s = a.v[i] > s ? a.v[i] : s; return s; }
INLINE int32_t sum(Ints a) { int32_t s = 0; EACH s += a.v[i]; return s; }
INLINE int32_t largest(Ints a) { int32_t s = a.v[0]; EACH s = a.v[i] > s ? a.v[i] : s; return s; }

#undef EACH
