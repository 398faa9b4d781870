/* No instruction set assumed: plain loops over 32 floats, which compilers turn into what there is. */
#pragma once
#include "bytes.h"

namespace {

struct Floats {
  float v[32];
};
constexpr int WIDTH = 32, PARTS = 1;
#define EACH(expression)                                                                                              \
  Floats out;                                                                                                         \
  for (int i = 0; i < 32; i++) out.v[i] = expression;                                                                 \
  return out;

INLINE float half(const uint8_t *at) { return half_bits_to_float(read<uint16_t>(at)); }
INLINE Floats splat(float value) { EACH(value) }
/* The first of two scales for the first 16 of 32 values, the second for the rest. */
template <int PART> INLINE Floats either(float first, float second) { EACH(i < 16 ? first : second) }
INLINE Floats load(const float *from) { return read<Floats>(from); }
INLINE Floats mul(const Floats &a, const Floats &b) { EACH(a.v[i] * b.v[i]) }
INLINE Floats add(const Floats &a, const Floats &b) { EACH(a.v[i] + b.v[i]) }
INLINE Floats fma(const Floats &a, const Floats &b, const Floats &c) { EACH(a.v[i] * b.v[i] + c.v[i]) }
INLINE float sum(const Floats &a) {
  float total = 0;
  for (float value : a.v) total += value;
  return total;
}
INLINE void store(float *to, const Floats &value) { memcpy(to, value.v, sizeof value.v); }
INLINE Floats sub(const Floats &a, const Floats &b) { EACH(a.v[i] - b.v[i]) }
INLINE Floats div(const Floats &a, const Floats &b) { EACH(a.v[i] / b.v[i]) }
/* The second where either is NaN. */
INLINE Floats maximum(const Floats &a, const Floats &b) { EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
INLINE Floats minimum(const Floats &a, const Floats &b) { EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
/* a where low <= at < high, else b. */
INLINE Floats between(const Floats &at, float low, float high, const Floats &a, const Floats &b) {
  EACH(at.v[i] >= low && at.v[i] < high ? a.v[i] : b.v[i])
}
INLINE bool differ(const Floats &a, const Floats &b) {
  bool found = false;
  for (int i = 0; i < 32; i++) found |= a.v[i] != b.v[i];
  return found;
}
INLINE Floats nearest(const Floats &value) { EACH((value.v[i] + 12582912.0f) - 12582912.0f) } /* 1.5 * 2^23 */
INLINE Floats reciprocal(const Floats &value) { EACH(1.0f / value.v[i]) }
/* value * 2^n for a whole n from -127, where it is 0, to 127; NaN's n is any number. */
constexpr float LOWEST_POWER = -88;
INLINE Floats times_power(const Floats &value, const Floats &n) {
  EACH(value.v[i] * bits_to_float((uint32_t)((n.v[i] == n.v[i] ? (int32_t)n.v[i] : 0) + 127) << 23))
}

template <int PART> INLINE Floats convert(i8x32 codes) {
  int8_t of[32];
  memcpy(of, &codes, 32);
  EACH((float)of[i])
}
INLINE Floats load_half(const uint8_t *from) { EACH(half(from + 2 * i)) }
INLINE Floats load_bf16(const uint8_t *from) { EACH(bits_to_float((uint32_t)read<uint16_t>(from + 2 * i) << 16)) }

INLINE void store_bf16(uint16_t *to, const Floats (&parts)[PARTS]) {
  for (int i = 0; i < 32; i++) to[i] = to_bf16(parts[0].v[i]);
}
INLINE void store_bf16(uint16_t *to, const Floats &value) {
  for (int i = 0; i < 32; i++) to[i] = to_bf16(value.v[i]);
}

/* to (4, 4) = from^T, of 32-bit words, rows so many words apart. */
constexpr int SQUARE = 4;
INLINE void transpose_square(const uint32_t *from, int64_t from_apart, uint32_t *to, int64_t to_apart) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) to[j * to_apart + i] = from[i * from_apart + j];
}

/* Registers of a product's tile: rows by columns of Floats. */
constexpr int TILE_ROWS = 1, TILE_COLUMNS = 1;

/* A table of 16 floats, picked from by codes 0 to 15. */
struct Table {
  float values[16];
};
INLINE Table table(const float *values, float scale) {
  Table t;
  for (int i = 0; i < 16; i++) t.values[i] = values[i] * scale;
  return t;
}
INLINE Table table(const float *values, float scale, float plus) {
  Table t;
  for (int i = 0; i < 16; i++) t.values[i] = values[i] * scale + plus;
  return t;
}
template <int PART> INLINE Floats pick(const Table &t, u8x32 codes) {
  uint8_t of[32];
  memcpy(of, &codes, 32);
  EACH(t.values[of[i]])
}
struct TableBf16 {
  uint16_t values[16];
};
INLINE TableBf16 to_bf16(const Table &t) {
  TableBf16 out;
  for (int i = 0; i < 16; i++) out.values[i] = to_bf16(t.values[i]);
  return out;
}
INLINE void pick_bf16(uint16_t *to, const TableBf16 &t, u8x32 codes) {
  uint8_t of[32];
  memcpy(of, &codes, 32);
  for (int i = 0; i < 32; i++) to[i] = t.values[of[i]];
}

/* 16 bytes as 32 nibbles: the low ones, then the high ones. */
INLINE u8x32 nibbles(const uint8_t *from) {
  uint8_t out[32];
  for (int i = 0; i < 16; i++) out[i] = from[i] & 15, out[16 + i] = from[i] >> 4;
  return load32(out);
}
/* 16 bytes as 32 nibbles: high and low of each in turn (NF4). */
INLINE u8x32 pairs(const uint8_t *from) {
  uint8_t out[32];
  for (int i = 0; i < 16; i++) out[2 * i] = from[i] >> 4, out[2 * i + 1] = from[i] & 15;
  return load32(out);
}
/* Bit j of `bits` as byte j: 0 or 255. */
INLINE u8x32 spread(uint32_t bits) {
  uint8_t out[32];
  for (int i = 0; i < 32; i++) out[i] = (bits >> i & 1) ? 255 : 0;
  return load32(out);
}

} // namespace
