/* AVX-512 (F, BW, DQ, VL): 16 floats at a time. */
#pragma once
#include "bytes.h"
#include <immintrin.h>

namespace {

typedef __m512 Floats;
constexpr int WIDTH = 16, PARTS = 32 / WIDTH;

INLINE float half(const uint8_t *at) { return _cvtsh_ss(read<uint16_t>(at)); }
INLINE Floats splat(float value) { return _mm512_set1_ps(value); }
/* The first of two scales for the first 16 of 32 values, the second for the rest. */
template <int PART> INLINE Floats either(float first, float second) { return splat(PART < PARTS / 2 ? first : second); }
INLINE Floats load(const float *from) { return _mm512_loadu_ps(from); }
INLINE Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE float sum(Floats a) { return _mm512_reduce_add_ps(a); }
INLINE void store(float *to, Floats value) { _mm512_storeu_ps(to, value); }
INLINE Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
/* The second where either is NaN. */
INLINE Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats minimum(Floats a, Floats b) { return _mm512_min_ps(a, b); }
/* a where low <= at < high, else b. */
INLINE Floats between(Floats at, float low, float high, Floats a, Floats b) {
  const __mmask16 above = _mm512_cmp_ps_mask(at, splat(low), _CMP_GE_OQ);
  return _mm512_mask_blend_ps(_mm512_mask_cmp_ps_mask(above, at, splat(high), _CMP_LT_OQ), b, a);
}
INLINE bool differ(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_UQ) != 0; }
INLINE Floats nearest(Floats value) { return _mm512_roundscale_ps(value, 0); }
/* 1 / value, within an ulp or two, of a finite value above 2^-126. */
INLINE Floats reciprocal(Floats value) {
  const Floats rough = _mm512_rcp14_ps(value);
  return mul(rough, _mm512_fnmadd_ps(value, rough, splat(2)));
}
/* value * 2^n for a whole n up to 127; 0 where n is below what floats have. */
constexpr float LOWEST_POWER = -150; /* e^this is 0 */
INLINE Floats times_power(Floats value, Floats n) { return _mm512_scalef_ps(value, n); }

template <int PART> INLINE __m128i sixteen(__m256i bytes) { return _mm256_extracti128_si256(bytes, PART); }
template <int PART> INLINE Floats convert(i8x32 codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen<PART>((__m256i)codes)));
}
INLINE Floats load_half(const uint8_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
INLINE Floats load_bf16(const uint8_t *from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)), 16));
}

/* To bf16 in the upper halves of 32-bit words; what is below them is to be dropped. */
INLINE __m512i rounded(Floats value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i below = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_add_epi32(below, odd, bits, _mm512_set1_epi32(0x8000));
}
alignas(64) constexpr uint16_t UPPER[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                            33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
INLINE void store_bf16(uint16_t *to, const Floats (&parts)[PARTS]) {
  const __m512i upper = _mm512_load_si512(UPPER);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(rounded(parts[0]), upper, rounded(parts[1])));
}
INLINE void store_bf16(uint16_t *to, Floats value) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value)); /* the same, but for subnormal numbers: 0 */
#else
  _mm256_storeu_si256((__m256i *)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16)));
#endif
}

/* to (16, 16) = from^T, of 32-bit words, rows so many words apart. */
constexpr int SQUARE = 16;
INLINE void transpose_square(const uint32_t *from, int64_t from_apart, uint32_t *to, int64_t to_apart) {
  __m512i rows[16], half[16];
  for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(from + i * from_apart);
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) { /* rows[i + k]: of rows i to i + 3, columns k, k + 4, k + 8 and k + 12 */
      rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + j + 2]);
    }
  for (int k = 0; k < 4; k++) {
    const __m512i a = _mm512_shuffle_i32x4(rows[k], rows[4 + k], 0x88);      /* columns k, k + 8 of rows 0 to 7 */
    const __m512i b = _mm512_shuffle_i32x4(rows[k], rows[4 + k], 0xDD);      /* k + 4, k + 12 */
    const __m512i c = _mm512_shuffle_i32x4(rows[8 + k], rows[12 + k], 0x88); /* of rows 8 to 15 */
    const __m512i d = _mm512_shuffle_i32x4(rows[8 + k], rows[12 + k], 0xDD);
    _mm512_storeu_si512(to + k * to_apart, _mm512_shuffle_i32x4(a, c, 0x88));
    _mm512_storeu_si512(to + (k + 8) * to_apart, _mm512_shuffle_i32x4(a, c, 0xDD));
    _mm512_storeu_si512(to + (k + 4) * to_apart, _mm512_shuffle_i32x4(b, d, 0x88));
    _mm512_storeu_si512(to + (k + 12) * to_apart, _mm512_shuffle_i32x4(b, d, 0xDD));
  }
}

/* Registers of a product's tile: rows by columns of Floats. */
constexpr int TILE_ROWS = 6, TILE_COLUMNS = 4;

/* A table of 16 floats, picked from by codes 0 to 15. */
struct Table {
  __m512 values;
};
INLINE Table table(const float *values, float scale) { return {mul(load(values), splat(scale))}; }
INLINE Table table(const float *values, float scale, float plus) {
  return {add(mul(load(values), splat(scale)), splat(plus))};
}
template <int PART> INLINE Floats pick(const Table &t, u8x32 codes) {
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(sixteen<PART>((__m256i)codes)), t.values);
}
struct TableBf16 {
  __m512i values;
};
INLINE TableBf16 to_bf16(const Table &t) {
  const __m512i bits = rounded(t.values);
  return {_mm512_permutex2var_epi16(bits, _mm512_load_si512(UPPER), bits)};
}
INLINE void pick_bf16(uint16_t *to, const TableBf16 &t, u8x32 codes) {
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16((__m256i)codes), t.values));
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
INLINE u8x32 spread(uint32_t bits) { return (u8x32)_mm256_movm_epi8(bits); }

} // namespace
