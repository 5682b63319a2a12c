// The functions that XLA calls (jax.ffi), and four for ctypes. Shapes are checked in Python before
// anything is launched; here again only what memory safety hangs on.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"
#include "paths.h"
#include "rope_write.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace internjax {
namespace {

constexpr int64_t kSmall = 1 << 15;  // products below this many bytes x rows stay on one thread

template <typename T>
std::unique_ptr<T[]> scratch(int64_t n) {
  return std::unique_ptr<T[]>(new T[n]);
}

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument(what); }

// Shares the column blocks of several products out to the threads, parts by multiples of `unit`:
// calls compute(product, first, last). starts: of each product among the blocks of all, and the end.
template <typename Compute>
void share(bool small, const std::vector<int64_t>& starts, int64_t unit, const Compute& compute) {
  Pool& threads = pool();
  const int64_t all = starts.back(), units = (all + unit - 1) / unit;
  // More parts than threads: one that is held up by another program holds up little.
  const int64_t parts = small ? 1 : std::min<int64_t>(units, 4 * threads.size());
  threads.run(parts, [&](int64_t i) {
    const int64_t first = units * i / parts * unit;
    const int64_t last = std::min(all, units * (i + 1) / parts * unit);
    for (size_t j = 0; j + 1 < starts.size(); ++j) {
      const int64_t from = std::max(first, starts[j]), to = std::min(last, starts[j + 1]);
      if (from < to) compute(j, from - starts[j], to - starts[j]);
    }
  });
}

// Products of weights that share their activations, see `quant_matmuls` in matmul.py.
ffi::Error run_matmuls(ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> layer,
                       ffi::RemainingArgs weights, ffi::RemainingRets outs, int64_t bits,
                       int64_t group, bool rounded, std::string_view path_name) {
  const Path* path = find_path(path_name);
  if (!path) return wrong("this CPU does not run the path " + std::string(path_name));
  const auto in = x.dimensions();  // [M, K]
  const int64_t rows = in[0], depth = in[1], groups = group ? depth / group : 0;
  const int64_t index = layer.typed_data()[0], each = rows * groups;
  const auto values = scratch<int8_t>(rounded ? rows * depth : 0);
  const auto totals = scratch<int32_t>(rounded ? each : 0);
  const auto scales = scratch<float>(rounded ? each : 0), sums = scratch<float>(each);
  const Activations a = {x.typed_data(), values.get(), scales.get(), totals.get(), sums.get(),
                         rows,           depth,        group,        rounded};
  std::vector<Matmul> products;
  std::vector<int64_t> starts = {0};  // of a product's column blocks among those of all
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto tiles = weights.get<ffi::Buffer<ffi::U8>>(i);
    const auto out = outs.get<ffi::Buffer<ffi::F32>>(i);
    if (!tiles || !out) return wrong("quant_matmul: weights are uint8, products float32");
    const auto weight = tiles->dimensions();  // [L, blocks, groups, bytes]
    const int64_t columns = (*out)->dimensions()[1], blocks = weight[1];
    if (group % kLanes || groups == 0 || groups * group != depth || weight[2] != groups ||
        columns > blocks * kLanes || index < 0 || index >= weight[0] ||
        weight[3] != tile_bytes(static_cast<int>(bits), group))
      return wrong("quant_matmul: tiles and activations do not fit");
    products.push_back({a, tiles->typed_data() + index * blocks * groups * weight[3],
                        (*out)->typed_data(), columns, static_cast<int>(bits)});
    starts.push_back(starts.back() + blocks);
  }
  Pool& threads = pool();
  const int64_t all = starts.back();
  const bool small = groups * all * tile_bytes(static_cast<int>(bits), group) * rows < kSmall;
  const int64_t some = rows < 8 ? 1 : std::min<int64_t>(rows, threads.size());
  threads.run(some, [&](int64_t i) { path->quantize(a, rows * i / some, rows * (i + 1) / some); });
  share(small, starts, 1, [&](size_t i, int64_t first, int64_t last) {
    path->matmul(products[i], first, last);
  });
  return ffi::Error::Success();
}

// 32- and 16-bit floats; false for any other type.
bool float_type(ffi::DataType type, FloatType* to) {
  *to = type == ffi::BF16  ? FloatType::kBfloat16
        : type == ffi::F16 ? FloatType::kFloat16
                           : FloatType::kFloat32;
  return type == ffi::BF16 || type == ffi::F16 || type == ffi::F32;
}

