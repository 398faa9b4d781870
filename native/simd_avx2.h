/* AVX2, FMA and F16C: 8 floats at a time. */
#pragma once
#include "bytes.h"
#include <immintrin.h>

namespace {

typedef __m256 Floats;
constexpr int WIDTH = 8, PARTS = 32 / WIDTH;

INLINE float half(const uint8_t *at) { return _cvtsh_ss(read<uint16_t>(at)); }
INLINE Floats splat(float value) { return _mm256_set1_ps(value); }
/* The first of two scales for the first 16 of 32 values, the second for the rest. */
template <int PART> INLINE Floats either(float first, float second) { return splat(PART < PARTS / 2 ? first : second); }
INLINE Floats load(const float *from) { return _mm256_loadu_ps(from); }
INLINE Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
INLINE float sum(Floats a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE void store(float *to, Floats value) { _mm256_storeu_ps(to, value); }
INLINE Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
INLINE Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
/* The second where either is NaN. */
INLINE Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
INLINE Floats minimum(Floats a, Floats b) { return _mm256_min_ps(a, b); }
/* a where low <= at < high, else b. */
INLINE Floats between(Floats at, float low, float high, Floats a, Floats b) {
  const __m256 above = _mm256_cmp_ps(at, splat(low), _CMP_GE_OQ), below = _mm256_cmp_ps(at, splat(high), _CMP_LT_OQ);
  return _mm256_blendv_ps(b, a, _mm256_and_ps(above, below));
}
INLINE bool differ(Floats a, Floats b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NEQ_UQ)) != 0; }
INLINE Floats nearest(Floats value) { return _mm256_round_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Floats reciprocal(Floats value) { return div(splat(1), value); }
/* value * 2^n for a whole n from -127, where it is 0, to 127. */
constexpr float LOWEST_POWER = -88;
INLINE Floats times_power(Floats value, Floats n) {
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return mul(value, _mm256_castsi256_ps(power));
}

template <int PART> INLINE __m128i eight(__m256i bytes) {
  const __m128i sixteen = _mm256_extracti128_si256(bytes, PART / 2);
  return PART % 2 ? _mm_srli_si128(sixteen, 8) : sixteen;
}
template <int PART> INLINE Floats convert(i8x32 codes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight<PART>((__m256i)codes)));
}
INLINE Floats load_half(const uint8_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
INLINE Floats load_bf16(const uint8_t *from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)from)), 16));
}

/* To bf16 in the lower halves of 32-bit words. */
INLINE __m256i rounded(Floats value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd), 16);
}
INLINE __m256i packed(Floats low, Floats high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(low), rounded(high)), 0xD8);
}
INLINE void store_bf16(uint16_t *to, const Floats (&parts)[PARTS]) {
  _mm256_storeu_si256((__m256i *)to, packed(parts[0], parts[1]));
  _mm256_storeu_si256((__m256i *)(to + 16), packed(parts[2], parts[3]));
}
INLINE void store_bf16(uint16_t *to, Floats value) {
  _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(packed(value, value)));
}

/* to (8, 8) = from^T, of 32-bit words, rows so many words apart. */
constexpr int SQUARE = 8;
INLINE void transpose_square(const uint32_t *from, int64_t from_apart, uint32_t *to, int64_t to_apart) {
  __m256 rows[8], half[8];
  for (int i = 0; i < 8; i++) rows[i] = _mm256_loadu_ps((const float *)(from + i * from_apart));
  for (int i = 0; i < 8; i += 2) {
    half[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    half[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) { /* rows[i + k]: of rows i to i + 3, columns k and k + 4 */
      rows[i + 2 * j] = _mm256_shuffle_ps(half[i + j], half[i + j + 2], 0x44);
      rows[i + 2 * j + 1] = _mm256_shuffle_ps(half[i + j], half[i + j + 2], 0xEE);
    }
  for (int k = 0; k < 4; k++) {
    _mm256_storeu_ps((float *)(to + k * to_apart), _mm256_permute2f128_ps(rows[k], rows[4 + k], 0x20));
    _mm256_storeu_ps((float *)(to + (k + 4) * to_apart), _mm256_permute2f128_ps(rows[k], rows[4 + k], 0x31));
  }
}

/* Registers of a product's tile: rows by columns of Floats. */
constexpr int TILE_ROWS = 6, TILE_COLUMNS = 2;

/* A table of 16 floats, picked from by codes 0 to 15. */
struct Table {
  __m256 low, high;
};
INLINE Table table(const float *values, float scale) {
  return {mul(load(values), splat(scale)), mul(load(values + 8), splat(scale))};
}
INLINE Table table(const float *values, float scale, float plus) {
  const Table t = table(values, scale);
  return {add(t.low, splat(plus)), add(t.high, splat(plus))};
}
template <int PART> INLINE Floats pick(const Table &t, u8x32 codes) {
  const __m256i at = _mm256_cvtepu8_epi32(eight<PART>((__m256i)codes));
  const __m256 upper_half = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)); /* bit 3 becomes the sign */
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, at), _mm256_permutevar8x32_ps(t.high, at), upper_half);
}
/* The table's bytes in two planes, since bytes are what can be picked by the 32. */
struct TableBf16 {
  __m256i low, high;
};
INLINE TableBf16 to_bf16(const Table &t) {
  const __m256i words = packed(t.low, t.high), mask = _mm256_set1_epi16(255);
  const __m256i planes = _mm256_packus_epi16(_mm256_and_si256(words, mask), _mm256_srli_epi16(words, 8));
  return {_mm256_permute4x64_epi64(planes, 0x88), _mm256_permute4x64_epi64(planes, 0xDD)};
}
INLINE void pick_bf16(uint16_t *to, const TableBf16 &t, u8x32 codes) {
  const __m256i low = _mm256_shuffle_epi8(t.low, (__m256i)codes), high = _mm256_shuffle_epi8(t.high, (__m256i)codes);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256((__m256i *)to, _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256((__m256i *)(to + 16), _mm256_permute2x128_si256(a, b, 0x31));
}

/* 16 bytes as 32 nibbles: the low ones, then the high ones. */
INLINE u8x32 nibbles(const uint8_t *from) {
  const __m128i bytes = _mm_loadu_si128((const __m128i *)from);
  return (u8x32)_mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes), _mm256_set1_epi8(15));
}
/* 16 bytes as 32 nibbles: high and low of each in turn (NF4). */
INLINE u8x32 pairs(const uint8_t *from) {
  const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
  const __m256i both = _mm256_or_si256(_mm256_srli_epi16(words, 4), _mm256_slli_epi16(words, 8));
  return (u8x32)_mm256_and_si256(both, _mm256_set1_epi8(15));
}
/* Bit j of `bits` as byte j: 0 or 255. */
INLINE u8x32 spread(uint32_t bits) {
  const __m256i of_byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own_bit = _mm256_set1_epi64x((long long)0x8040201008040201ull);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), of_byte);
  return (u8x32)_mm256_cmpeq_epi8(_mm256_and_si256(bytes, own_bit), own_bit);
}

} // namespace
