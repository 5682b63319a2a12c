#include "rope_write.h"

#include <cmath>
#include <cstring>
#include <vector>

namespace internjax {
namespace {

// Dim i turns with dim i + half.
void turn(const float* x, const float* cosines, const float* sines, int64_t half, float* out) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    out[i] = first * cosines[i] - second * sines[i];
    out[i + half] = second * cosines[i] + first * sines[i];
  }
}

// To nearest, ties to even; NaN stays NaN.
uint16_t bfloat16_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One head to int8 and a scale: largest |x| / 127. Numbers that are not finite make the scale NaN.
float round_head(const float* x, int64_t n, int8_t* out) {
  float top = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    finite = finite && std::fabs(x[i]) < INFINITY;
  }
  const float scale = top / 127.0f > 1e-12f ? top / 127.0f : 1e-12f;
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to integers
  for (int64_t i = 0; i < n; ++i)
    out[i] = finite ? static_cast<int8_t>((x[i] / scale + kWhole) - kWhole) : 0;
  return finite ? scale : NAN;
}

void store(const RopeWrite& r, const float* x, int64_t at, void* pool, float* scales) {
  const int64_t n = r.head_dim, to = at * n;
  if (r.type == KvType::kFloat32) std::memcpy(static_cast<float*>(pool) + to, x, n * 4);
  if (r.type == KvType::kBfloat16)
    for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(pool)[to + i] = bfloat16_of(x[i]);
  if (r.type == KvType::kInt8) scales[at] = round_head(x, n, static_cast<int8_t*>(pool) + to);
}

}  // namespace

void rope_write(const RopeWrite& r, int64_t first, int64_t last) {
  const int64_t H = r.head_dim, half = H / 2;
  std::vector<float> key(H);
  for (int64_t token = first; token < last; ++token) {
    const float *cosines = r.turns + token * half, *sines = cosines + r.tokens * half;
    for (int64_t n = token * r.heads; n < (token + 1) * r.heads; ++n)
      turn(r.q + n * H, cosines, sines, half, r.out + n * H);
    const int64_t place = r.places[token];
    if (place < 0 || place >= r.positions) continue;
    for (int64_t head = 0; head < r.kv_heads; ++head) {
      const int64_t from = (token * r.kv_heads + head) * H, at = place * r.kv_heads + head;
      turn(r.k + from, cosines, sines, half, key.data());
      store(r, key.data(), at, r.k_pool, r.k_scale);
      store(r, r.v + from, at, r.v_pool, r.v_scale);
    }
  }
}

}  // namespace internjax
