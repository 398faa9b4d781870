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
