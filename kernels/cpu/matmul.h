// Products of activations with a tiled weight, over the lanes of one path.
// A tile is 16 columns x one group: bytes for vpdpbusd (16 columns x 4 inputs in 64 bytes; of
// nibbles the low ones first, the high ones are the next 4 inputs), 16 half scales and, of 4-bit
// weights, 16 half offsets. A weight is value * scale + offset.

// Rounds rows first..last-1 to int8 by groups.
void quantize(const Activations& a, int64_t first, int64_t last) {
  const int64_t groups = a.depth / a.group;
  for (int64_t i = first * groups; i < last * groups; ++i) {
    const float* x = a.x + i * a.group;
    if (!a.rounded) {
      Floats total = splat(0.0f);
      for (int64_t k = 0; k < a.group; k += kLanes) total = total + load(x + k);
      a.sums[i] = sum(total);
      continue;
    }
    Ints most = splat(0);
    for (int64_t k = 0; k < a.group; k += kLanes) most = larger(most, magnitude(load(x + k)));
    const int32_t bits = largest(most);
    float top;
    std::memcpy(&top, &bits, 4);
    const bool finite = bits < 0x7f800000;
    const float inverse = finite && top >= 1e-30f ? 127.0f / top : 0.0f;
    Ints total = splat(0);
    for (int64_t k = 0; k < a.group; k += kLanes) {
      const Ints q = finite ? nearest(load(x + k) * splat(inverse)) : splat(0);
      store_int8(a.values + i * a.group + k, q);
      total = total + q;
    }
    a.totals[i] = sum(total);
    a.scales[i] = !finite ? NAN : top >= 1e-30f ? top * (1.0f / 127.0f) : 0.0f;
    a.sums[i] = a.scales[i] * static_cast<float>(a.totals[i]);
  }
}

// Adds one tile's integer products for R rows; x points at the group in the first row. Group is
// the size of a group where the compiler may know it, else 0.
template <int R, int Bits, int Group>
INLINE void tile_dot(Ints (&dot)[R], const uint8_t* tile, const int8_t* x, const Activations& a) {
  const int64_t group = Group ? Group : a.group, depth = a.depth;
  if (Bits == 8) {
UNROLL
    for (int64_t k = 0; k < group; k += 4) {
      const Bytes w = load_bytes(tile + 16 * k);
UNROLL
      for (int r = 0; r < R; ++r) dot[r] = dot4_int8(dot[r], w, x + r * depth + k);
    }
    return;
  }
  Ints second[R];  // a second sum: with few rows a product would wait for the one before it
UNROLL
  for (int r = 0; r < R; ++r) second[r] = splat(0);
UNROLL
  for (int64_t k = 0; k < group; k += 8) {
    const Bytes w = load_bytes(tile + 8 * k);
    const Bytes low = low_nibbles(w), high = high_nibbles(w);
UNROLL
    for (int r = 0; r < R; ++r) dot[r] = dot4(dot[r], low, x + r * depth + k);
UNROLL
    for (int r = 0; r < R; ++r) {
      Ints& sum = R > 4 ? dot[r] : second[r];
      sum = dot4(sum, high, x + r * depth + k + 4);
    }
  }
  if (R <= 4)
    for (int r = 0; r < R; ++r) dot[r] = dot[r] + second[r];
}

// The same for float32 activations, one input after the other.
template <int R, int Bits, int Group>
INLINE void tile_dot(Floats (&dot)[R], const uint8_t* tile, const float* x, const Activations& a) {
  const int64_t inputs = Bits == 4 ? 8 : 4;
  for (int64_t k = 0; k < a.group; k += inputs, tile += 64) {
    const Bytes w = load_bytes(tile);
    for (int64_t j = 0; j < inputs; ++j) {
      const Floats column = Bits == 8 ? input_int8(w, j)
                                      : input(j < 4 ? low_nibbles(w) : high_nibbles(w), j & 3);
      for (int r = 0; r < R; ++r) dot[r] = dot[r] + splat(x[r * a.depth + k + j]) * column;
    }
  }
}

