/* What one processor path offers to the dispatcher: the same functions, compiled for another instruction set. */
#pragma once
#include "lorafit.h"

namespace lorafit {

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
};

/* Weights per block and bytes per block of a format; 0 for an unknown one. */
struct Block {
  int64_t elements, bytes;
};
Block block_of(int32_t format);

extern const Path avx512_path, avx2_path, neon_path, portable_path;

} // namespace lorafit
