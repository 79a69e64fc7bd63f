// Attention of a few queries to a long cache, at the speed at which memory delivers K and V.
//
// Arguments are those of `attend` in cpu_attention.py; a row has R = G * T queries for each KV head.
// Slots are divided into parts of PART, which any thread computes, and which are combined in order.
// Within a part the softmax is online, a tile at a time (FlashAttention, arXiv 2205.14135). What is
// computed for a query does not depend on the other queries: it is bit for bit the same among them.
// Whoever compiles this puts definitions of D (a multiple of W) and KV before it.
#include <algorithm>
#include <cmath>
#include <utility>

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int SUMS = std::max(W, 8);  // vectors that grow at the same time, all in registers
constexpr int N = D / W, TILE = 32, PART = 1024, LINE = 64 / sizeof(KV);
constexpr float HIDDEN = -1e30f;
typedef float F __attribute__((vector_size(4 * W), may_alias));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t U __attribute__((vector_size(2 * W), may_alias));
struct Call { int64_t B, H, R, T, S, n_masks, window; float cap; int n_threads; };
struct State { F m = F{} + HIDDEN, l{}, y[N]{}; F w[TILE / W]; };  // largest score, sums; weights

static inline F load(const float* p) { return *(const F*)p; }
static inline F load(const uint16_t* p) {  // bfloat16: the upper half of a float
  return (F)(__builtin_convertvector(*(const U*)p, I) << 16);
}
constexpr int left(int n, int i) {  // of two floats that are added: in fours, then whole fours
  return n < 4 ? i / 4 * 4 + i % 2 * 2 + i % 4 / 2 * W : i / 4 * 8 + i % 4;
}
template <int n, int... i>
static inline F pairs(F a, F b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, left(n, i)...) +
         __builtin_shufflevector(a, b, left(n, i) + (n < 4 ? 1 : 4)...);
}
template <int n, int step = 1>  // of n vectors, each in a place of its own when W are reached
static inline F sums(F* x) {
  for (int j = 0; j < n / 2; j++)
    x[j] = pairs<step>(x[2 * j], x[2 * j + 1], std::make_integer_sequence<int, W>{});
  if constexpr (n > 2) return sums<n / 2, 2 * step>(x);
  return *x;
}
static inline F exp(F x) {  // of x <= 0: 2^n * e^r with |r| <= ln(2) / 2, and e^r by its series
  x = x < -87.0f ? F{} - 87.0f : x;
  I n = __builtin_convertvector(x * 1.44269504f - 0.5f, I);
  F m = __builtin_convertvector(n, F), r = x - m * 0.693359375f + m * 2.12194440e-4f;
  F y = F{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
  return (F)((I)y + (n << 23));
}
struct Ahead {  // the share of the next tile that queries r and r + 1 of R fetch, bit by bit
  const KV *line, *end;
  int step;  // as much as they read meanwhile, or less, where there are other queries
  Ahead(const KV* tile, int r, int R) {
    int i = r / 2, n = (R + 1) / 2, lines = TILE * D / LINE;
    line = tile + lines * i / n * LINE, end = tile + lines * (i + 1) / n * LINE;
    step = std::max(SUMS * W / LINE / (n * std::min(R - r, 2)), 1) * LINE;
  }
  void fetch() {
    for (auto to = std::min(line + step, end); line < to; line += LINE)
      __builtin_prefetch(line, 0, 2);
  }
};
template <int M, class X>  // of M queries
static inline void score(State* s, const float* q, const X* k, Ahead next) {
  constexpr int P = std::min(W, SUMS / M);  // slots at a time
  for (int i = 0; i < TILE / W; i++) {
    F some[M][W / P];
    for (int h = 0; h < W / P; h++, k += P * D) {
      F dot[M][P] = {};
      for (int d = 0; d < D; d += W, next.fetch())
        for (int j = 0; j < P; j++) {
          F x = load(k + j * D + d);
          for (int m = 0; m < M; m++) dot[m][j] += load(q + m * D + d) * x;
        }
      for (int m = 0; m < M; m++) some[m][h] = sums<P>(dot[m]);
    }
    for (int m = 0; m < M; m++) s[m].w[i] = sums<W / P, P>(some[m]);
  }
}
static inline void softmax(State& s) {  // of a tile's scores; what was before is rescaled
  F top = s.m;
  for (F w : s.w) top = w > top ? w : top;
  float m = *std::max_element((float*)&top, (float*)(&top + 1));
  F before = exp(s.m - m);
  if (m > s.m[0]) for (F& y : s.y) y *= before;
  s.m = F{} + m, s.l *= before;
  for (F& w : s.w) s.l += w = w > HIDDEN ? exp(w - m) : F{};
}
template <int M, int P, class X>  // P vectors of each slot, from the at-th on
static inline void add(State* s, const X* v, int at, Ahead& next) {
  F y[M][P];
  for (int i = 0; i < M * P; i++) y[i / P][i % P] = s[i / P].y[at + i % P];
  for (int j = 0; j < TILE; j++, next.fetch())
    for (int d = 0; d < P; d++) {
      F x = load(v + j * D + (at + d) * W);
      for (int m = 0; m < M; m++) y[m][d] += ((float*)s[m].w)[j] * x;
    }
  for (int i = 0; i < M * P; i++) s[i / P].y[at + i % P] = y[i / P][i % P];
}
template <int M, class X>  // of M queries
static inline void add_values(State* s, const X* v, Ahead next) {
  constexpr int P = std::min(N, SUMS / M), rest = N % P;
  for (int at = 0; at < N - rest; at += P) add<M, P>(s, v, at, next);
  if constexpr (rest) add<M, rest>(s, v, N - rest, next);
}
// States of the queries of one row and head after its slots first .. last - 1.
static void part(const Call& c, const float* q, const KV* k, const KV* v, State* states,
                 const bool* mask, int64_t start, int64_t first, int64_t last) {
  I lane;
  for (int l = 0; l < W; l++) lane[l] = l;
  int newest = start + c.T - 1, turn = newest % c.S, R = c.R;  // slots up to `turn`: latest turn
  F buffer[2][TILE * N];
  for (int r = 0; r < R; r++) states[r] = {};
  for (int slot = first; slot < last; slot += TILE) {
    const KV *keys = k + slot * int64_t(D), *values = v + slot * int64_t(D);
    auto look = [&](const auto* keys_now, const auto* values_now) {
      for (int r = 0; r < R; r += 2) {  // two queries for each load
        Ahead next(keys + TILE * D, r, R);
        if (r + 1 < R) score<2>(states + r, q + r * D, keys_now, next);
        else score<1>(states + r, q + r * D, keys_now, next);
      }
      for (int r = 0; r < R; r++) {
        int at = start + r % c.T, oldest = std::max<int64_t>(at - c.window + 1, 0);
        for (int i = 0; i < TILE; i += W) {
          F& x = states[r].w[i / W];
          for (int l = 0; c.cap && l < W; l++) x[l] = c.cap * std::tanh(x[l] / c.cap);
          I p = lane + (slot + i - turn);  // position, counted from the newest
          p = (p > 0 ? p - int(c.S) : p) + newest;
          I seen = (p <= at) & (p >= oldest) & (lane + (slot + i) < int(c.S));
          for (int l = 0, j = slot + i; mask && l < W; l++, j++)
            seen[l] = -(j < c.S && mask[r * c.S + j]);
          x = seen ? x : F{} + HIDDEN;
        }
        softmax(states[r]);
      }
      for (int r = 0; r < R; r += 2) {
        Ahead next(values + TILE * D, r, R);
        if (r + 1 < R) add_values<2>(states + r, values_now, next);
        else add_values<1>(states + r, values_now, next);
      }
    };
    bool whole = slot + TILE <= c.S, convert = sizeof(KV) < sizeof(float) && R > 2;
    if (whole && !convert) { look(keys, values); continue; }
    for (int i = 0; i < TILE * N; i++) {  // converted once for all queries, or padded
      bool there = whole || slot + i / N < c.S;
      buffer[0][i] = there ? load(keys + i * W) : F{};
      buffer[1][i] = there ? load(values + i * W) : F{};
    }
    look((const float*)buffer[0], (const float*)buffer[1]);
  }
}
extern "C" void attend(const Call& c, const float* q, const KV* k, const KV* v, float* out,
                       State* states, const int64_t* start, const bool* mask) {
  int64_t n_parts = (c.S + PART - 1) / PART;
#pragma omp parallel for schedule(dynamic) num_threads(c.n_threads)
  for (int64_t item = 0; item < c.B * c.H * n_parts; item++) {
    int64_t head = item / n_parts, from = item % n_parts * PART, b = head / c.H, at = start[b];
    bool any = mask || at + c.T > c.S;  // may be seen: also in a ring that has turned
    int64_t first = any ? 0 : std::max<int64_t>(at - c.window + 1, 0) / TILE * TILE;
    int64_t last = std::min(any ? c.S : at + c.T, from + PART), kv = head * c.S * D;
    const bool* own = mask ? mask + (c.n_masks == c.H ? head : b) * c.R * c.S : nullptr;
    part(c, q + head * c.R * D, k + kv, v + kv, states + item * c.R, own, at,
         std::max(first, from), last);
  }
#pragma omp parallel for num_threads(c.n_threads)
  for (int64_t i = 0; i < c.B * c.H * c.R; i++) {
    const State* s = states + i / c.R * n_parts * c.R + i % c.R;
    F m = s->m, sums = {}, y[N] = {};
    for (int64_t n = 1; n < n_parts; n++) m = s[n * c.R].m > m ? s[n * c.R].m : m;
    for (int64_t n = 0; n < n_parts; n++) {
      F share = exp(s[n * c.R].m - m);
      sums += share * s[n * c.R].l;
      for (int d = 0; d < N; d++) y[d] += share * s[n * c.R].y[d];
    }
    float sum = 0;
    for (int l = 0; l < W; l++) sum += sums[l];
    for (int d = 0; d < N; d++) ((F*)out)[i * N + d] = sum > 0 ? y[d] / sum : F{};
  }
}
