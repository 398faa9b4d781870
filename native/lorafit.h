/* The C interface of lorafit's native kernels: frozen weights as they are stored, unpacked or multiplied.

   Every function returns 0, or what its comment says. Nothing is allocated that outlives a call, nothing is thrown,
   and no state is kept but the choice of the processor path. `threads` is the size of the OpenMP team. */
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LORAFIT_API __attribute__((visibility("default")))

/* Formats: ggml's type numbers for GGUF blocks, and two of our own. */
enum { LORAFIT_NF4 = 1000, LORAFIT_INT8 = 1001 };
enum { LORAFIT_F32 = 0, LORAFIT_BF16 = 1 }; /* element types of x, y and out */

/* A frozen matrix W (rows, columns), or some rows of it. */
typedef struct {
  int32_t format;
  int32_t scales_are_codes; /* NF4: scales hold 8-bit codes, to be decoded by `nested` and `offset` */
  int64_t rows, columns, row_bytes;
  const uint8_t *data;  /* rows * row_bytes */
  const void *scales;   /* NF4: one per 64 weights, codes or fp32; INT8: one fp32 per row; GGUF: null */
  const float *nested;  /* NF4: second-level scales, one per 256 codes of the whole matrix */
  const float *dynamic; /* NF4: the 256 values of the 8-bit code */
  float offset;         /* NF4: added to every decoded scale */
  int64_t first_row;    /* NF4: where row 0 stands in the whole matrix */
} lorafit_weight;

/* out (count, columns) = rows order[start], order[start + 1], ... of W; order null: rows start, start + 1, ...
   1: an index outside of W; 2: an unknown format. */
LORAFIT_API int lorafit_unpack(const lorafit_weight *w, const int64_t *order, int64_t start, int64_t count, void *out,
                               int32_t out_type, int32_t threads);

/* y (batch, rows of order or W) = x (batch, columns) W^T, accumulated in fp32. x is fp32; y is y_type. As above. */
LORAFIT_API int lorafit_matvec(const lorafit_weight *w, const int64_t *order, int64_t order_length, const float *x,
                               int64_t batch, void *y, int32_t y_type, int32_t threads);

/* The first row with a scale (or, in F32, F16 and BF16, a weight) that is NaN or infinite; -1 if there is none. */
LORAFIT_API int64_t lorafit_first_bad_row(const lorafit_weight *w, int32_t threads);

/* matrix (rows, columns) fp32 -> codes (rows, columns / 2), absmax (rows, columns / 64); columns % 64 == 0.
   1: the matrix holds NaN or infinity. */
LORAFIT_API int lorafit_quantise_nf4(const float *matrix, int64_t rows, int64_t columns, uint8_t *codes, float *absmax,
                                     int32_t threads);

/* matrix (rows, columns) fp32 -> codes (rows, columns) int8, scales (rows,). 1: NaN or infinity. */
LORAFIT_API int lorafit_quantise_int8(const float *matrix, int64_t rows, int64_t columns, int8_t *codes, float *scales,
                                      int32_t threads);

/* Processor paths: the names of those that this library holds and this processor runs, best first, by commas; the one
   in use; choosing one by name (1: there is no such path here). */
LORAFIT_API const char *lorafit_paths(void);
LORAFIT_API const char *lorafit_path(void);
LORAFIT_API int lorafit_use(const char *name);

#ifdef __cplusplus
}
#endif
