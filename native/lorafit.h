/* The C interface of lorafit's native kernels: frozen weights as they are stored, unpacked or
   multiplied; the parts of a layer between its products; attention.

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

/* The parts of a layer and of the loss. `type` is that of every pointer to void: LORAFIT_F32 or LORAFIT_BF16; values are
   computed in fp32 and rounded once. Rows are contiguous unless an `*_apart` says how many elements lie between them. */

/* to = x + by * delta and out = norm(to), all (rows, n); delta null: out = norm(x), and `to` is not written.
   norm(x) = x / sqrt(mean(x^2) + eps) * weight; scale (rows,): that reciprocal root. */
LORAFIT_API int lorafit_norm(int32_t type, const void *x, const void *delta, float by, const float *weight, float eps,
                             int64_t rows, int64_t n, void *to, void *out, float *scale, int32_t threads);

/* out = onto + gradient of norm's input, from grad of its output; onto may be null, out may be grad or onto. */
LORAFIT_API int lorafit_norm_backward(int32_t type, const void *grad, const void *x, const float *weight,
                                      const float *scale, const void *onto, int64_t rows, int64_t n, void *out,
                                      int32_t threads);

/* Heads of 2 * half values: normed where weight (2 * half) is not null, then rotated where cos and sin (tokens, half)
   are not: (a, b) -> (a cos - b sin, b cos + a sin) for each pair (i, i + half). out may be x. */
LORAFIT_API int lorafit_heads(int32_t type, const void *x, int64_t x_apart, const float *weight, float eps,
                              const float *cos, const float *sin, int64_t tokens, int64_t heads, int64_t half,
                              void *out, int64_t out_apart, int32_t threads);

/* grad, of the output, becomes the gradient of x. x is read only where there is a weight. */
LORAFIT_API int lorafit_heads_backward(int32_t type, void *grad, int64_t grad_apart, const void *x, int64_t x_apart,
                                       const float *weight, float eps, const float *cos, const float *sin,
                                       int64_t tokens, int64_t heads, int64_t half, int32_t threads);

/* out = act(gate) * up; activation: 0 SiLU, 1 GELU with tanh. gate and up lie in rows of the same distance. */
LORAFIT_API int lorafit_gate(int32_t type, int32_t activation, const void *gate, const void *up, int64_t apart,
                             int64_t rows, int64_t n, void *out, int32_t threads);

/* From grad of the output: gate and up become their gradients, grad the output itself. */
LORAFIT_API int lorafit_gate_backward(int32_t type, int32_t activation, void *grad, void *gate, void *up, int64_t apart,
                                      int64_t rows, int64_t n, int32_t threads);

/* losses (rows,) = logsumexp(z) - z[target], z = softcap * tanh(multiplier * logits / softcap), softcap 0: uncapped.
   wanted: the losses' gradients are written over the logits (rows, n). 1: a target outside of the row. */
LORAFIT_API int lorafit_entropy(int32_t type, void *logits, const int64_t *targets, int64_t rows, int64_t n,
                                float multiplier, float softcap, int32_t wanted, float *losses, int32_t threads);

/* Causal attention within documents. Token t's head h lies at q + t * q_apart + h * dim, and so on; query head h reads
   key head h / (heads / key_heads). */
typedef struct {
  int32_t type, threads;
  int64_t tokens, documents, heads, key_heads, dim;
  int64_t window;        /* a token sees itself and the window - 1 before it; 0: all before it */
  const int64_t *bounds; /* documents + 1: document i has the tokens bounds[i] to bounds[i + 1] */
  float scale, softcap;  /* scores = softcap * tanh(scale * q k / softcap); softcap 0: uncapped */
  const float *sinks;    /* (heads,): a score beside those of the keys, that takes no value; or null */
  const void *q, *k, *v;
  int64_t q_apart, k_apart, v_apart;
  void *out;
  int64_t out_apart;
  float *lse; /* (heads, tokens): logsumexp of the scores; written forward, read backward */
  const void *grad_out;
  int64_t grad_out_apart;
  void *dq, *dk, *dv;
  int64_t dq_apart, dk_apart, dv_apart;
  float *partial; /* backward: null, or (heads, tokens, 2, dim), where heads that share keys are to run apart */
  char *memory;   /* `room` bytes for each thread, at a multiple of 64 */
  int64_t room;
} lorafit_attention;

/* Bytes of `room` for one thread. */
LORAFIT_API int64_t lorafit_attention_room(const lorafit_attention *a, int32_t backward);
LORAFIT_API int lorafit_attend(const lorafit_attention *a);
LORAFIT_API int lorafit_attend_backward(const lorafit_attention *a);

/* Processor paths: the names of those that this library holds and this processor runs, best first, by commas; the one
   in use; choosing one by name (1: there is no such path here). */
LORAFIT_API const char *lorafit_paths(void);
LORAFIT_API const char *lorafit_path(void);
LORAFIT_API int lorafit_use(const char *name);

#ifdef __cplusplus
}
#endif
