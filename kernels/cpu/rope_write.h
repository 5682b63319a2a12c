// Turns queries and keys by their positions and writes keys and values into a pool.
#pragma once

#include <cstdint>

#include "paths.h"

namespace internjax {

struct RopeWrite {
  const float *q, *k, *v;     // [tokens, heads, head_dim], [tokens, kv_heads, head_dim] twice
  const float* turns;         // [2, tokens, head_dim / 2], cosines and sines
  const int32_t* places;      // [tokens], a position of the pool; others than 0.. are not written
  float* out;                 // like q
  void *k_pool, *v_pool;      // [positions, kv_heads, head_dim]
  float *k_scale, *v_scale;   // [positions, kv_heads] of int8, else null
  KvType type;
  int64_t tokens, heads, kv_heads, head_dim, positions;
};

// Tokens first..last-1. Plain loops: one code for all instruction sets, so one result.
void rope_write(const RopeWrite& r, int64_t first, int64_t last);

}  // namespace internjax
