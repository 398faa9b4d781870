/* One processor path: compiled once for each instruction set, with PATH naming it. */
#if defined(PATH_AVX512_BF16)
#include "simd_avx512.h"
#define PATH avx512_bf16
#elif defined(PATH_AVX512)
#include "simd_avx512.h"
#define PATH avx512
#elif defined(PATH_AVX2)
#include "simd_avx2.h"
#define PATH avx2
#elif defined(PATH_NEON)
#include "simd_neon.h"
#define PATH neon
#else
#include "simd_portable.h"
#define PATH portable
#endif
#include "formats.h"
#include "path.h"
#include <math.h>

#include "attention.h"
#include "elementwise.h"

namespace {

/* Writes a row's values, in fp32 or bf16. */
struct StoreF32 {
  float *to;
  INLINE void put(const Floats (&parts)[PARTS]) {
    each_part([&](auto p) { store(to + p * WIDTH, parts[p]); });
    to += 32;
  }
  INLINE void pick(const Table &t, u8x32 codes) {
    each_part([&](auto p) { store(to + p * WIDTH, ::pick<p>(t, codes)); });
    to += 32;
  }
  INLINE void one(float value) { *to++ = value; }
};

struct StoreBf16 {
  uint16_t *to;
  INLINE void put(const Floats (&parts)[PARTS]) {
    store_bf16(to, parts);
    to += 32;
  }
  INLINE void pick(const Table &t, u8x32 codes) {
    pick_bf16(to, to_bf16(t), codes);
    to += 32;
  }
  INLINE void one(float value) { *to++ = to_bf16(value); }
};

/* Multiplies a row with BATCH vectors as it is decoded. */
template <int BATCH> struct Dot {
  const float *x;
  int64_t stride;
  Floats sums[BATCH][PARTS];
  float rest[BATCH] = {};
  INLINE Dot(const float *vectors, int64_t apart) : x(vectors), stride(apart) {
    for (auto &of : sums)
      for (auto &s : of) s = splat(0);
  }
  template <class F> INLINE void take(F values) {
    each_part([&](auto p) {
      const Floats value = values(p);
      for (int k = 0; k < BATCH; k++) sums[k][p] = fma(value, load(x + k * stride + p * WIDTH), sums[k][p]);
    });
    x += 32;
  }
  INLINE void put(const Floats (&parts)[PARTS]) {
    take([&](auto p) { return parts[p]; });
  }
  INLINE void pick(const Table &t, u8x32 codes) {
    take([&](auto p) { return ::pick<p>(t, codes); });
  }
  INLINE void one(float value) {
    for (int k = 0; k < BATCH; k++) rest[k] += value * x[k * stride];
    x++;
  }
  INLINE void finish(float *y) {
    for (int k = 0; k < BATCH; k++) {
      Floats total = sums[k][0];
      for (int p = 1; p < PARTS; p++) total = add(total, sums[k][p]);
      y[k] = sum(total) + rest[k];
    }
  }
};

void unpack_f32(const lorafit_weight &w, int64_t row, float *out) {
  StoreF32 sink{out};
  walk(w, row, sink);
}

void unpack_bf16(const lorafit_weight &w, int64_t row, uint16_t *out) {
  StoreBf16 sink{out};
  walk(w, row, sink);
}

template <int BATCH> void dot(const lorafit_weight &w, int64_t row, const float *x, int64_t stride, float *y) {
  Dot<BATCH> sink(x, stride);
  walk(w, row, sink);
  sink.finish(y);
}

constexpr uint32_t MAGNITUDE = 0x7FFFFFFFu, INFINITE = 0x7F800000u;

/* The largest magnitude, as bits: of floats without their sign these are ordered as the values, NaN above all. */
INLINE uint32_t largest(const float *values, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = read<uint32_t>(values + i) & MAGNITUDE; /* F32 rows may be unaligned */
    most = bits > most ? bits : most;
  }
  return most;
}