// Bytes of a weight that are asked for ahead of their use: what a core's own prefetcher, which stops
// at each 4 KiB page, leaves unread. SmolLM2's layers at batch 1, 2 threads: 33 -> 49 GB/s.
constexpr int64_t kAhead = 2048;

// One block of 16 columns for rows row..row+R-1.
template <int R, int Bits, int Group, bool Rounded>
INLINE void block_rows(const Matmul& m, int64_t block, int64_t row) {
  const Activations& a = m.x;
  const int64_t groups = a.depth / a.group, bytes = tile_bytes(Bits, a.group);
  const uint8_t* tile = m.tiles + block * groups * bytes;
  Floats out[R];
  for (int r = 0; r < R; ++r) out[r] = splat(0.0f);
  for (int64_t g = 0; g < groups; ++g, tile += bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(tile + kAhead + i);
    const uint16_t* scales =
        reinterpret_cast<const uint16_t*>(tile + kLanes * a.group * Bits / 8);
    const Floats scale = load_half(scales);
    const int64_t at = row * groups + g;  // of the first row; the next are `groups` further
    if (Rounded) {
      Ints dot[R];
      for (int r = 0; r < R; ++r)
        dot[r] = Bits == 8 ? start8(a.totals[at + r * groups]) : splat(0);
      tile_dot<R, Bits, Group>(dot, tile, a.values + row * a.depth + g * a.group, a);
      for (int r = 0; r < R; ++r)
        out[r] = out[r] + (scale * splat(a.scales[at + r * groups])) * to_floats(dot[r]);
    } else {
      Floats dot[R];
      for (int r = 0; r < R; ++r) dot[r] = splat(0.0f);
      tile_dot<R, Bits, Group>(dot, tile, a.x + row * a.depth + g * a.group, a);
      for (int r = 0; r < R; ++r) out[r] = out[r] + scale * dot[r];
    }
    if (Bits == 4) {
      const Floats offset = load_half(scales + kLanes);
      for (int r = 0; r < R; ++r) out[r] = out[r] + offset * splat(a.sums[at + r * groups]);
    }
  }
  const int64_t column = block * kLanes, left = m.columns - column;
  for (int r = 0; r < R; ++r) {
    float* to = m.out + (row + r) * m.columns + column;
    if (left >= kLanes) {
      store(to, out[r]);
    } else {
      store(to, out[r], left);
    }
  }
}

// One block for the rows from `row` on: R at a time, then R / 2 and so on.
template <int R, int Bits, int Group, bool Rounded>
INLINE void rows_of(const Matmul& m, int64_t block, int64_t row) {
  for (; row + R <= m.x.rows; row += R) block_rows<R, Bits, Group, Rounded>(m, block, row);
  if constexpr (R > 1) rows_of<R / 2, Bits, Group, Rounded>(m, block, row);
}

template <int Bits, int Group, bool Rounded>
void blocks_of(const Matmul& m, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) rows_of<kRows, Bits, Group, Rounded>(m, block, 0);
}

template <int Bits>
void blocks_of(const Matmul& m, int64_t first, int64_t last) {
  if (!m.x.rounded) return blocks_of<Bits, 0, false>(m, first, last);
  m.x.group == kGroup ? blocks_of<Bits, kGroup, true>(m, first, last)
                      : blocks_of<Bits, 0, true>(m, first, last);
}

// Computes column blocks first..last-1 for all rows.
void matmul(const Matmul& m, int64_t first, int64_t last) {
  m.bits == 4 ? blocks_of<4>(m, first, last) : blocks_of<8>(m, first, last);
}

// Adds up bytes first..last-1, 64 at a time: nothing but reading.
int32_t sweep(const uint8_t* bytes, int64_t first, int64_t last) {
  const int8_t ones[4] = {1, 1, 1, 1};
  Ints total = splat(0);
  for (; first + 64 <= last; first += 64) total = dot4(total, load_bytes(bytes + first), ones);
  return sum(total);
}
