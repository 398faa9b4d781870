/* The C interface: checks, the choice of a processor path, and rows shared among threads. */
#include "path.h"
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

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
  case 39: return {32, 17};
  case LORAFIT_NF4: return {64, 32};
  case LORAFIT_INT8: return {1, 1};
  default: return {0, 0};
  }
}

namespace {

/* The paths of this library that this processor runs, best first. */
struct Choice {
  const Path *found[5];
  int count = 0;
  const Path *now;
  char names[64] = "";
  Choice() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#ifdef HAVE_AVX512_BF16
      if (__builtin_cpu_supports("avx512bf16")) found[count++] = &avx512_bf16_path;
#endif
      found[count++] = &avx512_path;
    }
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

/* The work with the rows of the type's kernels, and a null pointer of its elements' type. */
template <class F> void typed(int32_t type, F work) {
  const Path &path = *choice().now;
  if (type == LORAFIT_BF16)
    work(path.bf16, (uint16_t *)nullptr);
  else
    work(path.f32, (float *)nullptr);
}

template <class F> void each_row(int64_t rows, int32_t threads, F work) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 1)
  for (int64_t i = 0; i < rows; i++) work(i);
}

int this_thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

constexpr int64_t CHUNK = 1024; /* queries of a document that one thread takes, forward */

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

int lorafit_norm(int32_t type, const void *x, const void *delta, float by, const float *weight, float eps, int64_t rows,
                 int64_t n, void *to, void *out, float *scale, int32_t threads) {
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(rows, threads, [&](int64_t i) {
      scale[i] = kernels.norm((P)x + i * n, delta ? (P)delta + i * n : nullptr, by, weight, eps, n, (P)to + i * n,
                              (P)out + i * n);
    });
  });
  return 0;
}

int lorafit_norm_backward(int32_t type, const void *grad, const void *x, const float *weight, const float *scale,
                          const void *onto, int64_t rows, int64_t n, void *out, int32_t threads) {
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(rows, threads, [&](int64_t i) {
      kernels.norm_backward((P)grad + i * n, (P)x + i * n, weight, scale[i], onto ? (P)onto + i * n : nullptr, n,
                            (P)out + i * n);
    });
  });
  return 0;
}

int lorafit_heads(int32_t type, const void *x, int64_t x_apart, const float *weight, float eps, const float *cos,
                  const float *sin, int64_t tokens, int64_t heads, int64_t half, void *out, int64_t out_apart,
                  int32_t threads) {
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(tokens, threads, [&](int64_t t) {
      for (int64_t h = 0; h < heads; h++)
        kernels.head((P)x + t * x_apart + 2 * half * h, weight, eps, cos ? cos + t * half : nullptr,
                     sin ? sin + t * half : nullptr, half, (P)out + t * out_apart + 2 * half * h);
    });
  });
  return 0;
}

int lorafit_heads_backward(int32_t type, void *grad, int64_t grad_apart, const void *x, int64_t x_apart,
                           const float *weight, float eps, const float *cos, const float *sin, int64_t tokens,
                           int64_t heads, int64_t half, int32_t threads) {
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(tokens, threads, [&](int64_t t) {
      for (int64_t h = 0; h < heads; h++)
        kernels.head_backward((P)grad + t * grad_apart + 2 * half * h, (P)x + t * x_apart + 2 * half * h, weight, eps,
                              cos ? cos + t * half : nullptr, sin ? sin + t * half : nullptr, half);
    });
  });
  return 0;
}

int lorafit_gate(int32_t type, int32_t activation, const void *gate, const void *up, int64_t apart, int64_t rows,
                 int64_t n, void *out, int32_t threads) {
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(rows, threads, [&](int64_t i) {
      kernels.gate[activation]((P)gate + i * apart, (P)up + i * apart, n, (P)out + i * n);
    });
  });
  return 0;
}

int lorafit_gate_backward(int32_t type, int32_t activation, void *grad, void *gate, void *up, int64_t apart, int64_t rows,
                          int64_t n, int32_t threads) {
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(rows, threads, [&](int64_t i) {
      kernels.gate_backward[activation]((P)grad + i * n, (P)gate + i * apart, (P)up + i * apart, n);
    });
  });
  return 0;
}

int lorafit_entropy(int32_t type, void *logits, const int64_t *targets, int64_t rows, int64_t n, float multiplier,
                    float softcap, int32_t wanted, float *losses, int32_t threads) {
  for (int64_t i = 0; i < rows; i++)
    if (targets[i] < 0 || targets[i] >= n) return 1;
  typed(type, [&](const auto &kernels, auto *as) {
    typedef decltype(as) P;
    each_row(rows, threads, [&](int64_t i) {
      losses[i] = kernels.entropy((P)logits + i * n, targets[i], multiplier, softcap, wanted, n);
    });
  });
  return 0;
}

int64_t lorafit_attention_room(const lorafit_attention *a, int32_t backward) {
  int64_t longest = 0, room = 0;
  for (int64_t i = 0; i < a->documents; i++) {
    const int64_t length = a->bounds[i + 1] - a->bounds[i];
    longest = length > longest ? length : longest;
  }
  typed(a->type, [&](const auto &kernels, auto *) { room = kernels.room(*a, longest, backward); });
  return room;
}

int lorafit_attend(const lorafit_attention *a) {
  int64_t chunks = 0; /* of each document, as many as the longest one has */
  for (int64_t i = 0; i < a->documents; i++) {
    const int64_t of_this = (a->bounds[i + 1] - a->bounds[i] + CHUNK - 1) / CHUNK;
    chunks = of_this > chunks ? of_this : chunks;
  }
  typed(a->type, [&](const auto &kernels, auto *) {
    const int64_t works = a->documents * chunks * a->key_heads;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads)
    for (int64_t i = 0; i < works; i++) {
      const int64_t head = i % a->key_heads, document = i / a->key_heads % a->documents;
      const int64_t chunk = chunks - 1 - i / a->key_heads / a->documents; /* the dearest first */
      const int64_t length = a->bounds[document + 1] - a->bounds[document];
      if (chunk * CHUNK >= length) continue;
      const int64_t last = (chunk + 1) * CHUNK < length ? (chunk + 1) * CHUNK : length;
      kernels.attend(*a, document, head, chunk * CHUNK, last, a->memory + a->room * this_thread());
    }
  });
  return 0;
}

int lorafit_attend_backward(const lorafit_attention *a) {
  const int64_t shared = a->heads / a->key_heads;
  typed(a->type, [&](const auto &kernels, auto *) {
    const int64_t apart = a->partial ? a->heads : a->key_heads, works = a->documents * apart;
#pragma omp parallel for schedule(dynamic) num_threads(a->threads)
    for (int64_t i = 0; i < works; i++) {
      const int64_t head = i % apart, key_head = a->partial ? head / shared : head;
      const int64_t first = a->partial ? head : head * shared, last = first + (a->partial ? 1 : shared);
      kernels.attend_backward(*a, i / apart, key_head, first, last, a->memory + a->room * this_thread());
    }
    if (a->partial) each_row(a->tokens, a->threads, [&](int64_t t) { kernels.add_partial(*a, t); });
  });
  return 0;
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