/* bitsandbytes' arithmetic: scaled by the reciprocal, then the number of midpoints between levels that lie below. */
bool quantise_nf4(const float *row, int64_t columns, uint8_t *codes, float *absmax) {
  for (int64_t block = 0; block < columns / 64; block++, row += 64, codes += 32) {
    const uint32_t most = largest(row, 64);
    if (most >= INFINITE) return false;
    absmax[block] = bits_to_float(most);
    const float by = 1.0f / (absmax[block] > 1e-38f ? absmax[block] : 1e-38f);
    int32_t code[64] = {};
    float scaled[64];
    for (int i = 0; i < 64; i++) {
      const float value = row[i] * by;
      scaled[i] = value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value;
    }
    for (int level = 0; level < 15; level++) {
      const float middle = (NF4[level] + NF4[level + 1]) / 2;
      for (int i = 0; i < 64; i++) code[i] += scaled[i] > middle;
    }
    for (int i = 0; i < 32; i++) codes[i] = (uint8_t)(code[2 * i] << 4 | code[2 * i + 1]);
  }
  return true;
}

bool quantise_int8(const float *row, int64_t columns, int8_t *codes, float *scale) {
  const uint32_t most = largest(row, columns);
  if (most >= INFINITE) return false;
  *scale = bits_to_float(most) / 127.0f;
  const float by = *scale > 0 ? *scale : 1.0f;
  for (int64_t i = 0; i < columns; i++) {
    const float value = nearbyintf(row[i] / by);
    codes[i] = (int8_t)(value < -127.0f ? -127.0f : value > 127.0f ? 127.0f : value);
  }
  return true;
}

INLINE bool halves_are_finite(const uint8_t *b, const uint8_t *end, int64_t bytes, int64_t at, int64_t second) {
  uint32_t bad = 0;
  for (; b < end; b += bytes) {
    bad |= (read<uint16_t>(b + at) & 0x7C00u) == 0x7C00u;
    bad |= (read<uint16_t>(b + second) & 0x7C00u) == 0x7C00u;
  }
  return !bad;
}

bool row_is_finite(const lorafit_weight &w, int64_t row) {
  const uint8_t *b = w.data + row * w.row_bytes, *end = b + w.row_bytes;
  const auto halves = [&](int64_t at, int64_t second) {
    return halves_are_finite(b, end, lorafit::block_of(w.format).bytes, at, second);
  };
  uint32_t bad = 0;
  switch (w.format) {
  case 0:
    return largest((const float *)b, w.columns) < INFINITE;
  case 1: return halves(0, 0);
  case 30:
    for (; b < end; b += 2) bad |= (read<uint16_t>(b) & 0x7F80u) == 0x7F80u;
    return !bad;
  case 2: case 6: case 8: case 20: case 23: return halves(0, 0);
  case 3: case 7: case 12: case 13: return halves(0, 2);
  case 10: return halves(80, 82);
  case 11: return halves(108, 108);
  case 14: return halves(208, 208);
  case 39:
    for (; b < end; b += 17)
      if (*b > 252) { /* what of 2^125 and more is infinite depends on the codes */
        float values[32];
        StoreF32 sink{values};
        mxfp4(b, sink);
        bad |= largest(values, 32) >= INFINITE;
      }
    return !bad;
  case LORAFIT_INT8: return largest((const float *)w.scales + row, 1) < INFINITE;
  case LORAFIT_NF4:
    for (int64_t i = 0; i < w.columns / 64; i++) {
      const float scale = nf4_scale(w, row, i);
      bad |= largest(&scale, 1) >= INFINITE;
    }
    return !bad;
  default: return true;
  }
}

} // namespace

namespace lorafit {
#define STRING_OF(name) #name
#define STRING(name) STRING_OF(name)
#define JOIN_OF(a, b) a##b
#define JOIN(a, b) JOIN_OF(a, b)
template <class X> constexpr Rows<X> rows = {norm_row<X>,
                                             norm_row_backward<X>,
                                             head_row<X>,
                                             head_row_backward<X>,
                                             {gate_row<Silu, X>, gate_row<Gelu, X>},
                                             {gate_row_backward<Silu, X>, gate_row_backward<Gelu, X>},
                                             entropy_row<X>,
                                             attend<X>,
                                             attend_backward<X>,
                                             add_partial<X>,
                                             attention_room<X>};

extern const Path JOIN(PATH, _path) = {
    STRING(PATH),  unpack_f32,    unpack_bf16,   dot<1>,      dot<4>,
    quantise_nf4, quantise_int8, row_is_finite, rows<float>, rows<uint16_t>};
} // namespace lorafit
