// Runs every path of the CPU kernels that this machine has over odd shapes, on buffers of exactly
// their size, and compares it with the portable path bit for bit. Built with AddressSanitizer and
// UBSan by tools/sanitize_kernels.sh, which also builds it with ThreadSanitizer, and for aarch64 by
// tools/aarch64_kernels.sh. The last line is a digest of the portable path's results: the same on
// every machine.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu.h"
#include "paths.h"
#include "rope_write.h"
#include "threads.h"

using namespace internjax;

namespace {

std::mt19937 random_bits(0);
int failures = 0;
uint64_t digest = 0xcbf29ce484222325;  // FNV-1a (RFC 9923)

template <typename T>
std::vector<T> drawn(int64_t n, float low, float high) {
  std::uniform_real_distribution<float> real(low, high);
  std::vector<T> out(n);
  for (T& x : out) x = static_cast<T>(real(random_bits));
  return out;
}

void expect_same(const char* what, const char* path, const std::vector<float>& want,
                 const std::vector<float>& got) {
  if (std::memcmp(want.data(), got.data(), want.size() * 4) == 0) return;
  std::printf("%s: %s differs from portable\n", what, path);
  ++failures;
}

// Takes a result of the portable path into the digest.
void add_to_digest(const std::vector<float>& out) {
  for (const float x : out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    for (int i = 0; i < 32; i += 8) digest = (digest ^ (bits >> i & 255)) * 0x100000001b3;
  }
}

// Tiles of random bytes; scales and offsets are finite halves.
std::vector<uint8_t> drawn_tiles(int64_t blocks, int64_t groups, int bits, int64_t group) {
  const int64_t bytes = tile_bytes(bits, group), codes = kLanes * group * bits / 8;
  auto tiles = drawn<uint8_t>(blocks * groups * bytes, 0, 255.9f);
  for (int64_t tile = 0; tile < blocks * groups; ++tile)
    for (int64_t i = codes + 1; i < bytes; i += 2) tiles[tile * bytes + i] = 0x3c + i % 3;
  return tiles;
}

void check_matmul(int bits, int64_t rows, int64_t groups, int64_t group, int64_t columns,
                  bool rounded) {
  const int64_t depth = groups * group, blocks = (columns + kLanes - 1) / kLanes;
  const auto x = drawn<float>(rows * depth, -3, 3);
  const auto tiles = drawn_tiles(blocks, groups, bits, group);
  std::vector<float> first;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    const Path* path = find_path(name);
    if (!path) continue;
    std::vector<int8_t> values(rounded ? rows * depth : 0);
    std::vector<int32_t> totals(rounded ? rows * groups : 0);
    std::vector<float> scales(rounded ? rows * groups : 0), sums(rows * groups);
    std::vector<float> out(rows * columns);
    const Activations a = {x.data(),    values.data(), scales.data(), totals.data(),
                           sums.data(), rows,          depth,         group,
                           rounded};
    const Matmul m = {a, tiles.data(), out.data(), columns, bits};
    pool().run(rows, [&](int64_t i) { path->quantize(a, i, i + 1); });
    pool().run(blocks, [&](int64_t i) { path->matmul(m, i, i + 1); });
    if (first.empty()) first = out;
    expect_same("matmul", path->name, first, out);
  }
  add_to_digest(first);
}

template <typename T>
void check_floats(FloatType type, int64_t rows, int64_t depth, int64_t columns, float low,
                  float high) {
  const int64_t strips = (columns + kLanes - 1) / kLanes;
  const auto x = drawn<float>(rows * depth, -3, 3);
  const auto weight = drawn<T>(strips * depth * kLanes, low, high);
  std::vector<float> first;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    const Path* path = find_path(name);
    if (!path) continue;
    std::vector<float> out(rows * columns);
    const FloatMatmul m = {x.data(),   reinterpret_cast<const uint8_t*>(weight.data()),
                           out.data(), rows,
                           depth,      columns,
                           type};
    const int64_t unit = 1 + rows % 5, parts = (strips + unit - 1) / unit;  // whole kStrips, too
    pool().run(parts, [&](int64_t i) {
      path->float_matmul(m, i * unit, i + 1 < parts ? (i + 1) * unit : strips);
    });
    if (first.empty()) first = out;
    expect_same("float matmul", path->name, first, out);
  }
  add_to_digest(first);
}

