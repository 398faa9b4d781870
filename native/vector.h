/* Elementary functions on Floats, and rows of fp32 or bf16 read and written as Floats. */
#pragma once

namespace {

/* e^x within 2 ulp between -87 and 88; 0 far below, NaN of NaN. Cody and Waite's reduction, Taylor's series. */
INLINE Floats exponential(Floats x) {
  const Floats bounded = minimum(splat(88.0f), maximum(splat(LOWEST_POWER), x));
  const Floats n = nearest(mul(bounded, splat(1.44269504f)));
  Floats r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  Floats p = splat(1.0f / 720);
  for (const float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
  return times_power(p, n);
}

INLINE Floats sigmoid(Floats x) { return reciprocal(add(splat(1), exponential(sub(splat(0), x)))); }

/* tanh: below 1 by Pade's approximant of degrees 7 and 6, which is right there to a float's last bits. */
INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats square = mul(x, x);
  Floats above = add(square, splat(378)), below = fma(square, splat(28), splat(3150));
  above = fma(fma(above, square, splat(17325)), square, splat(135135));
  below = fma(fma(below, square, splat(62370)), square, splat(135135));
  const Floats far = fma(splat(-2), reciprocal(add(splat(1), exponential(add(x, x)))), splat(1));
  return between(x, -1, 1, div(mul(x, above), below), far);
}

alignas(64) constexpr float COUNTING[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

/* The largest of all; NaN may be lost. */
INLINE float highest(Floats a) {
  float of[WIDTH];
  store(of, a);
  for (int i = 1; i < WIDTH; i++) of[0] = of[i] > of[0] ? of[i] : of[0];
  return of[0];
}

INLINE Floats load_any(const float *from) { return load(from); }
INLINE Floats load_any(const uint16_t *from) { return load_bf16((const uint8_t *)from); }
INLINE void store_any(float *to, Floats value) { store(to, value); }
INLINE void store_any(uint16_t *to, Floats value) { store_bf16(to, value); }
INLINE void store_one(float *to, float value) { *to = value; }
INLINE void store_one(uint16_t *to, float value) { *to = to_bf16(value); }
INLINE float load_one(const float *from) { return *from; }
INLINE float load_one(const uint16_t *from) { return bits_to_float((uint32_t)*from << 16); }

/* Floats i, i + 1, ... of a row of n; those past its end read as 0 and are not written. */
template <class X> INLINE Floats get(const X *row, int64_t i, int64_t n) {
  if (i + WIDTH <= n) return load_any(row + i);
  X some[WIDTH] = {};
  memcpy(some, row + i, (n - i) * sizeof(X));
  return load_any(some);
}
template <class X> INLINE void put(X *row, int64_t i, int64_t n, Floats value) {
  if (i + WIDTH <= n) return store_any(row + i, value);
  X some[WIDTH];
  store_any(some, value);
  memcpy(row + i, some, (n - i) * sizeof(X));
}

} // namespace
