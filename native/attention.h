/* Attention within documents, forward and backward, tile by tile: no matrix of all scores ever exists.

   Scores are computed transposed, S^T (keys, queries), so that a query's softmax runs down a lane and what goes into
   the next product lies as it is multiplied:

     S^T = K Q^T    P^T = exp(S^T - lse)    O^T = V^T P^T
     dP^T = V dO^T    dS = P * (dP - delta)    dV = P^T dO    dK = dS^T Q    dQ^T = K^T dS^T    delta = sum(dO * O)

   Source: Dao et al. 2022, "FlashAttention", arXiv:2205.14135, algorithms 1 and 4; the layout is ours. */
#pragma once
#include "product.h"

namespace {

constexpr int64_t TILE = 64;   /* queries and keys of a tile */
constexpr int64_t CORNER = 16; /* keys of a tile on the diagonal, where half of the scores are hidden */
constexpr float NEVER = 1e30f;

INLINE int64_t up_to(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Parts of one block of memory, each at a multiple of 64 bytes; counts without giving where there is no block. */
struct Room {
  char *start;
  int64_t used = 0;
  template <class T> T *take(int64_t count) {
    T *const part = start ? (T *)(start + used) : nullptr;
    used = up_to(used + count * (int64_t)sizeof(T), 64);
    return part;
  }
};

/* Buffers of a tile of queries, and of the keys of a document. */
template <class E> struct Buffers {
  typedef typename E::Item Item;
  int64_t depth, wide, keys; /* dim and number of keys in whole groups, dim in whole Floats */
  Item *k, *v, *k_columns, *v_columns;                   /* (keys, depth), and transposed (dim, keys) */
  Item *rows, *q_lanes, *go_lanes, *q_groups, *go_groups; /* (TILE, depth); (depth / G, TILE, G); (TILE / G, wide, G) */
  Item *p_rows, *ds_rows, *p_groups;                     /* (TILE, TILE); (TILE / G, TILE, G), of dS in the backward */
  float *s, *dp, *columns, *lse, *delta;                 /* (TILE, TILE) both; (dim, TILE): O^T or dQ^T; (TILE,) both */
  float *dk, *dv;                                        /* (keys, wide) */

  Buffers(Room &room, const lorafit_attention &a, int64_t count, bool backward)
      : depth(up_to(a.dim, E::GROUP)), wide(up_to(a.dim, WIDTH)), keys(up_to(count, E::GROUP)) {
    k = room.take<Item>(keys * depth);
    v = room.take<Item>(backward ? keys * depth : 0);
    k_columns = room.take<Item>(backward ? keys * a.dim : 0);
    v_columns = room.take<Item>(backward ? 0 : keys * a.dim);
    rows = room.take<Item>(up_to(count > TILE ? count : TILE, E::GROUP) * (depth > wide ? depth : wide));
    q_lanes = room.take<Item>(depth * TILE);
    go_lanes = room.take<Item>(backward ? depth * TILE : 0);
    q_groups = room.take<Item>(backward ? TILE * wide : 0);
    go_groups = room.take<Item>(backward ? TILE * wide : 0);
    p_rows = room.take<Item>(TILE * TILE);
    ds_rows = room.take<Item>(TILE * TILE);
    p_groups = room.take<Item>(TILE * TILE);
    s = room.take<float>(TILE * TILE);
    dp = room.take<float>(TILE * TILE);
    columns = room.take<float>((a.dim > wide ? a.dim : wide) * TILE);
    lse = room.take<float>(TILE);
    delta = room.take<float>(TILE);
    dk = room.take<float>(backward ? keys * wide : 0);
    dv = room.take<float>(backward ? keys * wide : 0);
  }

  /* to (padded, apart) = `count` rows of `dim` values, zeros behind and below them. */
  template <class X>
  void read_rows(Item *to, int64_t apart, int64_t padded, const X *from, int64_t from_apart, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < padded; i++) {
      const int64_t n = i < count ? dim : 0;
      if (n) E::copy(to + i * apart, from + i * from_apart, n);
      memset(to + i * apart + n, 0, (apart - n) * sizeof(Item));
    }
  }

  /* to (dim, keys) = rows (keys, depth)^T, for A of a product whose depth are the keys. */
  void transpose_keys(Item *to, const Item *from, int64_t dim) {
    interleave(rows, from, depth, dim, keys);
    transpose(rows, dim, to, keys / E::GROUP, keys / E::GROUP, dim);
  }

  /* to (count / GROUP, columns, GROUP) = from (count, columns) with rows `apart`. */
  void interleave(Item *to, const Item *from, int64_t apart, int64_t columns, int64_t count) {
    for (int64_t i = 0; i < count; i += E::GROUP)
      for (int64_t j = 0; j < columns; j++)
        for (int g = 0; g < E::GROUP; g++) to[i * columns + j * E::GROUP + g] = from[(i + g) * apart + j];
  }

  /* lanes (depth / GROUP, TILE, GROUP) = rows (TILE, apart)^T. */
  void to_lanes(Item *lanes, int64_t apart) { transpose(rows, apart / E::GROUP, lanes, TILE, TILE, depth / E::GROUP); }
};

/* Scores of a tile as the softmax takes them: scaled, capped, and -infinity where a query may not look. */
struct Scores {
  const lorafit_attention &a;
  int64_t query, key;
  bool edge;
  Scores(const lorafit_attention &of, int64_t first_query, int64_t queries, int64_t first_key, int64_t keys)
      : a(of), query(first_query), key(first_key),
        edge(first_key + keys - 1 > first_query || (of.window && first_query + queries - first_key > of.window)) {}
  INLINE Floats scaled(Floats s) const {
    s = mul(s, splat(a.scale));
    return a.softcap ? mul(splat(a.softcap), hyperbolic_tangent(mul(s, splat(1 / a.softcap)))) : s;
  }
  /* Of key row `row` and the queries from lane `column` on. */
  INLINE Floats seen(Floats value, int64_t row, int64_t column, float hidden) const {
    if (!edge) return value;
    const float first = (float)(key + row - query - column);
    return between(load(COUNTING), first, a.window ? first + (float)a.window : NEVER, value, splat(hidden));
  }
};
/* The first key that a query sees, in whole tiles from `base` on. */
INLINE int64_t first_key(const lorafit_attention &a, int64_t query, int64_t base) {
  const int64_t first = a.window && query >= a.window ? query - a.window + 1 : 0;
  return base + (first > base ? (first - base) / TILE * TILE : 0);
}

/* Keys of the tile that begins at `key`, for a tile of queries from `query` on. */
INLINE int64_t keys_from(int64_t key, int64_t query, int64_t queries) {
  const int64_t most = key < query ? TILE : CORNER, rest = query + queries - key;
  return rest < most ? rest : most;
}

/* Queries first to last of a document, for the query heads that share key head `head`. */
template <class X> void attend(const lorafit_attention &a, int64_t document, int64_t head, int64_t first, int64_t last,
                               char *memory) {
  typedef typename Multiplied<X>::By E;
  constexpr int64_t G = E::GROUP;
  const int64_t start = a.bounds[document], shared = a.heads / a.key_heads, base = first_key(a, first, 0);
  Room room{memory};
  Buffers<E> b(room, a, last - base, false);
  b.read_rows(b.k, b.depth, b.keys, (const X *)a.v + (start + base) * a.v_apart + head * a.dim, a.v_apart, last - base,
              a.dim);
  b.transpose_keys(b.v_columns, b.k, a.dim);
  b.read_rows(b.k, b.depth, b.keys, (const X *)a.k + (start + base) * a.k_apart + head * a.dim, a.k_apart, last - base,
              a.dim);
  for (int64_t h = head * shared; h < (head + 1) * shared; h++)
    for (int64_t q = first; q < last; q += TILE) {
      const int64_t queries = last - q < TILE ? last - q : TILE;
      b.read_rows(b.rows, b.depth, TILE, (const X *)a.q + (start + q) * a.q_apart + h * a.dim, a.q_apart, queries, a.dim);
      b.to_lanes(b.q_lanes, b.depth);
      float *const most = b.lse, *const sum = b.delta;
      for (int64_t i = 0; i < TILE; i++) {
        most[i] = a.sinks ? a.sinks[h] : -NEVER;
        sum[i] = a.sinks ? 1 : 0;
      }
      const int64_t begin = first_key(a, q, base);
      for (int64_t key = begin, keys; key < q + queries; key += keys) {
        keys = keys_from(key, q, queries);
        const int64_t left = key > q ? (key - q) / WIDTH * WIDTH : 0, columns = queries - left;
        product<E>(b.k + (key - base) * b.depth, b.depth, b.q_lanes + left * G, TILE, b.s + left, TILE, keys, columns,
                   b.depth / G, false);
        const Scores scores(a, q, queries, key, keys);
        for (int64_t c = left; c < queries; c += WIDTH) {
          const Floats before = load(most + c);
          Floats now = before;
          for (int64_t r = 0; r < keys; r++) {
            const Floats s = scores.seen(scores.scaled(load(b.s + r * TILE + c)), r, c, -INFINITY);
            store(b.s + r * TILE + c, s);
            now = maximum(now, s);
          }
          Floats total = splat(0);
          for (int64_t r = 0; r < keys; r += G) {
            const Floats p = exponential(sub(load(b.s + r * TILE + c), now));
            const Floats next =
                G > 1 && r + 1 < keys ? exponential(sub(load(b.s + (r + 1) * TILE + c), now)) : splat(0);
            total = add(total, add(p, next));
            E::store_group(b.p_groups + r * TILE + c * G, p, next);
          }
          if (differ(before, now)) {
            const Floats shrunk = exponential(sub(before, now));
            store(most + c, now);
            store(sum + c, mul(load(sum + c), shrunk));
            for (int64_t d = 0; d < a.dim && key > begin; d++)
              store(b.columns + d * TILE + c, mul(load(b.columns + d * TILE + c), shrunk));
          }
          store(sum + c, add(load(sum + c), total));
        }
        product<E>(b.v_columns + key - base, b.keys, b.p_groups + left * G, TILE, b.columns + left, TILE, a.dim, columns,
                   up_to(keys, G) / G, key > begin);
      }
      for (int64_t c = 0; c < queries; c += WIDTH) {
        const Floats by = div(splat(1), load(sum + c));
        for (int64_t d = 0; d < a.dim; d++) store(b.columns + d * TILE + c, mul(load(b.columns + d * TILE + c), by));
      }
      float *const rows = (float *)b.s; /* TILE rows at a time of TILE values */
      for (int64_t d = 0; d < a.dim; d += TILE) {
        const int64_t some = a.dim - d < TILE ? a.dim - d : TILE;
        transpose(b.columns + d * TILE, TILE, rows, TILE, some, TILE);
        for (int64_t i = 0; i < queries; i++) {
          X *const to = (X *)a.out + (start + q + i) * a.out_apart + h * a.dim + d;
          for (int64_t j = 0; j < some; j += WIDTH) put(to, j, some, load(rows + i * TILE + j));
        }
      }
      for (int64_t i = 0; i < queries; i++) a.lse[h * a.tokens + start + q + i] = most[i] + logf(sum[i]);
    }
}

/* Gradients of a document for the query heads first to last of those that share key head `head`. Where a.partial is
   null the heads are all of them and dk and dv are written; else their sums go there: (heads, tokens, 2, dim). */
template <class X> void attend_backward(const lorafit_attention &a, int64_t document, int64_t head, int64_t first,
                                        int64_t last, char *memory) {
  typedef typename Multiplied<X>::By E;
  typedef typename E::Item Item;
  constexpr int64_t G = E::GROUP;
  const int64_t start = a.bounds[document], length = a.bounds[document + 1] - start;
  Room room{memory};
  Buffers<E> b(room, a, length, true);
  b.read_rows(b.k, b.depth, b.keys, (const X *)a.k + start * a.k_apart + head * a.dim, a.k_apart, length, a.dim);
  b.read_rows(b.v, b.depth, b.keys, (const X *)a.v + start * a.v_apart + head * a.dim, a.v_apart, length, a.dim);
  b.transpose_keys(b.k_columns, b.k, a.dim);
  memset(b.dk, 0, b.keys * b.wide * sizeof(float));
  memset(b.dv, 0, b.keys * b.wide * sizeof(float));
  for (int64_t h = first; h < last; h++)
    for (int64_t q = 0; q < length; q += TILE) {
      const int64_t queries = length - q < TILE ? length - q : TILE;
      const X *const go = (const X *)a.grad_out + (start + q) * a.grad_out_apart + h * a.dim;
      const X *const out = (const X *)a.out + (start + q) * a.out_apart + h * a.dim;
      const int64_t apart = b.depth > b.wide ? b.depth : b.wide;
      b.read_rows(b.rows, apart, TILE, (const X *)a.q + (start + q) * a.q_apart + h * a.dim, a.q_apart, queries, a.dim);
      b.to_lanes(b.q_lanes, apart);
      b.interleave(b.q_groups, b.rows, apart, b.wide, TILE);
      b.read_rows(b.rows, apart, TILE, go, a.grad_out_apart, queries, a.dim);
      b.to_lanes(b.go_lanes, apart);
      b.interleave(b.go_groups, b.rows, apart, b.wide, TILE);
      for (int64_t i = 0; i < TILE; i++) {
        b.lse[i] = i < queries ? a.lse[h * a.tokens + start + q + i] : NEVER;
        Floats dot = splat(0);
        for (int64_t j = 0; i < queries && j < a.dim; j += WIDTH)
          dot = fma(get(go + i * a.grad_out_apart, j, a.dim), get(out + i * a.out_apart, j, a.dim), dot);
        b.delta[i] = sum(dot);
      }
      const int64_t begin = first_key(a, q, 0);
      for (int64_t key = begin, keys; key < q + queries; key += keys) {
        keys = keys_from(key, q, queries);
        const int64_t left = key > q ? (key - q) / WIDTH * WIDTH : 0, columns = queries - left;
        product<E>(b.k + key * b.depth, b.depth, b.q_lanes + left * G, TILE, b.s + left, TILE, keys, columns,
                   b.depth / G, false);
        product<E>(b.v + key * b.depth, b.depth, b.go_lanes + left * G, TILE, b.dp + left, TILE, keys, columns,
                   b.depth / G, false);
        const Scores scores(a, q, queries, key, keys);
        for (int64_t c = left; c < queries; c += WIDTH) {
          const Floats lse = load(b.lse + c), delta = load(b.delta + c);
          for (int64_t r = 0; r < keys; r += G) {
            Floats ds[2] = {splat(0), splat(0)};
            for (int64_t i = r; i < r + G && i < keys; i++) {
              const Floats s = scores.scaled(load(b.s + i * TILE + c));
              const Floats p = scores.seen(exponential(sub(s, lse)), i, c, 0);
              Floats d = mul(mul(p, sub(load(b.dp + i * TILE + c), delta)), splat(a.scale));
              if (a.softcap) {
                const Floats slope = mul(s, splat(1 / a.softcap));
                d = mul(d, sub(splat(1), mul(slope, slope)));
              }
              E::store_row(b.p_rows + i * TILE + c, p);
              E::store_row(b.ds_rows + i * TILE + c, d);
              ds[i - r] = d;
            }
            E::store_group(b.p_groups + r * TILE + c * G, ds[0], ds[1]);
          }
        }
        const int64_t depth = up_to(columns, G) / G;
        const Item *const go_groups = b.go_groups + left * b.wide, *const q_groups = b.q_groups + left * b.wide;
        product<E>(b.p_rows + left, TILE, go_groups, b.wide, b.dv + key * b.wide, b.wide, keys, b.wide, depth, true);
        product<E>(b.ds_rows + left, TILE, q_groups, b.wide, b.dk + key * b.wide, b.wide, keys, b.wide, depth, true);
        product<E>(b.k_columns + key, b.keys, b.p_groups + left * G, TILE, b.columns + left, TILE, a.dim, columns,
                   up_to(keys, G) / G, key > begin);
      }
      for (int64_t d = 0; d < a.dim; d += TILE) {
        const int64_t some = a.dim - d < TILE ? a.dim - d : TILE;
        transpose(b.columns + d * TILE, TILE, b.s, TILE, some, TILE);
        for (int64_t i = 0; i < queries; i++) {
          X *const to = (X *)a.dq + (start + q + i) * a.dq_apart + h * a.dim + d;
          for (int64_t j = 0; j < some; j += WIDTH) put(to, j, some, load(b.s + i * TILE + j));
        }
      }
    }
  for (int64_t i = 0; i < length; i++) {
    X *const dk = (X *)a.dk + (start + i) * a.dk_apart + head * a.dim;
    X *const dv = (X *)a.dv + (start + i) * a.dv_apart + head * a.dim;
    float *const partial = a.partial ? a.partial + (first * a.tokens + start + i) * 2 * a.dim : nullptr;
    for (int64_t j = 0; j < a.dim; j += WIDTH) {
      const Floats k = load(b.dk + i * b.wide + j), v = load(b.dv + i * b.wide + j);
      if (partial) {
        put(partial, j, a.dim, k);
        put(partial + a.dim, j, a.dim, v);
      } else {
        put(dk, j, a.dim, k);
        put(dv, j, a.dim, v);
      }
    }
  }
}

/* One token's dk and dv from the partial sums of each query head, in their order. */
template <class X> void add_partial(const lorafit_attention &a, int64_t token) {
  const int64_t shared = a.heads / a.key_heads;
  for (int64_t head = 0; head < a.key_heads; head++)
    for (int64_t j = 0; j < a.dim; j += WIDTH) {
      Floats k = splat(0), v = splat(0);
      for (int64_t h = head * shared; h < (head + 1) * shared; h++) {
        const float *const partial = a.partial + (h * a.tokens + token) * 2 * a.dim;
        k = add(k, get(partial, j, a.dim));
        v = add(v, get(partial + a.dim, j, a.dim));
      }
      put((X *)a.dk + token * a.dk_apart + head * a.dim, j, a.dim, k);
      put((X *)a.dv + token * a.dv_apart + head * a.dim, j, a.dim, v);
    }
}

/* Bytes that attend or attend_backward need for `keys` keys. */
template <class X> int64_t attention_room(const lorafit_attention &a, int64_t keys, bool backward) {
  Room room{nullptr};
  Buffers<typename Multiplied<X>::By>(room, a, keys, backward);
  return room.used;
}

} // namespace