// Products of pairs of activations and float weights, see `float_matmuls` in float_matmul.py: as
// many activations as weights, or one for all.
ffi::Error run_float_matmuls(ffi::Buffer<ffi::S32> layer, ffi::RemainingArgs args,
                             ffi::RemainingRets outs, std::string_view path_name) {
  const Path* path = find_path(path_name);
  if (!path) return wrong("this CPU does not run the path " + std::string(path_name));
  const size_t count = outs.size(), given = args.size() - count;  // activations come first
  if (args.size() <= count || (given != 1 && given != count))
    return wrong("float_matmul: as many activations as weights, or one for all");
  const int64_t index = layer.typed_data()[0];
  std::vector<FloatMatmul> products;
  std::vector<int64_t> starts = {0};  // of a product's strips among those of all
  int64_t work = 0;
  for (size_t i = 0; i < count; ++i) {
    const auto x = args.get<ffi::Buffer<ffi::F32>>(given == 1 ? 0 : i);
    const auto strips = args.get<ffi::AnyBuffer>(given + i);
    const auto out = outs.get<ffi::Buffer<ffi::F32>>(i);
    FloatType type;
    if (!x || !strips || !out || !float_type(strips->element_type(), &type))
      return wrong("float_matmul: activations and products are float32, weights floats");
    const auto in = x->dimensions(), weight = strips->dimensions();  // [L, strips, depth, 16]
    const int64_t columns = (*out)->dimensions()[1], blocks = weight[1];
    const int64_t bytes = blocks * in[1] * kLanes * (type == FloatType::kFloat32 ? 4 : 2);
    if (weight[2] != in[1] || weight[3] != kLanes || (*out)->dimensions()[0] != in[0] ||
        columns > blocks * kLanes || index < 0 || index >= weight[0])
      return wrong("float_matmul: weights and activations do not fit");
    products.push_back({x->typed_data(),
                        static_cast<const uint8_t*>(strips->untyped_data()) + index * bytes,
                        (*out)->typed_data(), in[0], in[1], columns, type});
    starts.push_back(starts.back() + blocks);
    work += bytes * in[0];
  }
  share(work < kSmall, starts, kStrips, [&](size_t i, int64_t first, int64_t last) {
    path->float_matmul(products[i], first, last);
  });
  return ffi::Error::Success();
}

KvType kv_type(ffi::DataType type) {
  if (type == ffi::BF16) return KvType::kBfloat16;
  return type == ffi::S8 ? KvType::kInt8 : KvType::kFloat32;
}

// See `paged_attention` in attention.py.
ffi::Error run_attention(ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::F32> k_scale, ffi::Buffer<ffi::F32> v_scale,
                         ffi::Buffer<ffi::S32> table, ffi::Buffer<ffi::S32> lengths,
                         std::string_view path_name,
                         ffi::ResultBuffer<ffi::F32> out) {
  const Path* path = find_path(path_name);
  if (!path) return wrong("this CPU does not run the path " + std::string(path_name));
  const auto qs = q.dimensions(), ks = k.dimensions();  // [B, T, N, H], [pool, len, K, H]
  const int64_t batch = qs[0], queries = qs[1], heads = qs[2], head_dim = qs[3];
  const int64_t pool_size = ks[0], block_len = ks[1], kv_heads = ks[2];
  const int64_t table_len = table.dimensions()[1];
  const auto clamped = scratch<int32_t>(batch);
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t most = table_len * block_len;
    clamped[i] = static_cast<int32_t>(std::clamp<int64_t>(lengths.typed_data()[i], 0, most));
    for (int64_t j = 0; j * block_len < clamped[i]; ++j) {
      const int32_t block = table.typed_data()[i * table_len + j];
      if (block < 0 || block >= pool_size)
        return wrong("paged_attention: the table names block " + std::to_string(block) + " of " +
                     std::to_string(pool_size));
    }
  }
  const int64_t longest = batch ? *std::max_element(clamped.get(), clamped.get() + batch) : 0;
  const int64_t pieces = std::max<int64_t>(1, (longest + kPiece - 1) / kPiece);
  const int64_t rows = heads / kv_heads * queries;
  const auto partial = scratch<float>(batch * kv_heads * pieces * rows * (head_dim + 2));
  const PagedAttention a = {q.typed_data(), k.untyped_data(), v.untyped_data(),
                            k_scale.typed_data(), v_scale.typed_data(), table.typed_data(),
                            clamped.get(), out->typed_data(), partial.get(),
                            kv_type(k.element_type()), batch, queries, heads, head_dim, kv_heads,
                            block_len, table_len, pieces,
                            1.0f / std::sqrt(static_cast<float>(head_dim))};
  Pool& threads = pool();
  const int64_t jobs = (rows + kRowsOfJob - 1) / kRowsOfJob, groups = batch * kv_heads;
  threads.run(groups * pieces * jobs, [&](int64_t i) {
    const int64_t first = i % jobs * kRowsOfJob, last = std::min(first + kRowsOfJob, rows);
    const int64_t piece = i / jobs % pieces, group = i / jobs / pieces;
    if (piece * kPiece < clamped[group / kv_heads])
      path->attend(a, group / kv_heads, group % kv_heads, piece, first, last);
  });
  const auto merge = [&](int64_t i) { path->merge(a, i / kv_heads, i % kv_heads); };
  if (rows * pieces >= kRowsOfJob) {
    threads.run(groups, merge);
  } else {
    const PlainFloats plain;
    for (int64_t i = 0; i < groups; ++i) merge(i);
  }
  return ffi::Error::Success();
}

