/* How each format lies in memory, written once for every processor path and every use.

   `walk` decodes a row 32 weights at a time and hands them to a sink: as finished values (`put`), or as a table of 16
   values and codes into it (`pick`), which a sink may take a shorter way with. Integer codes are multiplied by the
   scale first and added to afterwards, never fused, so that values have the bits of ggml's own reference.
   Layouts: ggml's block_q4_0 and its kin; d, m and dmin are half floats, little endian; of MXFP4, e is E8M0. */
#pragma once
#include "path.h"
#include <utility>

namespace {

alignas(64) constexpr float IOTA[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float CENTRED[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) constexpr float IQ4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(64) constexpr float MXFP4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12}; /* E2M1, twice */
/* QLoRA's NF4 (Dettmers et al. 2023, arXiv:2305.14314, appendix E). */
alignas(64) constexpr float NF4[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

template <int... P, class F> INLINE void each(std::integer_sequence<int, P...>, F f) {
  (f(std::integral_constant<int, P>{}), ...);
}
template <class F> INLINE void each_part(F f) { each(std::make_integer_sequence<int, PARTS>{}, f); }

/* code * scale, with a scale for each 16. */
template <class Sink> INLINE void scaled(Sink &sink, i8x32 codes, float first, float second) {
  Floats parts[PARTS];
  each_part([&](auto p) { parts[p] = mul(convert<p>(codes), either<p>(first, second)); });
  sink.put(parts);
}
template <class Sink> INLINE void scaled(Sink &sink, i8x32 codes, float scale) { scaled(sink, codes, scale, scale); }

/* code * scale + plus. */
template <class Sink>
INLINE void affine(Sink &sink, u8x32 codes, float scale, float scale2, float plus, float plus2) {
  Floats parts[PARTS];
  each_part([&](auto p) {
    parts[p] = add(mul(convert<p>((i8x32)codes), either<p>(scale, scale2)), either<p>(plus, plus2));
  });
  sink.put(parts);
}

template <class Sink> INLINE void q4_0(const uint8_t *b, Sink &sink) {
  sink.pick(table(CENTRED, half(b)), nibbles(b + 2)); /* d, 16 bytes of nibbles: d (q - 8) */
}

template <class Sink> INLINE void q4_1(const uint8_t *b, Sink &sink) {
  sink.pick(table(IOTA, half(b), half(b + 2)), nibbles(b + 4)); /* d, m, nibbles: d q + m */
}

template <class Sink> INLINE void q5_0(const uint8_t *b, Sink &sink) { /* d, 32 fifth bits, nibbles: d (q - 16) */
  const u8x32 fifth = spread(read<uint32_t>(b + 2)) & (u8x32{} + (uint8_t)16);
  scaled(sink, minus(nibbles(b + 6) | fifth, 16), half(b));
}

template <class Sink> INLINE void q5_1(const uint8_t *b, Sink &sink) { /* d, m, 32 fifth bits, nibbles: d q + m */
  const u8x32 fifth = spread(read<uint32_t>(b + 4)) & (u8x32{} + (uint8_t)16);
  const float d = half(b), m = half(b + 2);
  affine(sink, nibbles(b + 8) | fifth, d, d, m, m);
}

template <class Sink> INLINE void q8_0(const uint8_t *b, Sink &sink) {
  scaled(sink, read<i8x32>(b + 2), half(b)); /* d, 32 signed bytes: d q */
}

template <class Sink> INLINE void q2_k(const uint8_t *b, Sink &sink) {
  /* 16 bytes of scale and minimum, 64 of two-bit codes, d, dmin: (d s) q - dmin m, by sub-blocks of 16 */
  const float d = half(b + 80), dmin = half(b + 82);
  for (int i = 0; i < 8; i++) {
    const u8x32 codes = field(load32(b + 16 + 32 * (i / 4)), 2 * (i % 4), 3);
    const uint8_t s = b[2 * i], t = b[2 * i + 1];
    affine(sink, codes, d * (s & 15), d * (t & 15), -(dmin * (s >> 4)), -(dmin * (t >> 4)));
  }
}

template <class Sink> INLINE void q3_k(const uint8_t *b, Sink &sink) {
  /* 32 bytes of third bits, 64 of two-bit codes, 16 six-bit scales, d: d (s - 32) (q - 4), by sub-blocks of 16 */
  const u8x32 thirds = load32(b);
  const uint8_t *scales = b + 96;
  const float d = half(b + 108);
  const auto scale = [&](int j) {
    const int low = scales[j % 8] >> (4 * (j / 8)) & 15, high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    return d * (float)((low | high << 4) - 32);
  };
  for (int i = 0; i < 8; i++) {
    const u8x32 codes = field(load32(b + 32 + 32 * (i / 4)), 2 * (i % 4), 3) | up(field(thirds, i, 1), 2);
    scaled(sink, minus(codes, 4), scale(2 * i), scale(2 * i + 1));
  }
}

/* The scales and (negated) minima of the eight sub-blocks of Q4_K and Q5_K, from six bits each, four bytes at a time. */
struct Affines {
  float scale[8], plus[8];
};
INLINE Affines affines(const uint8_t *b) {
  const uint32_t s = read<uint32_t>(b + 4), m = read<uint32_t>(b + 8), mixed = read<uint32_t>(b + 12);
  const uint32_t six = 0x3F3F3F3Fu, four = 0x0F0F0F0Fu, two = 0x03030303u;
  const uint32_t scales[2] = {s & six, (mixed & four) | (s >> 6 & two) << 4};
  const uint32_t minima[2] = {m & six, (mixed >> 4 & four) | (m >> 6 & two) << 4};
  uint8_t bytes[16];
  memcpy(bytes, scales, 8);
  memcpy(bytes + 8, minima, 8);
  const float d = half(b), dmin = half(b + 2);
  Affines of;
  for (int j = 0; j < 8; j++) of.scale[j] = d * (float)bytes[j];
  for (int j = 0; j < 8; j++) of.plus[j] = -(dmin * (float)bytes[8 + j]);
  return of;
}

template <class Sink> INLINE void q4_k(const uint8_t *b, Sink &sink) {
  /* d, dmin, 12 bytes of scales and minima, 128 of nibbles: (d s) q - dmin m, by sub-blocks of 32 */
  const Affines of = affines(b);
  for (int j = 0; j < 8; j++)
    sink.pick(table(IOTA, of.scale[j], of.plus[j]), field(load32(b + 16 + 32 * (j / 2)), 4 * (j % 2), 15));
}

template <class Sink> INLINE void q5_k(const uint8_t *b, Sink &sink) { /* as Q4_K, with 32 bytes of fifth bits */
  const Affines of = affines(b);
  const u8x32 fifths = load32(b + 16);
  for (int j = 0; j < 8; j++) {
    const u8x32 codes = field(load32(b + 48 + 32 * (j / 2)), 4 * (j % 2), 15) | up(field(fifths, j, 1), 4);
    affine(sink, codes, of.scale[j], of.scale[j], of.plus[j], of.plus[j]);
  }
}

template <class Sink> INLINE void q6_k(const uint8_t *b, Sink &sink) {
  /* 128 bytes of low nibbles, 64 of two high bits, 16 signed scales, d: (d s) (q - 32), by sub-blocks of 16 */
  const float d = half(b + 208);
  for (int i = 0; i < 8; i++) {
    const int h = i / 4, j = i % 4; /* half of the block, quarter of the half */
    const u8x32 low = field(load32(b + 64 * h + 32 * (j % 2)), 4 * (j / 2), 15);
    const u8x32 high = field(load32(b + 128 + 32 * h), 2 * j, 3);
    const int8_t *s = (const int8_t *)b + 192 + 2 * i;
    scaled(sink, minus(low | up(high, 4), 32), d * s[0], d * s[1]);
  }
}

template <class Sink> INLINE void iq4_nl(const uint8_t *b, Sink &sink) {
  sink.pick(table(IQ4, half(b)), nibbles(b + 2)); /* d, nibbles: d v[q] */
}

template <class Sink> INLINE void iq4_xs(const uint8_t *b, Sink &sink) {
  /* d, eight six-bit scales (high bits, low bits), 128 bytes of nibbles: d (s - 32) v[q], by sub-blocks of 32 */
  const float d = half(b);
  const uint16_t high = read<uint16_t>(b + 2);
  for (int j = 0; j < 8; j++) {
    const int scale = (b[4 + j / 2] >> (4 * (j % 2)) & 15) | (high >> (2 * j) & 3) << 4;
    sink.pick(table(IQ4, d * (float)(scale - 32)), nibbles(b + 8 + 16 * j));
  }
}

template <class Sink> INLINE void mxfp4(const uint8_t *b, Sink &sink) { /* e, nibbles: 2^(e - 128) v[q] */
  const uint32_t e = *b, bits = e < 2 ? 0x00200000u << e : (e - 1) << 23;
  sink.pick(table(MXFP4, bits_to_float(bits)), nibbles(b + 1));
}

/* The scale of 64 weights: block i of a row. */
INLINE float nf4_scale(const lorafit_weight &w, int64_t row, int64_t i) {
  const int64_t blocks = w.columns / 64, own = row * blocks + i;
  if (!w.scales_are_codes) return ((const float *)w.scales)[own];
  return w.dynamic[((const uint8_t *)w.scales)[own]] * w.nested[(w.first_row * blocks + own) / 256] + w.offset;
}

template <class Sink> INLINE void nf4(const lorafit_weight &w, int64_t row, Sink &sink) {
  const uint8_t *codes = w.data + row * w.row_bytes;
  for (int64_t i = 0; i < w.columns / 64; i++, codes += 32) {
    const Table values = table(NF4, nf4_scale(w, row, i));
    sink.pick(values, pairs(codes));
    sink.pick(values, pairs(codes + 16));
  }
}

/* Rows of plain numbers of SIZE bytes: 32 at a time by `parts_of`, the rest one by one by `one_of`. */
template <int SIZE, class Sink, class Parts, class One>
INLINE void plain(const lorafit_weight &w, int64_t row, Sink &sink, Parts parts_of, One one_of) {
  const uint8_t *at = w.data + row * w.row_bytes;
  int64_t left = w.columns;
  for (; left >= 32; left -= 32, at += 32 * SIZE) {
    Floats parts[PARTS];
    each_part([&](auto p) { parts[p] = parts_of(at, p); });
    sink.put(parts);
  }
  for (; left > 0; left--, at += SIZE) sink.one(one_of(at));
}

template <class Sink> INLINE void walk(const lorafit_weight &w, int64_t row, Sink &sink) {
  const uint8_t *b = w.data + row * w.row_bytes, *end = b + w.row_bytes;
  switch (w.format) {
#define BLOCKS(code, name, bytes)                                                                                     \
  case code:                                                                                                          \
    for (; b < end; b += bytes) name(b, sink);                                                                        \
    break;
    BLOCKS(2, q4_0, 18)
    BLOCKS(3, q4_1, 20)
    BLOCKS(6, q5_0, 22)
    BLOCKS(7, q5_1, 24)
    BLOCKS(8, q8_0, 34)
    BLOCKS(10, q2_k, 84)
    BLOCKS(11, q3_k, 110)
    BLOCKS(12, q4_k, 144)
    BLOCKS(13, q5_k, 176)
    BLOCKS(14, q6_k, 210)
    BLOCKS(20, iq4_nl, 18)
    BLOCKS(23, iq4_xs, 136)
    BLOCKS(39, mxfp4, 17)
#undef BLOCKS
  case 0:
    plain<4>(
        w, row, sink, [](const uint8_t *at, int p) { return load((const float *)(at + 4 * p * WIDTH)); },
        [](const uint8_t *at) { return read<float>(at); });
    break;
  case 1:
    plain<2>(
        w, row, sink, [](const uint8_t *at, int p) { return load_half(at + 2 * p * WIDTH); },
        [](const uint8_t *at) { return half(at); });
    break;
  case 30:
    plain<2>(
        w, row, sink, [](const uint8_t *at, int p) { return load_bf16(at + 2 * p * WIDTH); },
        [](const uint8_t *at) { return bits_to_float((uint32_t)read<uint16_t>(at) << 16); });
    break;
  case LORAFIT_NF4: nf4(w, row, sink); break;
  case LORAFIT_INT8: {
    const float scale = ((const float *)w.scales)[row];
    plain<1>(
        w, row, sink,
        [scale](const uint8_t *at, auto p) { return mul(convert<decltype(p)::value>(read<i8x32>(at)), splat(scale)); },
        [scale](const uint8_t *at) { return (float)read<int8_t>(at) * scale; });
    break;
  }
  }
}

} // namespace
