/* Small products in the cache: C (rows, columns) = or += A (rows, depth) B, with fp32 sums.

   Along the depth, B's values lie in groups as one multiplication takes them: (depth / GROUP, columns, GROUP). A group
   is 2 where the processor multiplies pairs of bf16, else 1; A is a plain row-major matrix. */
#pragma once
#include "vector.h"

namespace {

struct Single {
  typedef float Item;
  typedef Floats Lanes;
  static constexpr int GROUP = 1;
  static INLINE Lanes lanes(const float *from) { return load(from); }
  static INLINE Lanes everywhere(const float *from) { return splat(*from); }
  static INLINE Floats multiply_add(Lanes a, Lanes b, Floats c) { return fma(a, b, c); }
  static INLINE void store_row(float *to, Floats value) { store(to, value); }
  static INLINE void store_group(float *to, Floats first, Floats) { store(to, first); }
  static INLINE void copy(float *to, const float *from, int64_t n) { memcpy(to, from, n * sizeof *to); }
  static INLINE void copy(float *to, const uint16_t *from, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) put(to, i, n, get(from, i, n));
  }
};

#ifdef __AVX512BF16__
struct Pairs {
  typedef uint16_t Item;
  typedef __m512bh Lanes;
  static constexpr int GROUP = 2;
  static INLINE Lanes lanes(const uint16_t *from) { return (Lanes)_mm512_loadu_si512(from); }
  static INLINE Lanes everywhere(const uint16_t *from) { return (Lanes)_mm512_set1_epi32(read<int32_t>(from)); }
  static INLINE Floats multiply_add(Lanes a, Lanes b, Floats c) { return _mm512_dpbf16_ps(c, a, b); }
  static INLINE void store_row(uint16_t *to, Floats value) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(value));
  }
  static INLINE void store_group(uint16_t *to, Floats first, Floats second) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static INLINE void copy(uint16_t *to, const uint16_t *from, int64_t n) { memcpy(to, from, n * sizeof *to); }
};
#endif

/* What values of type X are multiplied as. */
template <class X> struct Multiplied { typedef Single By; };
#ifdef __AVX512BF16__
template <> struct Multiplied<uint16_t> { typedef Pairs By; };
#endif

template <class E, int ROWS, int COLUMNS>
INLINE void tile(const typename E::Item *a, int64_t a_apart, const typename E::Item *b, int64_t b_apart, float *c,
                 int64_t c_apart, int64_t groups, bool add_to) {
  Floats sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) sums[i][j] = add_to ? load(c + i * c_apart + j * WIDTH) : splat(0);
  for (int64_t k = 0; k < groups; k++) {
    typename E::Lanes right[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) right[j] = E::lanes(b + (k * b_apart + j * WIDTH) * E::GROUP);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
      const typename E::Lanes left = E::everywhere(a + i * a_apart + k * E::GROUP);
#pragma GCC unroll 8
      for (int j = 0; j < COLUMNS; j++) sums[i][j] = E::multiply_add(left, right[j], sums[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) store(c + i * c_apart + j * WIDTH, sums[i][j]);
}

template <class E, int COLUMNS>
INLINE void strip(const typename E::Item *a, int64_t a_apart, const typename E::Item *b, int64_t b_apart, float *c,
                  int64_t c_apart, int64_t rows, int64_t groups, bool add_to) {
  int64_t i = 0;
  for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
    tile<E, TILE_ROWS, COLUMNS>(a + i * a_apart, a_apart, b, b_apart, c + i * c_apart, c_apart, groups, add_to);
  if (TILE_ROWS > 4 && i + 4 <= rows) {
    tile<E, 4, COLUMNS>(a + i * a_apart, a_apart, b, b_apart, c + i * c_apart, c_apart, groups, add_to);
    i += 4;
  }
  if (TILE_ROWS > 2 && i + 2 <= rows) {
    tile<E, 2, COLUMNS>(a + i * a_apart, a_apart, b, b_apart, c + i * c_apart, c_apart, groups, add_to);
    i += 2;
  }
  for (; i < rows; i++)
    tile<E, 1, COLUMNS>(a + i * a_apart, a_apart, b, b_apart, c + i * c_apart, c_apart, groups, add_to);
}

/* C (rows, columns) = or += A B; *_apart: columns from one row (of B: one group) to the next. Columns are rounded up to
   whole Floats: the buffers must have room for them. */
template <class E>
void product(const typename E::Item *a, int64_t a_apart, const typename E::Item *b, int64_t b_apart, float *c,
             int64_t c_apart, int64_t rows, int64_t columns, int64_t groups, bool add_to) {
  constexpr int64_t WIDE = TILE_COLUMNS * WIDTH;
  for (int64_t j = 0; j < columns; j += WIDE) {
    const int64_t rest = (columns - j + WIDTH - 1) / WIDTH;
    const typename E::Item *const right = b + j * E::GROUP;
    if (rest >= TILE_COLUMNS)
      strip<E, TILE_COLUMNS>(a, a_apart, right, b_apart, c + j, c_apart, rows, groups, add_to);
    else if (TILE_COLUMNS > 3 && rest == 3)
      strip<E, 3>(a, a_apart, right, b_apart, c + j, c_apart, rows, groups, add_to);
    else if (TILE_COLUMNS > 2 && rest == 2)
      strip<E, 2>(a, a_apart, right, b_apart, c + j, c_apart, rows, groups, add_to);
    else
      strip<E, 1>(a, a_apart, right, b_apart, c + j, c_apart, rows, groups, add_to);
  }
}

/* to (columns, rows) = from (rows, columns)^T, of 32-bit words; rows of each so many words apart. */
void transpose(const void *from, int64_t from_apart, void *to, int64_t to_apart, int64_t rows, int64_t columns) {
  const uint32_t *const source = (const uint32_t *)from;
  uint32_t *const target = (uint32_t *)to;
  const int64_t whole_rows = rows / SQUARE * SQUARE, whole_columns = columns / SQUARE * SQUARE;
  for (int64_t i = 0; i < whole_rows; i += SQUARE)
    for (int64_t j = 0; j < whole_columns; j += SQUARE)
      transpose_square(source + i * from_apart + j, from_apart, target + j * to_apart + i, to_apart);
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; j++)
      target[j * to_apart + i] = source[i * from_apart + j];
}

} // namespace
