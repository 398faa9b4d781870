/* What one processor path offers to the dispatcher: the same functions, compiled for another instruction set. */
#pragma once
#include "lorafit.h"

namespace lorafit {

/* Rows of one element type, fp32 or bf16 (as bits); see lorafit.h. */
template <class X> struct Rows {
  float (*norm)(const X *x, const X *delta, float by, const float *weight, float eps, int64_t n, X *to, X *out);
  void (*norm_backward)(const X *grad, const X *x, const float *weight, float scale, const X *onto, int64_t n, X *out);
  void (*head)(const X *x, const float *weight, float eps, const float *cos, const float *sin, int64_t half, X *out);
  void (*head_backward)(X *grad, const X *x, const float *weight, float eps, const float *cos, const float *sin,
                        int64_t half);
  void (*gate[2])(const X *gate, const X *up, int64_t n, X *out);
  void (*gate_backward[2])(X *grad, X *gate, X *up, int64_t n);
  float (*entropy)(X *logits, int64_t target, float multiplier, float softcap, bool wanted, int64_t n);
  void (*attend)(const lorafit_attention &a, int64_t document, int64_t head, int64_t first, int64_t last, char *memory);
  void (*attend_backward)(const lorafit_attention &a, int64_t document, int64_t head, int64_t first, int64_t last,
                          char *memory);
  void (*add_partial)(const lorafit_attention &a, int64_t token);
  int64_t (*room)(const lorafit_attention &a, int64_t keys, bool backward);
};

struct Path {
  const char *name;
  /* One row of W into out (columns). */
  void (*unpack_f32)(const lorafit_weight &w, int64_t row, float *out);
  void (*unpack_bf16)(const lorafit_weight &w, int64_t row, uint16_t *out);
  /* y[k] = x[k] . row, for 1 or 4 vectors x, `stride` floats apart. */
  void (*dot1)(const lorafit_weight &w, int64_t row, const float *x, int64_t stride, float *y);
  void (*dot4)(const lorafit_weight &w, int64_t row, const float *x, int64_t stride, float *y);
  /* One row of a matrix into codes and scales; false: NaN or infinity. */
  bool (*quantise_nf4)(const float *row, int64_t columns, uint8_t *codes, float *absmax);
  bool (*quantise_int8)(const float *row, int64_t columns, int8_t *codes, float *scale);
  bool (*row_is_finite)(const lorafit_weight &w, int64_t row);
  Rows<float> f32;
  Rows<uint16_t> bf16;
};

/* Weights per block and bytes per block of a format; 0 for an unknown one. */
struct Block {
  int64_t elements, bytes;
};
Block block_of(int32_t format);

extern const Path avx512_bf16_path, avx512_path, avx2_path, neon_path, portable_path;

} // namespace lorafit
