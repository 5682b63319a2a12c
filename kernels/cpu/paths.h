// The arithmetic of one instruction set: the same functions are compiled once a path (path_*.cc).
// All paths give the same bits: integers inside a group, float32 without fused multiply-adds
// across groups in ascending order, and every sum over lanes as one fixed tree.
#pragma once

#include <cstdint>

namespace internjax {

constexpr int kLanes = 16;  // columns that a tile holds side by side

// Rows of activations and, by groups of the contracted dim, what the product needs of them.
struct Activations {
  const float* x;   // [rows, depth]
  int8_t* values;   // [rows, depth], x / scale rounded to nearest, ties to even
  float* scales;    // [rows, groups], largest |x| / 127; NaN where an x is not finite
  int32_t* totals;  // [rows, groups], sum of the values
  float* sums;      // [rows, groups], scale times total; without rounding the sum of x
  int64_t rows, depth, group;
  bool rounded;     // false: the product takes x as it is; values, scales, totals are null
};

// A weight in tiles of 16 columns x `group` inputs, layout in tiles.py; out = x w.
struct Matmul {
  Activations x;
  const uint8_t* tiles;  // [blocks, groups, tile bytes]
  float* out;            // [rows, columns]
  int64_t columns;
  int bits;              // 4 or 8
};

enum class FloatType { kFloat32, kBfloat16, kFloat16 };

constexpr int64_t kStrips = 4;  // of floats, that one thread takes at a time

// A weight of floats in strips of 16 columns, layout in tiles.py; out = x w.
struct FloatMatmul {
  const float* x;         // [rows, depth]
  const uint8_t* strips;  // [ceil(columns / 16), depth, 16] of `type`
  float* out;             // [rows, columns]
  int64_t rows, depth, columns;
  FloatType type;
};

enum class KvType { kFloat32, kBfloat16, kInt8 };

// A piece of each sequence over keys and values that lie in blocks.
struct PagedAttention {
  const float* q;                        // [batch, queries, heads, head_dim]
  const void *k, *v;                     // [pool, block_len, kv_heads, head_dim]
  const float *k_scale, *v_scale;        // [pool, block_len, kv_heads] of int8, else null
  const int32_t* table;                  // [batch, table_len]
  const int32_t* lengths;                // [batch], keys that the last query of a row sees
  float* out;                            // like q
  float* partial;                        // [batch, kv_heads, pieces, group rows, head_dim + 2]
  KvType type;
  int64_t batch, queries, heads, head_dim, kv_heads, block_len, table_len, pieces;
  float scale;
};

constexpr int64_t kRowsOfJob = 32;  // of a head group, that one thread takes at a time
constexpr int64_t kPiece = 256;  // keys whose softmax is taken together, whatever the threads

struct Path {
  const char* name;
  void (*quantize)(const Activations&, int64_t first, int64_t last);               // rows
  void (*matmul)(const Matmul&, int64_t first, int64_t last);                      // column blocks
  void (*float_matmul)(const FloatMatmul&, int64_t first, int64_t last);           // strips
  void (*attend)(const PagedAttention&, int64_t sequence, int64_t head, int64_t piece,
                 int64_t first, int64_t last);  // rows of a head group
  void (*merge)(const PagedAttention&, int64_t sequence, int64_t head);
  int32_t (*sweep)(const uint8_t* bytes, int64_t first, int64_t last);  // sum of whole 64 bytes
};

extern const Path kPortable;
#if defined(__x86_64__)
extern const Path kAvx2;
extern const Path kAvx512;
#endif

inline int64_t tile_bytes(int bits, int64_t group) {
  return kLanes * group * bits / 8 + kLanes * 2 * (bits == 4 ? 2 : 1);
}

}  // namespace internjax
