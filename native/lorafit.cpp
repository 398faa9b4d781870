/* The C interface: checks, the choice of a processor path, and rows shared among threads. */
#include "path.h"
#include <string.h>

static_assert(sizeof(lorafit_weight) == 80, "as kernels/native.py declares it");

namespace lorafit {

Block block_of(int32_t format) {
  switch (format) {
  case 0: return {1, 4};
  case 1: case 30: return {1, 2};
  case 2: case 20: return {32, 18};
  case 3: return {32, 20};
  case 6: return {32, 22};
  case 7: return {32, 24};
  case 8: return {32, 34};
  case 10: return {256, 84};
  case 11: return {256, 110};
  case 12: return {256, 144};
  case 13: return {256, 176};
  case 14: return {256, 210};
  case 23: return {256, 136};
  case LORAFIT_NF4: return {64, 32};
  case LORAFIT_INT8: return {1, 1};
  default: return {0, 0};
  }
}

namespace {

/* The paths of this library that this processor runs, best first. */
struct Choice {
  const Path *found[4];
  int count = 0;
  const Path *now;
  char names[64] = "";
  Choice() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      found[count++] = &avx512_path;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
      found[count++] = &avx2_path;
#elif defined(__aarch64__)
    found[count++] = &neon_path;
#endif
    found[count++] = &portable_path;
    now = found[0];
    for (int i = 0; i < count; i++) {
      if (i) strcat(names, ",");
      strcat(names, found[i]->name);
    }
  }
};

Choice &choice() {
  static Choice made;
  return made;
}

/* 0 if the weight's numbers and the row numbers agree. */
int check(const lorafit_weight &w, const int64_t *order, int64_t start, int64_t count) {
  const Block block = block_of(w.format);
  if (!block.elements || w.columns % block.elements || w.row_bytes != w.columns / block.elements * block.bytes) return 2;
  if (start < 0 || count < 0 || (!order && start > w.rows - count)) return 1;
  for (int64_t i = 0; order && i < count; i++)
    if (order[start + i] < 0 || order[start + i] >= w.rows) return 1;
  return 0;
}

} // namespace
} // namespace lorafit

using namespace lorafit;

int lorafit_unpack(const lorafit_weight *w, const int64_t *order, int64_t start, int64_t count, void *out,
                   int32_t out_type, int32_t threads) {
  if (const int fault = check(*w, order, start, count)) return fault;
  const Path &path = *choice().now;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > 1)
  for (int64_t i = 0; i < count; i++) {
    const int64_t row = order ? order[start + i] : start + i;
    if (out_type == LORAFIT_BF16)
      path.unpack_bf16(*w, row, (uint16_t *)out + i * w->columns);
    else
      path.unpack_f32(*w, row, (float *)out + i * w->columns);
  }
  return 0;
}

int lorafit_matvec(const lorafit_weight *w, const int64_t *order, int64_t order_length, const float *x, int64_t batch,
                   void *y, int32_t y_type, int32_t threads) {
  const int64_t rows = order ? order_length : w->rows;
  if (const int fault = check(*w, order, 0, rows)) return fault;
  const Path &path = *choice().now;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; i++) {
    const int64_t row = order ? order[i] : i;
    float of[4];
    for (int64_t k = 0; k < batch; k += 4) {
      const int64_t some = batch - k < 4 ? batch - k : 4;
      if (some == 4)
        path.dot4(*w, row, x + k * w->columns, w->columns, of);
      else
        for (int64_t j = 0; j < some; j++) path.dot1(*w, row, x + (k + j) * w->columns, w->columns, of + j);
      for (int64_t j = 0; j < some; j++) {
        if (y_type == LORAFIT_BF16) {
          uint32_t bits;
          memcpy(&bits, of + j, sizeof bits);
          const bool nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
          ((uint16_t *)y)[(k + j) * rows + i] =
              nan ? 0x7FC0 : (uint16_t)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
        } else {
          ((float *)y)[(k + j) * rows + i] = of[j];
        }
      }
    }
  }
  return 0;
}

int64_t lorafit_first_bad_row(const lorafit_weight *w, int32_t threads) {
  const Path &path = *choice().now;
  int64_t first = w->rows;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(min : first)
  for (int64_t row = 0; row < w->rows; row++)
    if (!path.row_is_finite(*w, row) && row < first) first = row;
  return first == w->rows ? -1 : first;
}

int lorafit_quantise_nf4(const float *matrix, int64_t rows, int64_t columns, uint8_t *codes, float *absmax,
                         int32_t threads) {
  const Path &path = *choice().now;
  int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
  for (int64_t row = 0; row < rows; row++)
    bad |= !path.quantise_nf4(matrix + row * columns, columns, codes + row * columns / 2, absmax + row * columns / 64);
  return bad;
}

int lorafit_quantise_int8(const float *matrix, int64_t rows, int64_t columns, int8_t *codes, float *scales,
                          int32_t threads) {
  const Path &path = *choice().now;
  int bad = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(| : bad)
  for (int64_t row = 0; row < rows; row++)
    bad |= !path.quantise_int8(matrix + row * columns, columns, codes + row * columns, scales + row);
  return bad;
}

const char *lorafit_paths(void) { return choice().names; }

const char *lorafit_path(void) { return choice().now->name; }

int lorafit_use(const char *name) {
  for (int i = 0; i < choice().count; i++)
    if (!strcmp(choice().found[i]->name, name)) {
      choice().now = choice().found[i];
      return 0;
    }
  return 1;
}
