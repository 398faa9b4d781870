/* Calls every function of lorafit.h with every format on every path of this machine, over heap blocks of exactly the
   bytes that it may touch, the data at an odd address: for the sanitizers, and for comparing paths and processors.
   Prints a line `path format checksum` for each; stops at the first wrong answer. */
#include "path.h"
#include <math.h>
#include <random>
#include <sstream>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#define DEMAND(law)                                                                                                   \
  if (!(law)) fprintf(stderr, "%s, format %d: not %s\n", lorafit_path(), format, #law), exit(1)

template <class T> using Many = std::vector<T>;
static std::mt19937 random_bits;

struct Sum { /* FNV-1a of bytes */
  uint64_t value = 14695981039346656037ull;
  template <class T> void add(const Many<T> &of) {
    const uint8_t *at = (const uint8_t *)of.data();
    for (size_t i = 0; i < of.size() * sizeof(T); i++) value = (value ^ at[i]) * 1099511628211ull;
  }
};

/* Floats of any bits, but below 2: subnormals among them. */
static Many<float> floats(int64_t count) {
  Many<float> out(count);
  for (float &value : out) {
    const uint32_t bits = random_bits() & 0xBFFFFFFFu;
    memcpy(&value, &bits, sizeof value);
  }
  return out;
}

static void weights(int32_t format, bool codes, int64_t rows, int64_t columns, Sum &sum) {
  const lorafit::Block block = lorafit::block_of(format);
  const int64_t row_bytes = columns / block.elements * block.bytes, all = rows * row_bytes, first_row = 3;
  Many<uint8_t> data(1 + all), scale_codes(rows * columns / 64);
  for (uint8_t &code : scale_codes) code = (uint8_t)random_bits();
  const Many<float> scales = floats(format == LORAFIT_NF4 ? rows * columns / 64 : rows), dynamic = floats(256);
  const Many<float> nested = floats(((first_row + rows) * columns / 64 + 255) / 256);
  lorafit_weight w = {format,        codes,          rows,           columns, row_bytes, data.data() + 1, scales.data(),
                      nested.data(), dynamic.data(), 0.5f, first_row};
  if (codes) w.scales = scale_codes.data();
  lorafit_weight row = w;
  for (row.rows = 1; row.data < w.data + all; row.data += row_bytes) /* until the row's halves are finite */
    do
      for (int64_t i = 0; i < row_bytes; i++) data[row.data - data.data() + i] = (uint8_t)random_bits();
    while (lorafit_first_bad_row(&row, 1) == 0);

  Many<float> whole(rows * columns);
  for (int threads = 1; threads <= 2; threads++) {
    DEMAND(lorafit_unpack(&w, nullptr, 0, rows, whole.data(), LORAFIT_F32, threads) == 0);
    sum.add(whole);
    const Many<int64_t> order = {rows - 1, 0, rows / 2, rows - 1};
    Many<uint16_t> some(3 * columns);
    DEMAND(lorafit_unpack(&w, order.data(), 1, 3, some.data(), LORAFIT_BF16, threads) == 0);
    sum.add(some);
    for (int64_t batch : {1, 3, 4, 9}) {
      Many<float> x(batch * columns), y(batch * 4);
      for (float &value : x) value = ((int32_t)random_bits() >> 8) * 0x1p-33f; /* small: no sum overflows */
      DEMAND(lorafit_matvec(&w, order.data(), 4, x.data(), batch, y.data(), LORAFIT_F32, threads) == 0);
      for (int64_t k = 0; k < batch; k++)
        for (int64_t i = 0; i < 4; i++) {
          double want = 0, magnitude = 0;
          for (int64_t j = 0; j < columns; j++) {
            const double product = (double)x[k * columns + j] * whole[order[i] * columns + j];
            want += product, magnitude += fabs(product);
          }
          DEMAND(fabs(y[k * 4 + i] - want) <= columns * (0x1p-23 * magnitude + 0x1p-148)); /* rounded once a term */
        }
      Many<uint16_t> y16(batch * rows);
      DEMAND(lorafit_matvec(&w, nullptr, 0, x.data(), batch, y16.data(), LORAFIT_BF16, threads) == 0);
    }
  }

  const Many<int64_t> outside = {rows}, negative = {-1};
  DEMAND(lorafit_unpack(&w, nullptr, 0, 0, nullptr, LORAFIT_F32, 1) == 0);
  DEMAND(lorafit_unpack(&w, nullptr, 1, rows, nullptr, LORAFIT_F32, 1) == 1);
  DEMAND(lorafit_unpack(&w, nullptr, -1, 1, nullptr, LORAFIT_F32, 1) == 1);
  DEMAND(lorafit_unpack(&w, nullptr, INT64_MAX, 1, nullptr, LORAFIT_F32, 1) == 1);
  DEMAND(lorafit_unpack(&w, outside.data(), 0, 1, nullptr, LORAFIT_F32, 1) == 1);
  DEMAND(lorafit_matvec(&w, negative.data(), 1, nullptr, 1, nullptr, LORAFIT_F32, 1) == 1);
  row.row_bytes++;
  DEMAND(lorafit_unpack(&row, nullptr, 0, 1, nullptr, LORAFIT_F32, 1) == 2);

  DEMAND(lorafit_first_bad_row(&w, 2) == -1);
  Many<float> bad(scales.size(), NAN);
  if (format < LORAFIT_NF4)
    memset(data.data() + 1 + (rows - 1) * row_bytes, 255, row_bytes); /* every half a NaN */
  else if (codes)
    w.offset = NAN;
  else
    w.scales = bad.data();
  DEMAND(lorafit_first_bad_row(&w, 2) == (format < LORAFIT_NF4 ? rows - 1 : 0));
}

static void quantise(int32_t format, int64_t rows, int64_t columns, Sum &sum) {
  Many<float> matrix = floats(rows * columns), scales(format == LORAFIT_NF4 ? rows * columns / 64 : rows);
  for (int64_t i = 0; i < columns; i++) matrix[i] = rows % 2 ? 0.0f : ldexpf(matrix[i], -127); /* a row of nothing */
  Many<uint8_t> codes(format == LORAFIT_NF4 ? rows * columns / 2 : rows * columns);
  const auto run = [&](int threads) {
    return format == LORAFIT_NF4
               ? lorafit_quantise_nf4(matrix.data(), rows, columns, codes.data(), scales.data(), threads)
               : lorafit_quantise_int8(matrix.data(), rows, columns, (int8_t *)codes.data(), scales.data(), threads);
  };
  for (int threads = 1; threads <= 2; threads++) {
    DEMAND(run(threads) == 0);
    sum.add(codes), sum.add(scales);
  }
  for (const float value : {INFINITY, -INFINITY, NAN}) {
    matrix.back() = value;
    DEMAND(run(2) == 1);
  }
}

/* Values of one element type, at the end of a heap block of exactly their size. */
struct Values {
  int32_t type;
  Many<float> f32;
  Many<uint16_t> bf16;
  Values(int32_t of, int64_t count, float spread = 1) : type(of) {
    f32.resize(type == LORAFIT_F32 ? count : 0), bf16.resize(type == LORAFIT_F32 ? 0 : count);
    for (float &value : f32) value = ((int32_t)random_bits() >> 8) * 0x1p-23f * spread;
    for (uint16_t &value : bf16) {
      const float whole = ((int32_t)random_bits() >> 8) * 0x1p-23f * spread;
      uint32_t bits;
      memcpy(&bits, &whole, sizeof bits);
      value = (uint16_t)(bits >> 16);
    }
  }
  void *at() { return type == LORAFIT_F32 ? (void *)f32.data() : (void *)bf16.data(); }
  double operator[](int64_t i) const {
    if (type == LORAFIT_F32) return f32[i];
    const uint32_t bits = (uint32_t)bf16[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
};

static bool near(double found, double wanted, int32_t type, double scale) {
  return fabs(found - wanted) <= (type == LORAFIT_F32 ? 1e-5 : 2e-2) * (fabs(wanted) + scale);
}

/* Norm, heads, gate and cross-entropy forward against doubles; backward so that the sanitizers see it. */
static void rows(int32_t format, int64_t n, int threads) {
  const int64_t count = 3, half = n;
  Values x(format, count * n), delta(format, count * n), to(format, count * n), out(format, count * n);
  Many<float> weight(2 * n, 1.5f), scale(count), losses(count), cosine(count * half, 0.6f), sine(count * half, 0.8f);
  DEMAND(lorafit_norm(format, x.at(), delta.at(), 0.5f, weight.data(), 1e-3f, count, n, to.at(), out.at(), scale.data(),
                      threads) == 0);
  for (int64_t i = 0; i < count; i++) {
    double squares = 0;
    for (int64_t j = i * n; j < (i + 1) * n; j++) {
      DEMAND(near(to[j], x[j] + 0.5 * delta[j], format, 0.1));
      squares += to[j] * to[j];
    }
    for (int64_t j = i * n; j < (i + 1) * n; j++)
      DEMAND(near(out[j], to[j] / sqrt(squares / n + 1e-3) * 1.5, format, 0.1));
  }
  DEMAND(lorafit_norm_backward(format, out.at(), to.at(), weight.data(), scale.data(), delta.at(), count, n, out.at(),
                               threads) == 0);
  const int64_t apart = 4 * half + 3;
  Values wide(format, (count - 1) * apart + 4 * half), turned(format, count * 4 * half);
  DEMAND(lorafit_heads(format, wide.at(), apart, nullptr, 0, cosine.data(), sine.data(), count, 2, half, turned.at(),
                       4 * half, threads) == 0);
  DEMAND(near(turned[0], wide[0] * 0.6 - wide[half] * 0.8, format, 0.1));
  DEMAND(lorafit_heads(format, wide.at(), apart, weight.data(), 1e-3f, cosine.data(), sine.data(), count, 2, half,
                       turned.at(), 4 * half, threads) == 0);
  DEMAND(lorafit_heads_backward(format, turned.at(), 4 * half, wide.at(), apart, weight.data(), 1e-3f, cosine.data(),
                                sine.data(), count, 2, half, threads) == 0);
  for (int32_t activation : {0, 1}) {
    Values both(format, (count - 1) * (2 * n + 5) + 2 * n, 8), made(format, count * n);
    uint8_t *const up = (uint8_t *)both.at() + n * (format == LORAFIT_F32 ? 4 : 2);
    DEMAND(lorafit_gate(format, activation, both.at(), up, 2 * n + 5, count, n, made.at(), threads) == 0);
    const double g = both[0], inner = activation ? 1.5957691216 * (g + 0.044715 * g * g * g) : g;
    DEMAND(near(made[0], g / (1 + exp(-inner)) * both[n], format, 0.1));
    DEMAND(lorafit_gate_backward(format, activation, made.at(), both.at(), up, 2 * n + 5, count, n, threads) == 0);
  }
  for (float softcap : {0.0f, 5.0f})
    for (int32_t wanted : {0, 1}) {
      Values logits(format, count * n, 8);
      const Many<int64_t> targets = {0, n - 1, n / 2}, outside = {0, n, 0};
      double total = 0, hit = 0;
      for (int64_t j = 0; j < n; j++) {
        const double z = softcap ? softcap * tanh(2 * logits[j] / softcap) : 2 * logits[j];
        total += exp(z), hit = j == 0 ? z : hit;
      }
      DEMAND(lorafit_entropy(format, logits.at(), outside.data(), count, n, 2, softcap, wanted, losses.data(), 1) == 1);
      DEMAND(lorafit_entropy(format, logits.at(), targets.data(), count, n, 2, softcap, wanted, losses.data(),
                             threads) == 0);
      DEMAND(near(losses[0], log(total) - hit, LORAFIT_F32, 1));
    }
}

/* Attention forward against doubles; backward so that the sanitizers see it. */
static void attention(int32_t format, int64_t dim, Many<int64_t> bounds, int64_t window, float softcap, int threads) {
  const int64_t tokens = bounds.back(), heads = 4, key_heads = 2;
  Values q(format, tokens * heads * dim), k(format, tokens * key_heads * dim), v(format, tokens * key_heads * dim);
  Values out(format, tokens * heads * dim), grad(format, tokens * heads * dim), dq(format, tokens * heads * dim);
  Values dk(format, tokens * key_heads * dim), dv(format, tokens * key_heads * dim);
  Many<float> lse(heads * tokens), partial(heads * tokens * 2 * dim), sinks = {0.5f, -1, 2, 0};
  lorafit_attention a = {};
  a.type = format, a.threads = threads, a.tokens = tokens, a.documents = (int64_t)bounds.size() - 1, a.heads = heads;
  a.key_heads = key_heads, a.dim = dim, a.window = window, a.bounds = bounds.data(), a.scale = 0.7f;
  a.softcap = softcap, a.sinks = softcap ? sinks.data() : nullptr;
  a.q = q.at(), a.k = k.at(), a.v = v.at(), a.q_apart = a.out_apart = a.grad_out_apart = a.dq_apart = heads * dim;
  a.k_apart = a.v_apart = a.dk_apart = a.dv_apart = key_heads * dim;
  a.out = out.at(), a.lse = lse.data(), a.grad_out = grad.at(), a.dq = dq.at(), a.dk = dk.at(), a.dv = dv.at();
  for (int32_t backward : {0, 1, 2}) {
    a.room = lorafit_attention_room(&a, backward > 0);
    Many<char> memory(a.room * threads + 64);
    a.memory = memory.data() + (64 - (uintptr_t)memory.data() % 64);
    a.partial = backward == 2 ? partial.data() : nullptr;
    DEMAND((backward ? lorafit_attend_backward(&a) : lorafit_attend(&a)) == 0);
  }
  for (size_t document = 0; document + 1 < bounds.size(); document++)
    for (int64_t t = bounds[document]; t < bounds[document + 1]; t += 7)
      for (int64_t h = 0; h < heads; h++) {
        double total = softcap ? exp(sinks[h]) : 0;
        Many<double> wanted(dim);
        for (int64_t u = bounds[document]; u <= t; u++) {
          if (window && t - u >= window) continue;
          double score = 0;
          for (int64_t d = 0; d < dim; d++)
            score += q[(t * heads + h) * dim + d] * k[(u * key_heads + h / 2) * dim + d];
          score *= a.scale;
          const double weight = exp(softcap ? softcap * tanh(score / softcap) : score);
          total += weight;
          for (int64_t d = 0; d < dim; d++) wanted[d] += weight * v[(u * key_heads + h / 2) * dim + d];
        }
        for (int64_t d = 0; d < dim; d++)
          DEMAND(near(out[(t * heads + h) * dim + d], wanted[d] / total, format, 0.3));
      }
}

int main() {
  std::istringstream paths(lorafit_paths());
  for (std::string path; std::getline(paths, path, ',');) {
    int32_t format = -1;
    DEMAND(lorafit_use(path.c_str()) == 0 && path == lorafit_path());
    DEMAND(lorafit_use("none") == 1);
    random_bits.seed(1);
    for (format = 0; format <= LORAFIT_INT8; format++) {
      const int64_t elements = lorafit::block_of(format).elements;
      if (!elements) continue;
      Sum sum;
      for (int64_t rows : {1, 2, 7})
        for (int64_t blocks : {1, 5, 31, 33, 65}) {
          if (elements > 1 && blocks > 5) break; /* the longer rows are for plain numbers */
          weights(format, false, rows, blocks * elements, sum);
          if (format == LORAFIT_NF4) weights(format, true, rows, blocks * elements, sum);
          if (format >= LORAFIT_NF4) quantise(format, rows, blocks * elements, sum);
        }
      printf("%s %d %016llx\n", path.c_str(), format, (unsigned long long)sum.value);
    }
    for (format = LORAFIT_F32; format <= LORAFIT_BF16; format++)
      for (int threads = 1; threads <= 2; threads++) {
        for (int64_t n : {1, 15, 16, 33, 100}) rows(format, n, threads);
        for (int64_t dim : {2, 16, 20, 80})
          for (int64_t window : {0, 5, 70})
            for (float softcap : {0.0f, 3.0f}) attention(format, dim, {0, 1, 66, 210}, window, softcap, threads);
      }
  }
}
