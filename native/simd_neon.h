/* Arm's NEON (64 bit): 4 floats at a time. */
#pragma once
#include "bytes.h"
#include <arm_neon.h>

namespace {

typedef float32x4_t Floats;
constexpr int WIDTH = 4, PARTS = 32 / WIDTH;

INLINE float half(const uint8_t *at) { return half_bits_to_float(read<uint16_t>(at)); }
INLINE Floats splat(float value) { return vdupq_n_f32(value); }
/* The first of two scales for the first 16 of 32 values, the second for the rest. */
template <int PART> INLINE Floats either(float first, float second) { return splat(PART < PARTS / 2 ? first : second); }
/* F32 rows may be unaligned, which floats may not. */
INLINE Floats load(const float *from) { return vreinterpretq_f32_u8(vld1q_u8((const uint8_t *)from)); }
INLINE Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
INLINE Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
INLINE float sum(Floats a) { return vaddvq_f32(a); }
INLINE void store(float *to, Floats value) { vst1q_f32(to, value); }
INLINE Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
INLINE Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
INLINE Floats maximum(Floats a, Floats b) { return vmaxq_f32(a, b); } /* NaN where either is NaN */
INLINE Floats minimum(Floats a, Floats b) { return vminq_f32(a, b); }
/* a where low <= at < high, else b. */
INLINE Floats between(Floats at, float low, float high, Floats a, Floats b) {
  return vbslq_f32(vandq_u32(vcgeq_f32(at, splat(low)), vcltq_f32(at, splat(high))), a, b);
}
INLINE bool differ(Floats a, Floats b) { return vminvq_u32(vceqq_f32(a, b)) == 0; }
INLINE Floats nearest(Floats value) { return vrndnq_f32(value); }
INLINE Floats reciprocal(Floats value) { return div(splat(1), value); }
/* value * 2^n for a whole n from -127, where it is 0, to 127. */
constexpr float LOWEST_POWER = -88;
INLINE Floats times_power(Floats value, Floats n) {
  return mul(value, vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23)));
}

template <int PART> INLINE Floats convert(i8x32 codes) {
  int8_t four[8] = {};
  memcpy(four, (const int8_t *)&codes + 4 * PART, 4);
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(four)))));
}
INLINE Floats load_half(const uint8_t *from) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from))); }
INLINE Floats load_bf16(const uint8_t *from) {
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(from)), 16));
}

INLINE uint16x4_t rounded(Floats value) {
  const uint32x4_t bits = vreinterpretq_u32_f32(value);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  return vshrn_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd), 16);
}
INLINE void store_bf16(uint16_t *to, const Floats (&parts)[PARTS]) {
  for (int part = 0; part < PARTS; part++) vst1_u16(to + WIDTH * part, rounded(parts[part]));
}
INLINE void store_bf16(uint16_t *to, Floats value) { vst1_u16(to, rounded(value)); }

/* to (4, 4) = from^T, of 32-bit words, rows so many words apart. */
constexpr int SQUARE = 4;
INLINE void transpose_square(const uint32_t *from, int64_t from_apart, uint32_t *to, int64_t to_apart) {
  for (int i = 0; i < 4; i++)
    for (int j = 0; j < 4; j++) to[j * to_apart + i] = from[i * from_apart + j];
}

/* Registers of a product's tile: rows by columns of Floats. */
constexpr int TILE_ROWS = 6, TILE_COLUMNS = 4;

/* A table of 16 floats, picked from by codes 0 to 15. */
struct Table {
  float values[16];
};
INLINE Table table(const float *values, float scale, float plus) {
  Table t;
  for (int i = 0; i < 16; i += 4) store(t.values + i, add(mul(load(values + i), splat(scale)), splat(plus)));
  return t;
}
INLINE Table table(const float *values, float scale) {
  Table t;
  for (int i = 0; i < 16; i += 4) store(t.values + i, mul(load(values + i), splat(scale)));
  return t;
}
template <int PART> INLINE Floats pick(const Table &t, u8x32 codes) {
  const float four[4] = {t.values[codes[4 * PART]], t.values[codes[4 * PART + 1]], t.values[codes[4 * PART + 2]],
                         t.values[codes[4 * PART + 3]]};
  return load(four);
}
/* The table's bytes in two planes, since bytes are what can be picked by the 16. */
struct TableBf16 {
  uint8x16_t low, high;
};
INLINE TableBf16 to_bf16(const Table &t) {
  const uint8x16_t a = vreinterpretq_u8_u16(vcombine_u16(rounded(load(t.values)), rounded(load(t.values + 4))));
  const uint8x16_t b = vreinterpretq_u8_u16(vcombine_u16(rounded(load(t.values + 8)), rounded(load(t.values + 12))));
  return {vuzp1q_u8(a, b), vuzp2q_u8(a, b)};
}
INLINE void pick_bf16(uint16_t *to, const TableBf16 &t, u8x32 codes) {
  for (int i = 0; i < 32; i += 16) {
    const uint8x16_t at = vld1q_u8((const uint8_t *)&codes + i);
    const uint8x16x2_t bytes = {{vqtbl1q_u8(t.low, at), vqtbl1q_u8(t.high, at)}};
    vst2q_u8((uint8_t *)(to + i), bytes);
  }
}

INLINE u8x32 two(uint8x16_t first, uint8x16_t second) {
  u8x32 both;
  vst1q_u8((uint8_t *)&both, first);
  vst1q_u8((uint8_t *)&both + 16, second);
  return both;
}
/* 16 bytes as 32 nibbles: the low ones, then the high ones. */
INLINE u8x32 nibbles(const uint8_t *from) {
  const uint8x16_t bytes = vld1q_u8(from);
  return two(vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8(bytes, 4));
}
/* 16 bytes as 32 nibbles: high and low of each in turn (NF4). */
INLINE u8x32 pairs(const uint8_t *from) {
  const uint8x16_t bytes = vld1q_u8(from), low = vandq_u8(bytes, vdupq_n_u8(15)), high = vshrq_n_u8(bytes, 4);
  return two(vzip1q_u8(high, low), vzip2q_u8(high, low));
}
/* Bit j of `bits` as byte j: 0 or 255. */
INLINE u8x32 spread(uint32_t bits) {
  const uint8x16_t own_bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201ull));
  const auto half_of = [&](uint32_t of) {
    return vtstq_u8(vcombine_u8(vdup_n_u8((uint8_t)of), vdup_n_u8((uint8_t)(of >> 8))), own_bit);
  };
  return two(half_of(bits), half_of(bits >> 16));
}

} // namespace
