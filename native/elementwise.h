/* Element-wise parts of a layer and of the loss, a row at a time: read in fp32 or bf16, computed in fp32. */
#pragma once
#include "vector.h"

namespace {

template <class F> INLINE void each(int64_t n, F body) {
  for (int64_t i = 0; i < n; i += WIDTH) body(i);
}

/* to = x + by * delta, and out = to / rms(to) * weight; `to` may be null where delta is. -> 1 / rms. */
template <class X>
INLINE float norm_row(const X *x, const X *delta, float by, const float *weight, float eps, int64_t n, X *to, X *out) {
  Floats squares = splat(0);
  each(n, [&](int64_t i) {
    Floats value = get(x, i, n);
    if (delta) {
      put(to, i, n, fma(splat(by), get(delta, i, n), value));
      value = get(to, i, n); /* as it is kept, rounded */
    }
    squares = fma(value, value, squares);
  });
  const float scale = 1.0f / sqrtf(sum(squares) / (float)n + eps);
  const X *const kept = delta ? to : x;
  each(n, [&](int64_t i) { put(out, i, n, mul(mul(get(kept, i, n), splat(scale)), get(weight, i, n))); });
  return scale;
}

/* out = onto + d/dx of the norm: scale * (w g - x * scale^2 * mean(w g x)); onto may be null. */
template <class X>
INLINE void norm_row_backward(const X *grad, const X *x, const float *weight, float scale, const X *onto, int64_t n,
                              X *out) {
  Floats dots = splat(0);
  each(n, [&](int64_t i) { dots = fma(mul(get(grad, i, n), get(weight, i, n)), get(x, i, n), dots); });
  const Floats along = splat(-sum(dots) / (float)n * scale * scale * scale);
  each(n, [&](int64_t i) {
    const Floats d = mul(mul(get(grad, i, n), get(weight, i, n)), splat(scale));
    const Floats value = fma(get(x, i, n), along, d);
    put(out, i, n, onto ? add(get(onto, i, n), value) : value);
  });
}

/* One head: out = rotated(normed(x)), of `half` pairs (i, i + half); weight null: no norm; cos null: no rotation. */
template <class X>
INLINE void head_row(const X *x, const float *weight, float eps, const float *cos, const float *sin, int64_t half,
                     X *out) {
  float scale = 1.0f;
  if (weight) {
    Floats squares = splat(0);
    each(2 * half, [&](int64_t i) {
      const Floats value = get(x, i, 2 * half);
      squares = fma(value, value, squares);
    });
    scale = 1.0f / sqrtf(sum(squares) / (float)(2 * half) + eps);
  }
  each(half, [&](int64_t i) {
    Floats a = get(x, i, half), b = get(x + half, i, half);
    if (weight) {
      a = mul(mul(a, splat(scale)), get(weight, i, half));
      b = mul(mul(b, splat(scale)), get(weight + half, i, half));
    }
    const Floats c = cos ? get(cos, i, half) : splat(1), s = sin ? get(sin, i, half) : splat(0);
    put(out, i, half, sub(mul(a, c), mul(b, s)));
    put(out + half, i, half, fma(b, c, mul(a, s)));
  });
}

/* grad, of head_row's output, becomes that of x. */
template <class X>
INLINE void head_row_backward(X *grad, const X *x, const float *weight, float eps, const float *cos, const float *sin,
                              int64_t half) {
  const auto turned = [&](int64_t i, Floats &a, Floats &b) { /* back, to the gradient of what was rotated */
    a = get(grad, i, half), b = get(grad + half, i, half);
    const Floats c = cos ? get(cos, i, half) : splat(1), s = sin ? get(sin, i, half) : splat(0), back = a;
    a = fma(a, c, mul(b, s));
    b = sub(mul(b, c), mul(back, s));
    if (weight) a = mul(a, get(weight, i, half)), b = mul(b, get(weight + half, i, half));
  };
  float scale = 1.0f, along = 0.0f;
  if (weight) {
    Floats squares = splat(0), dots = splat(0);
    each(half, [&](int64_t i) {
      Floats a, b;
      turned(i, a, b);
      const Floats first = get(x, i, half), second = get(x + half, i, half);
      squares = fma(first, first, fma(second, second, squares));
      dots = fma(a, first, fma(b, second, dots));
    });
    scale = 1.0f / sqrtf(sum(squares) / (float)(2 * half) + eps);
    along = -sum(dots) / (float)(2 * half) * scale * scale * scale;
  }
  each(half, [&](int64_t i) {
    Floats a, b;
    turned(i, a, b);
    if (weight) {
      a = fma(get(x, i, half), splat(along), mul(a, splat(scale)));
      b = fma(get(x + half, i, half), splat(along), mul(b, splat(scale)));
    }
    put(grad, i, half, a);
    put(grad + half, i, half, b);
  });
}

struct Silu { /* x * sigmoid(x) */
  static INLINE Floats value(Floats x) { return mul(x, sigmoid(x)); }
  static INLINE Floats both(Floats x, Floats &slope) {
    const Floats s = sigmoid(x), y = mul(x, s);
    slope = fma(y, sub(splat(1), s), s);
    return y;
  }
};

struct Gelu { /* x / 2 * (1 + tanh(u)), u = sqrt(2 / pi) * (x + 0.044715 x^3): which is x * sigmoid(2 u) */
  static INLINE Floats twice(Floats x, Floats &slope) {
    const Floats square = mul(x, x);
    slope = fma(square, splat(0.2140644488f), splat(1.5957691216f)); /* of 2 u */
    return mul(x, fma(square, splat(0.0713548163f), splat(1.5957691216f)));
  }
  static INLINE Floats value(Floats x) {
    Floats slope;
    return mul(x, sigmoid(twice(x, slope)));
  }
  static INLINE Floats both(Floats x, Floats &slope) {
    Floats inner;
    const Floats s = sigmoid(twice(x, inner)), y = mul(x, s);
    slope = fma(mul(y, sub(splat(1), s)), inner, s);
    return y;
  }
};

/* out = act(gate) * up */
template <class A, class X> INLINE void gate_row(const X *gate, const X *up, int64_t n, X *out) {
  each(n, [&](int64_t i) { put(out, i, n, mul(A::value(get(gate, i, n)), get(up, i, n))); });
}

/* From grad of gate_row's output: gate and up become their gradients, grad the output anew. */
template <class A, class X> INLINE void gate_row_backward(X *grad, X *gate, X *up, int64_t n) {
  each(n, [&](int64_t i) {
    Floats slope;
    const Floats g = get(grad, i, n), u = get(up, i, n), y = A::both(get(gate, i, n), slope);
    put(gate, i, n, mul(mul(g, u), slope));
    put(up, i, n, mul(g, y));
    put(grad, i, n, mul(y, u));
  });
}

/* Cross-entropy of one token, z = softcap(multiplier * logits): -> logsumexp(z) - z[target]; if wanted, its gradient is
   written over the logits. */
template <class X>
INLINE float entropy_row(X *logits, int64_t target, float multiplier, float softcap, bool wanted, int64_t n) {
  const auto z_of = [&](Floats x) {
    x = mul(x, splat(multiplier));
    return softcap != 0 ? mul(splat(softcap), hyperbolic_tangent(mul(x, splat(1 / softcap)))) : x;
  };
  const auto z_at = [&](int64_t i) { /* -infinity past the row's end */
    const Floats z = z_of(get(logits, i, n));
    return i + WIDTH <= n ? z : between(load(COUNTING), 0, (float)(n - i), z, splat(-INFINITY));
  };
  Floats most = splat(-1e30f), total = splat(0);
  each(n, [&](int64_t i) { most = maximum(most, z_at(i)); });
  const float top = highest(most);
  each(n, [&](int64_t i) { total = add(total, exponential(sub(z_at(i), splat(top)))); });
  const float normalizer = top + logf(sum(total));
  const Floats hit = z_of(splat(load_one(logits + target)));
  float of[WIDTH];
  store(of, hit);
  const float loss = normalizer - of[0];
  if (!wanted) return loss;
  const auto slope = [&](Floats z) { /* of softcap and multiplier */
    const Floats part = mul(z, splat(1 / softcap));
    return softcap != 0 ? mul(splat(multiplier), sub(splat(1), mul(part, part))) : splat(multiplier);
  };
  store(of, mul(sub(exponential(sub(hit, splat(normalizer))), splat(1)), slope(hit)));
  each(n, [&](int64_t i) {
    const Floats z = z_of(get(logits, i, n));
    put(logits, i, n, mul(exponential(sub(z, splat(normalizer))), slope(z)));
  });
  store_one(logits + target, of[0]);
  return loss;
}

} // namespace