// See `rope_write` in rope_write.py. The pools are changed in place: they are results, too.
ffi::Error run_rope_write(ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                          ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::F32> turns,
                          ffi::Buffer<ffi::S32> places, ffi::RemainingArgs,
                          ffi::ResultBuffer<ffi::F32> out, ffi::RemainingRets pools) {
  const auto qs = q.dimensions(), ks = k.dimensions();  // [M, N, H], [M, K, H]
  const auto k_pool = pools.get<ffi::AnyBuffer>(0), v_pool = pools.get<ffi::AnyBuffer>(1);
  if (!k_pool || !v_pool) return wrong("rope_write: a pool of keys and one of values");
  float* scales[2] = {nullptr, nullptr};
  for (size_t i = 0; i + 2 < pools.size(); ++i) {
    const auto scale = pools.get<ffi::Buffer<ffi::F32>>(i + 2);
    if (!scale) return wrong("rope_write: scales are float32");
    scales[i] = (*scale)->typed_data();
  }
  const int64_t tokens = qs[0], row = ks[1] * ks[2];
  const int64_t positions = row ? static_cast<int64_t>((*k_pool)->element_count()) / row : 0;
  const RopeWrite r = {q.typed_data(), k.typed_data(), v.typed_data(), turns.typed_data(),
                       places.typed_data(), out->typed_data(), (*k_pool)->untyped_data(),
                       (*v_pool)->untyped_data(), scales[0], scales[1],
                       kv_type((*k_pool)->element_type()), tokens, qs[1], ks[1], qs[2], positions};
  if ((r.type == KvType::kInt8) != (scales[0] && scales[1]))
    return wrong("rope_write: scales go with pools of int8");
  Pool& threads = pool();
  const int64_t parts = tokens < 8 ? 1 : std::min<int64_t>(tokens, 4 * threads.size());
  threads.run(parts, [&](int64_t i) {
    rope_write(r, tokens * i / parts, tokens * (i + 1) / parts);
  });
  return ffi::Error::Success();
}

// See `unwritten` in rope_write.py: what is not written takes no memory until it is.
ffi::Error leave_unwritten(ffi::RemainingRets) { return ffi::Error::Success(); }

}  // namespace
}  // namespace internjax

XLA_FFI_DEFINE_HANDLER_SYMBOL(InternjaxUnwritten, internjax::leave_unwritten,
                              ffi::Ffi::Bind().RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(InternjaxQuantMatmuls, internjax::run_matmuls,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("rounded")
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(InternjaxFloatMatmuls, internjax::run_float_matmuls,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<std::string_view>("path"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(InternjaxRopeWrite, internjax::run_rope_write,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(InternjaxPagedAttention, internjax::run_attention,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Attr<std::string_view>("path")
                                  .Ret<ffi::Buffer<ffi::F32>>());

extern "C" {

// The yardstick of benchmarks: reads `size` bytes in order, once, with the threads of the kernels.
int32_t internjax_cpu_sweep(const uint8_t* bytes, int64_t size) {
  const int64_t parts = 4 * internjax::pool().size();
  std::atomic<int32_t> total{0};
  internjax::pool().run(parts, [&](int64_t i) {
    total += internjax::find_path("")->sweep(bytes, size * i / parts, size * (i + 1) / parts);
  });
  return total;
}

// The name of the path that runs by default, or null where INTERNJAX_CPU_PATH names none.
const char* internjax_cpu_path(const char* name) {
  const internjax::Path* path = internjax::find_path(name);
  return path ? path->name : nullptr;
}
int internjax_cpu_threads() {
  return internjax::pool().size();
}
void internjax_cpu_set_threads(int n) {
  internjax::set_threads(n);
}

}  // extern "C"