template <typename T>
void check_attention(KvType type, int64_t batch, int64_t queries, int64_t heads, int64_t kv_heads,
                     int64_t head_dim, int64_t block_len, int64_t table_len) {
  const int64_t blocks = batch * table_len, rows = heads / kv_heads * queries;
  const int64_t most = block_len * table_len, pieces = (most + kPiece - 1) / kPiece;
  const auto q = drawn<float>(batch * queries * heads * head_dim, -1, 1);
  const bool bytes = type == KvType::kInt8, halves = type == KvType::kBfloat16;
  const float low = bytes ? -127 : halves ? 0x3e00 : -1, high = bytes ? 127 : halves ? 0x3f80 : 1;
  const auto k = drawn<T>(blocks * block_len * kv_heads * head_dim, low, high);
  const auto v = drawn<T>(k.size(), low, high);
  const auto scale = drawn<float>(bytes ? blocks * block_len * kv_heads : 0, 0.001f, 0.01f);
  std::vector<int32_t> table(blocks), lengths(batch);
  for (int64_t i = 0; i < blocks; ++i) table[i] = static_cast<int32_t>(blocks - 1 - i);
  for (int64_t i = 0; i < batch; ++i) lengths[i] = static_cast<int32_t>(most * i / (batch - 1));
  std::vector<float> first;
  for (const char* name : {"portable", "avx2", "avx512"}) {
    const Path* path = find_path(name);
    if (!path) continue;
    std::vector<float> out(q.size()), partial(batch * kv_heads * pieces * rows * (head_dim + 2));
    const PagedAttention a = {q.data(), k.data(), v.data(), scale.data(), scale.data(),
                              table.data(), lengths.data(), out.data(), partial.data(), type,
                              batch, queries, heads, head_dim, kv_heads, block_len, table_len,
                              pieces, 1.0f / std::sqrt(static_cast<float>(head_dim))};
    pool().run(batch * kv_heads * pieces * rows, [&](int64_t i) {
      const int64_t row = i % rows, group = i / rows / pieces;
      path->attend(a, group / kv_heads, group % kv_heads, i / rows % pieces, row, row + 1);
    });
    const PlainFloats plain;
    for (int64_t i = 0; i < batch * kv_heads; ++i) path->merge(a, i / kv_heads, i % kv_heads);
    if (first.empty()) first = out;
    expect_same("attention", path->name, first, out);
  }
  add_to_digest(first);
}

// Reads and writes of a pool that is exactly as large as said, with places outside of it.
void check_rope_write(KvType type, int64_t size) {
  const int64_t tokens = 5, heads = 4, kv_heads = 2, head_dim = 12, positions = 7;
  const auto q = drawn<float>(tokens * heads * head_dim, -1, 1);
  const auto k = drawn<float>(tokens * kv_heads * head_dim, -1, 1), v = drawn<float>(k.size(), -1, 1);
  const auto turns = drawn<float>(tokens * head_dim, -1, 1);
  const std::vector<int32_t> places = {6, -1, 0, 7, 3};
  std::vector<float> out(q.size()), k_scale(positions * kv_heads), v_scale(k_scale.size());
  std::vector<uint8_t> k_pool(positions * kv_heads * head_dim * size), v_pool(k_pool.size());
  const bool bytes = type == KvType::kInt8;
  const RopeWrite r = {q.data(), k.data(), v.data(), turns.data(), places.data(), out.data(),
                       k_pool.data(), v_pool.data(), bytes ? k_scale.data() : nullptr,
                       bytes ? v_scale.data() : nullptr, type, tokens, heads, kv_heads, head_dim,
                       positions};
  pool().run(tokens, [&](int64_t i) { rope_write(r, i, i + 1); });
}

}  // namespace

int main() {
  set_threads(3);
  for (const int bits : {4, 8})
    for (const bool rounded : {true, false})
      for (const int64_t group : {16, 32, 48, 128})
        for (const int64_t rows : {1, 2, 5, 15})
          for (const int64_t columns : {1, 16, 41})
            check_matmul(bits, rows, 3, group, columns, rounded);
  for (const int64_t rows : {1, 2, 5, 19, 39})
    for (const int64_t depth : {1, 64, 300})
      for (const int64_t columns : {1, 16, 107}) {
        check_floats<float>(FloatType::kFloat32, rows, depth, columns, -2, 2);
        // Positive numbers as their bits, subnormal ones too.
        check_floats<uint16_t>(FloatType::kBfloat16, rows, depth, columns, 0, 0x4200);
        check_floats<uint16_t>(FloatType::kFloat16, rows, depth, columns, 0, 0x6000);
      }
  check_attention<float>(KvType::kFloat32, 3, 1, 9, 3, 64, 16, 33);
  check_attention<float>(KvType::kFloat32, 2, 4, 4, 4, 80, 300, 2);
  check_attention<uint16_t>(KvType::kBfloat16, 3, 8, 4, 1, 16, 7, 5);
  check_attention<int8_t>(KvType::kInt8, 4, 2, 6, 2, 48, 32, 9);
  check_rope_write(KvType::kFloat32, 4);
  check_rope_write(KvType::kBfloat16, 2);
  check_rope_write(KvType::kInt8, 1);
  for (int i = 0; i < 300; ++i) {  // short jobs: workers come late, sleep, and wake
    if (i % 100 == 99) set_threads(2 + i % 3);
    check_matmul(4, 1, 1, 32, 40, true);
  }
  std::printf("%s\n", failures ? "FAILED" : "all paths agree");
  std::printf("digest %016llx\n", static_cast<unsigned long long>(digest));
  return failures != 0;
}
