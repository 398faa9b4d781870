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
  }
}
