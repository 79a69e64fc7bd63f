// Attention of a few queries to a long cache, at the speed at which memory delivers K and V.
//
// Arguments are those of `attend` in cpu_attention.py; a row has R = G * T queries for each KV head.
// Slots are divided into parts of PART, which any thread computes, and which are combined in order.
// Within a part the softmax is online, a tile at a time (FlashAttention, arXiv 2205.14135). What is
// computed for a query does not depend on the other queries: it is bit for bit the same among them.
// Whoever compiles this puts definitions of D (a multiple of W) and KV before it.
#include <algorithm>
#include <cmath>

constexpr int W = 16, N = D / W;  // floats of a vector, which compilers split where need be
constexpr int TILE = 32, PART = 1024, LINE = 64 / sizeof(KV), LINES = D / LINE;
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
static inline F pairs(F a, F b) {  // a0 + a1, a2 + a3, .. b0 + b1, ..
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
static inline F exp(F x) {  // of x <= 0: 2^n * e^r with |r| <= ln(2) / 2, and e^r by its series
  x = x < -87.0f ? F{} - 87.0f : x;
  I n = __builtin_convertvector(x * 1.44269504f - 0.5f, I);
  F m = __builtin_convertvector(n, F), r = x - m * 0.693359375f + m * 2.12194440e-4f;
  F y = F{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * r + c;
  return (F)((I)y + (n << 23));
}
static inline void fetch(const KV* slot, int i, int n) {  // the i-th of n shares, one per query
  for (int l = LINES * i / n; l < LINES * (i + 1) / n; l++)
    __builtin_prefetch(slot + l * LINE, 0, 2);
}
template <class X>  // scores of W slots
static inline F score(const float* q, const X* k, const KV* next, int r, int R) {
  F dot[W];
#pragma GCC unroll 16
  for (int j = 0; j < W; j++) {
    dot[j] = load(q) * load(k + j * D);
    for (int d = W; d < int(D); d += W) dot[j] += load(q + d) * load(k + j * D + d);
    fetch(next + j * D, r, R);
  }
#pragma GCC unroll 4
  for (int n = W / 2; n; n /= 2)
    for (int j = 0; j < n; j++) dot[j] = pairs(dot[2 * j], dot[2 * j + 1]);
  return dot[0];
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
template <int M, class X>  // of M queries
static inline void add_values(State* s, const X* v, const KV* next, int r, int R) {
  F y[M][N];
  for (int i = 0; i < M * N; i++) y[i / N][i % N] = s[i / N].y[i % N];
  for (int j = 0; j < TILE; j++, fetch(next + (j - 1) * D, r / 2, (R + 1) / 2))
    for (int d = 0; d < N; d++) {
      F x = load(v + j * D + d * W);
      for (int i = 0; i < M; i++) y[i][d] += ((float*)s[i].w)[j] * x;
    }
  for (int i = 0; i < M * N; i++) s[i / N].y[i % N] = y[i / N][i % N];
}
// States of the queries of one row and head after its slots first .. last - 1.
static void part(const Call& c, const float* q, const KV* k, const KV* v, State* states,
                 const bool* mask, int64_t start, int64_t first, int64_t last) {
  constexpr I lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int newest = start + c.T - 1, turn = newest % c.S, R = c.R;  // slots up to `turn`: latest turn
  F buffer[2][TILE * N];
  for (int r = 0; r < R; r++) states[r] = {};
  for (int slot = first; slot < last; slot += TILE) {
    const KV *keys = k + slot * int64_t(D), *values = v + slot * int64_t(D);
    auto look = [&](const auto* keys_now, const auto* values_now) {
      for (int r = 0; r < R; r++) {
        int at = start + r % c.T, oldest = std::max<int64_t>(at - c.window + 1, 0);
        for (int i = 0; i < TILE; i += W) {
          F x = score(q + r * D, keys_now + i * D, keys + (TILE + i) * D, r, R);
          for (int l = 0; c.cap && l < W; l++) x[l] = c.cap * std::tanh(x[l] / c.cap);
          I p = lane + (slot + i - turn);  // position, counted from the newest
          p = (p > 0 ? p - int(c.S) : p) + newest;
          I seen = (p <= at) & (p >= oldest);
          for (int l = 0, j = slot + i; mask && l < W; l++, j++)
            seen[l] = -(j < c.S && mask[r * c.S + j]);
          states[r].w[i / W] = seen ? x : F{} + HIDDEN;
        }
      }
      for (int r = 0; r < R; r++) softmax(states[r]);
      int r = 0;  // two queries for each load of V
      for (; r + 1 < R; r += 2) add_values<2>(states + r, values_now, values + TILE * D, r, R);
      if (r < R) add_values<1>(states + r, values_now, values + TILE * D, r, R);
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
