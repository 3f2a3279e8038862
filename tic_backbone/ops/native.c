/* MSA-Conv on the CPU in float32: what is as large as the windows stays in one small workspace a thread.
 *
 * A vector holds one number of each of LANES neighbouring queries of a row. The rows of keys and values around a block
 * of queries are transposed once to (channel, column) and laid out so that a key's place in the window is the same
 * distance for all queries: what the LANES queries meet there are then LANES neighbouring floats. So scores, softmax
 * and weighted sum are plain vertical arithmetic. Backward makes the weights again; a key's gradient is summed over the
 * LANES queries in registers and then added in place. Blocks of rows that could meet on a key run one after the other,
 * so every sum has one order and is repeatable.
 *
 * Compiled at first use by native.py, linked with nothing: the OpenMP runtime is the one that torch brought.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 8
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif
#define COLUMNS 32 /* queries of a row that share the transposed keys */
#define MIN_ROWS 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int64_t i64;

typedef struct { /* mirrored in native.py */
    i64 batch, groups, width;              /* width: channels of a group */
    i64 height, length;                    /* of the output */
    i64 key_height, key_length;
    i64 kernel[2], stride[2], dilation[2], key_stride[2];
    i64 q[3], k[3], v[3];                  /* strides in floats: image, row, column; channels lie side by side */
    i64 threads;
    float scale;
} Problem;

typedef struct {
    int32_t query, weight; /* where the query lies in `tokens`, and its weight in a row of the window */
} Meeting;

typedef struct {
    i64 column;    /* of the key map; -1 after the last key */
    i64 from, to;  /* of the meetings */
} Key;

typedef struct { /* one thread's workspace for a block of queries */
    float *keys, *values;     /* (ring + 1, width, pitch): transposed rows; the last one is of zeros */
    float *query, *grad;      /* (width, LANES) */
    float *weights, *dscores; /* (window, LANES) */
    float *tokens;            /* (LANES, 2, width): each query and its output's gradient */
    float *zeros, *unused;    /* (width): a token beyond the border; what lanes without a query write */
    i64 *row;                 /* (ring): which row of the key map lies there */
    i64 *column;              /* (pitch): column of the key map; -1 beyond the border */
    i64 *place;               /* (kernel[1]): where the keys of the block's first query lie in a transposed row */
    i64 *at;                  /* (window): the same in `keys`, for one row of queries */
    i64 *key_row;             /* (kernel[0]): row of the key map, -1 beyond the border */
    i64 columns, ring, pitch, segment, window;
    i64 segments, copies;     /* of a transposed row, of a key in it: stride and key_stride in lowest terms */
    Meeting *meetings; /* (columns, kernel[1]): who meets the keys of one row, key by key; for backward */
    Key *met;          /* (columns / LANES, LANES * kernel[1] + 1): the keys of each LANES queries */
} Block;

INLINE i64 mod(i64 a, i64 b) { i64 m = a % b; return m < 0 ? m + b : m; }

INLINE i64 floor_(i64 a, i64 b) { return (a - mod(a, b)) / b; }

INLINE vec greater(vec a, vec b) {
    for (int l = 0; l < LANES; l++) a[l] = a[l] < b[l] ? b[l] : a[l];
    return a;
}

INLINE vec select_(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

INLINE vec exp_(vec x) { /* Cephes' expf; NaN stays NaN */
    x = select_((ivec)(x < -87.0f), (vec){0} - 87.0f, x);
    vec n = x * 1.44269504088896341f + 12582912.0f; /* adding 1.5 * 2^23 rounds */
    ivec power = (ivec)n << 23;
    n -= 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (vec)(power + (127 << 23));
}

/* Eight vectors' numbers in eight others: the first of each in the first. */
INLINE void transpose_square(const float *const *from, float *const *to) {
    vec t[LANES], u[LANES];
    for (int i = 0; i < LANES; i++) t[i] = *(const vec *)from[i];
    for (int i = 0; i < LANES; i += 2) {
        u[i] = SHUFFLE(t[i], t[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        u[i + 1] = SHUFFLE(t[i], t[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            t[i + 2 * j] = SHUFFLE(u[i + j], u[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            t[i + 2 * j + 1] = SHUFFLE(u[i + j], u[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; i++) {
        *(vec *)to[i] = SHUFFLE(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(vec *)to[i + 4] = SHUFFLE(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Eight tokens' channels to the first eight columns of `rows`. */
INLINE void to_rows(const float *const *token, i64 width, float *rows, i64 pitch) {
    i64 d = 0;
    for (; d + LANES <= width; d += LANES) {
        const float *from[LANES];
        float *to[LANES];
        for (int l = 0; l < LANES; l++) from[l] = token[l] + d, to[l] = rows + (d + l) * pitch;
        transpose_square(from, to);
    }
    for (; d < width; d++)
        for (int l = 0; l < LANES; l++) rows[d * pitch + l] = token[l][d];
}

/* And back, from rows of LANES. */
INLINE void to_tokens(const float *rows, i64 width, float *const *token) {
    i64 d = 0;
    for (; d + LANES <= width; d += LANES) {
        const float *from[LANES];
        float *to[LANES];
        for (int l = 0; l < LANES; l++) from[l] = rows + (d + l) * LANES, to[l] = token[l] + d;
        transpose_square(from, to);
    }
    for (; d < width; d++)
        for (int l = 0; l < LANES; l++) token[l][d] = rows[d * LANES + l];
}

INLINE i64 centre(const Problem *p, int axis, i64 out) { return out * p->stride[axis] / p->key_stride[axis]; }

/* Lays out a transposed row for the queries from `first` on. With stride / key_stride = a / b in lowest terms, query j
 * meets n places from its centre the key (a j + b dilation n) / b, rounded down. With b dilation n = a m + r, that is
 * (a (j + m) + r) / b: the row holds a segment for each rest r, where query j finds its key at j + m. */
static void columns_(const Problem *p, Block *b, i64 first) {
    i64 reach = p->kernel[1] / 2 * p->dilation[1], left = floor_(-b->copies * reach, b->segments);
    for (i64 e = 0; e < p->kernel[1]; e++) {
        i64 distance = b->copies * (e * p->dilation[1] - reach);
        b->place[e] = mod(distance, b->segments) * b->segment + floor_(distance, b->segments) - left;
    }
    for (i64 i = 0; i < b->pitch; i++) {
        i64 x = floor_(b->segments * (first + left + i % b->segment) + i / b->segment, b->copies);
        b->column[i] = x < 0 || x >= p->key_length ? -1 : x;
    }
    for (i64 i = 0; i < b->ring; i++) b->row[i] = -1; /* nothing transposed yet */
}

INLINE Key *met_(const Problem *p, const Block *b, i64 first, i64 j) {
    return b->met + (j - first) / LANES * (LANES * p->kernel[1] + 1);
}

/* Lists for backward which of each LANES queries meet a key, and at which place of their windows. */
static void meetings_(const Problem *p, Block *b, i64 first, i64 last) {
    i64 reach = p->kernel[1] / 2 * p->dilation[1], n = 0;
    for (i64 j = first; j < last; j += LANES) {
        Key *key = met_(p, b, first, j);
        i64 until = j + LANES < last ? j + LANES : last;
        for (i64 x = centre(p, 1, j) - reach; x <= centre(p, 1, until - 1) + reach; x++) {
            i64 from = n;
            for (i64 l = j; l < until && x >= 0 && x < p->key_length; l++) {
                i64 distance = x - centre(p, 1, l) + reach;
                if (distance >= 0 && distance <= 2 * reach && distance % p->dilation[1] == 0)
                    b->meetings[n++] = (Meeting){2 * (l - j) * p->width, distance / p->dilation[1] * LANES + l - j};
            }
            if (n > from) *key++ = (Key){x, from, n};
        }
        key->column = -1;
    }
}

/* Row y of the key map to (width, pitch), its columns as the block wants them. */
static void transpose_(const Problem *p, const Block *b, const float *map, const i64 *strides, i64 y, float *rows) {
    for (i64 i = 0; i < b->pitch; i += LANES) {
        const float *token[LANES];
        for (int l = 0; l < LANES; l++)
            token[l] = b->column[i + l] < 0 ? b->zeros : map + y * strides[1] + b->column[i + l] * strides[2];
        to_rows(token, p->width, rows + i, b->pitch);
    }
}

/* Sees to the transposed rows of the windows of output row i, and to where their keys lie. */
static void rows_(const Problem *p, Block *b, const float *k, const float *v, i64 i) {
    i64 size = p->width * b->pitch;
    for (i64 a = 0; a < p->kernel[0]; a++) {
        i64 y = centre(p, 0, i) + (a - p->kernel[0] / 2) * p->dilation[0], inside = y >= 0 && y < p->key_height;
        i64 slot = inside ? y % b->ring : b->ring;
        b->key_row[a] = inside ? y : -1;
        if (inside && b->row[slot] != y) {
            b->row[slot] = y;
            transpose_(p, b, k, p->k, y, b->keys + slot * size);
            transpose_(p, b, v, p->v, y, b->values + slot * size);
        }
        for (i64 e = 0; e < p->kernel[1]; e++) b->at[a * p->kernel[1] + e] = slot * size + b->place[e];
    }
}

/* scores[t] = x . rows at[t], for `m` places of the window whose sums fit the registers. */
INLINE void scores_of(const int m, i64 width, i64 pitch, const float *rows, const i64 *at, const float *x,
                      float *scores, vec *top) {
    vec sum[9];
    i64 from[9];
    for (int t = 0; t < m; t++) sum[t] = (vec){0}, from[t] = at[t];
    for (i64 d = 0; d < width; d++, rows += pitch, x += LANES) {
        vec y = *(const vec *)x;
        for (int t = 0; t < m; t++) sum[t] += y * *(const vec *)(rows + from[t]);
    }
    for (int t = 0; t < m; t++) *(vec *)(scores + t * LANES) = sum[t], *top = greater(*top, sum[t]);
}

/* All scores of a window; returns the greatest ones. */
static vec scores_(const Problem *p, const Block *b, const float *rows, const float *x, float *scores) {
    vec top = (vec){0} - INFINITY;
    for (i64 t = 0; t < b->window;) {
        i64 rest = b->window - t;
#define STEP(m) scores_of(m, p->width, b->pitch, rows, b->at + t, x, scores + t * LANES, &top), t += m
        if (rest == 9) STEP(9); /* a square of an odd number is one more than a multiple of eight */
        else if (rest >= 8) STEP(8);
        else if (rest >= 4) STEP(4);
        else STEP(1);
#undef STEP
    }
    return top;
}

/* sums[d] = sum over t of weights[t] * rows at[t], for `m` channels. */
INLINE void sums_of(const int m, i64 window, i64 pitch, const float *rows, const i64 *at, const float *weights,
                    float *sums) {
    vec sum[8];
    for (int d = 0; d < m; d++) sum[d] = (vec){0};
    for (i64 t = 0; t < window; t++) {
        const float *from = rows + at[t];
        vec w = *(const vec *)(weights + t * LANES);
        for (int d = 0; d < m; d++) sum[d] += w * *(const vec *)(from + d * pitch);
    }
    for (int d = 0; d < m; d++) *(vec *)(sums + d * LANES) = sum[d];
}

static void sums_(const Problem *p, const Block *b, const float *rows, const float *weights, float *sums) {
    for (i64 d = 0; d < p->width;) {
#define STEP(m) sums_of(m, b->window, b->pitch, rows + d * b->pitch, b->at, weights, sums + d * LANES), d += m
        if (p->width - d >= 8) STEP(8);
        else if (p->width - d >= 4) STEP(4);
        else STEP(1);
#undef STEP
    }
}

/* `shift` is where the LANES queries' keys lie after those of the block's first query. */
static void forward_queries(const Problem *p, Block *b, i64 shift, const float *const *q, float *const *out) {
    to_rows(q, p->width, b->query, LANES);
    for (i64 d = 0; d < p->width * LANES; d += LANES) *(vec *)(b->query + d) *= p->scale;
    vec top = scores_(p, b, b->keys + shift, b->query, b->weights), total = {0};
    for (i64 t = 0; t < b->window * LANES; t += LANES) {
        vec weight = exp_(*(vec *)(b->weights + t) - top);
        *(vec *)(b->weights + t) = weight;
        total += weight;
    }
    sums_(p, b, b->values + shift, b->weights, b->query);
    vec share = 1 / total;
    for (i64 d = 0; d < p->width * LANES; d += LANES) *(vec *)(b->query + d) *= share;
    to_tokens(b->query, p->width, out);
}

/* Adds to `m` vectors of channels of a key's gradients what the queries send that meet it. */
INLINE void add_to_key(const int m, const Meeting *from, const Meeting *to, const float *weights, const float *dscores,
                       const float *q, const float *dout, float *dk, float *dv) {
    vec sum_k[4], sum_v[4];
    for (int d = 0; d < m; d++) sum_k[d] = ((vec *)dk)[d], sum_v[d] = ((vec *)dv)[d];
    for (; from < to; from++) {
        float s = dscores[from->weight], w = weights[from->weight];
        for (int d = 0; d < m; d++) sum_k[d] += s * ((const vec *)(q + from->query))[d];
        for (int d = 0; d < m; d++) sum_v[d] += w * ((const vec *)(dout + from->query))[d];
    }
    for (int d = 0; d < m; d++) ((vec *)dk)[d] = sum_k[d], ((vec *)dv)[d] = sum_v[d];
}

static void add_to_keys(const Problem *p, const Block *b, const Key *key, i64 a, float *dk, float *dv, i64 stride) {
    const float *weights = b->weights + a * p->kernel[1] * LANES, *dscores = b->dscores + a * p->kernel[1] * LANES;
    for (; key->column >= 0; key++) {
        const Meeting *from = b->meetings + key->from, *to = b->meetings + key->to;
        const float *q = b->tokens, *dout = q + p->width;
        i64 c = 0, at = key->column * stride;
#define STEP(m) add_to_key(m, from, to, weights, dscores, q + c, dout + c, dk + at + c, dv + at + c), c += m * LANES
        while (c + 4 * LANES <= p->width) STEP(4);
        if (c + 2 * LANES <= p->width) STEP(2);
        if (c + LANES <= p->width) STEP(1);
#undef STEP
        for (; c < p->width; c++)
            for (const Meeting *m = from; m < to; m++) {
                dk[at + c] += dscores[m->weight] * q[m->query + c];
                dv[at + c] += weights[m->weight] * dout[m->query + c];
            }
    }
}

/* `key`: the first that these queries meet. */
static void backward_queries(const Problem *p, Block *b, i64 shift, const float *const *q, const float *const *dout,
                             float *const *dq, float *dk, float *dv, const Key *key) {
    to_rows(q, p->width, b->query, LANES);
    to_rows(dout, p->width, b->grad, LANES);
    for (i64 l = 0; l < LANES; l++) {
        memcpy(b->tokens + 2 * l * p->width, q[l], sizeof(float) * p->width);
        memcpy(b->tokens + (2 * l + 1) * p->width, dout[l], sizeof(float) * p->width);
    }
    for (i64 d = 0; d < p->width * LANES; d += LANES) *(vec *)(b->query + d) *= p->scale;
    vec top = scores_(p, b, b->keys + shift, b->query, b->weights), total = {0}, mean = {0};
    scores_(p, b, b->values + shift, b->grad, b->dscores); /* the weights' gradients, first */
    for (i64 t = 0; t < b->window * LANES; t += LANES) {
        vec weight = exp_(*(vec *)(b->weights + t) - top);
        *(vec *)(b->weights + t) = weight;
        total += weight;
        mean += weight * *(vec *)(b->dscores + t);
    }
    vec share = 1 / total;
    mean *= share; /* by the same weights as below: the scores' gradients sum to zero */
    for (i64 t = 0; t < b->window * LANES; t += LANES) {
        vec weight = *(vec *)(b->weights + t) * share;
        *(vec *)(b->weights + t) = weight;
        *(vec *)(b->dscores + t) = weight * (*(vec *)(b->dscores + t) - mean) * p->scale;
    }
    sums_(p, b, b->keys + shift, b->dscores, b->query);
    to_tokens(b->query, p->width, dq);
    i64 stride = p->groups * p->width;
    for (i64 a = 0; a < p->kernel[0]; a++) {
        i64 row = b->key_row[a] * p->key_length * stride;
        if (row >= 0) add_to_keys(p, b, key, a, dk + row, dv + row, stride);
    }
}

static i64 gcd(i64 a, i64 b) { return b ? gcd(b, a % b) : a; }

static int allocate(const Problem *p, Block *b) {
    i64 divisor = gcd(p->stride[1], p->key_stride[1]), wide = (p->kernel[1] - 1) * p->dilation[1];
    b->segments = p->stride[1] / divisor;
    b->copies = p->key_stride[1] / divisor;
    b->columns = p->length < COLUMNS ? (p->length + LANES - 1) / LANES * LANES : COLUMNS;
    b->window = p->kernel[0] * p->kernel[1];
    b->ring = (p->kernel[0] - 1) * p->dilation[0] + 1;
    if (b->ring > p->key_height) b->ring = p->key_height;
    b->segment = b->columns + (b->copies * wide + b->segments - 1) / b->segments;
    b->pitch = (b->segment * b->segments + LANES - 1) / LANES * LANES;
    i64 rows = (b->ring + 1) * p->width * b->pitch, met = b->columns / LANES * (LANES * p->kernel[1] + 1);
    b->keys = malloc(sizeof(float) * (2 * rows + (4 * p->width + 2 * b->window) * LANES + 2 * p->width));
    b->row = malloc(sizeof(i64) * (b->ring + b->pitch + p->kernel[1] + b->window + p->kernel[0]));
    b->met = malloc(sizeof(Key) * met + sizeof(Meeting) * b->columns * p->kernel[1]);
    if (!b->keys || !b->row || !b->met) return 0;
    b->values = b->keys + rows;
    b->query = b->values + rows;
    b->grad = b->query + p->width * LANES;
    b->weights = b->grad + p->width * LANES;
    b->dscores = b->weights + b->window * LANES;
    b->tokens = b->dscores + b->window * LANES;
    b->zeros = b->tokens + 2 * p->width * LANES;
    b->unused = b->zeros + p->width;
    b->column = b->row + b->ring;
    b->place = b->column + b->pitch;
    b->at = b->place + p->kernel[1];
    b->key_row = b->at + b->window;
    b->meetings = (Meeting *)(b->met + met);
    i64 row = p->width * b->pitch;
    memset(b->keys + b->ring * row, 0, sizeof(float) * row);
    memset(b->values + b->ring * row, 0, sizeof(float) * row);
    memset(b->zeros, 0, sizeof(float) * p->width);
    return 1;
}

/* Output rows from `top` to `bottom` of one head of one image, whose maps the pointers are. */
static void head_(const Problem *p, Block *b, i64 top, i64 bottom, const float *q, const float *k, const float *v,
                  float *out, const float *dout, float *dq, float *dk, float *dv) {
    for (i64 first = 0; first < p->length; first += b->columns) {
        i64 last = first + b->columns < p->length ? first + b->columns : p->length;
        columns_(p, b, first);
        if (dout) meetings_(p, b, first, last);
        for (i64 i = top; i < bottom; i++) {
            rows_(p, b, k, v, i);
            for (i64 j = first; j < last; j += LANES) {
                const float *query[LANES], *grad[LANES];
                float *into[LANES];
                for (i64 l = 0; l < LANES; l++) {
                    i64 real = j + l < last, at = (i * p->length + j + l) * p->groups * p->width;
                    query[l] = real ? q + i * p->stride[0] * p->q[1] + (j + l) * p->stride[1] * p->q[2] : b->zeros;
                    grad[l] = real && dout ? dout + at : b->zeros;
                    into[l] = real ? (dout ? dq : out) + at : b->unused;
                }
                if (dout) backward_queries(p, b, j - first, query, grad, into, dk, dv, met_(p, b, first, j));
                else forward_queries(p, b, j - first, query, into);
            }
        }
    }
}

/* Forward where dout is NULL: writes out. Backward otherwise: writes dq and adds to dk and dv. All of out, dout and dq
 * are dense, (batch, height, length, groups * width), and so are dk and dv. Returns 0, or 1 where memory is short. */
int msa_conv2d(const Problem *p, const float *q, const float *k, const float *v, float *out, const float *dout,
               float *dq, float *dk, float *dv) {
    i64 reach = (p->kernel[0] - 1) * p->dilation[0] + 1; /* rows after which two blocks' windows cannot meet */
    i64 rows = dout ? (reach * p->key_stride[0] + p->stride[0] - 1) / p->stride[0] : MIN_ROWS;
    if (rows < MIN_ROWS) rows = MIN_ROWS;
    i64 blocks = (p->height + rows - 1) / rows, heads = p->batch * p->groups, colours = dout ? 2 : 1;
    i64 channels = p->groups * p->width, tokens = p->height * p->length, keys = p->key_height * p->key_length;
    int short_of_memory = 0;
#pragma omp parallel num_threads(p->threads)
    {
        Block block, *b = &block;
        if (!allocate(p, b)) {
#pragma omp atomic write
            short_of_memory = 1;
        }
#pragma omp barrier
        for (i64 colour = 0; colour < colours; colour++) {
            i64 some = (blocks - colour + colours - 1) / colours;
#pragma omp for schedule(dynamic)
            for (i64 unit = 0; unit < heads * some; unit++) {
                if (short_of_memory) continue;
                i64 n = unit / some / p->groups, c = unit / some % p->groups * p->width;
                i64 top = (unit % some * colours + colour) * rows, bottom = top + rows;
                i64 at = n * tokens * channels + c, at_keys = n * keys * channels + c;
                if (bottom > p->height) bottom = p->height;
                const float *q_ = q + n * p->q[0] + c, *k_ = k + n * p->k[0] + c, *v_ = v + n * p->v[0] + c;
                if (dout) head_(p, b, top, bottom, q_, k_, v_, NULL, dout + at, dq + at, dk + at_keys, dv + at_keys);
                else head_(p, b, top, bottom, q_, k_, v_, out + at, NULL, NULL, NULL, NULL);
            }
        }
        free(b->keys);
        free(b->row);
        free(b->met);
    }
    return short_of_memory;
}

/* (batch, height, length, groups, width) numbers of `bytes` each: of every group the channels from starts[r] to
 * starts[r + 1] are those of the token `shifts[r]` (down, right) away, around the border. `strides` of x in bytes, of
 * image, row and column; out is dense. */
void cyclic_shift(const char *x, char *out, i64 batch, i64 height, i64 length, i64 groups, i64 width, i64 runs,
                  const i64 *starts, const i64 *shifts, const i64 *strides, i64 bytes, i64 threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (i64 n = 0; n < batch; n++)
        for (i64 i = 0; i < height; i++)
            for (i64 j = 0; j < length; j++) {
                char *to = out + ((n * height + i) * length + j) * groups * width * bytes;
                for (i64 r = 0; r < runs; r++) {
                    i64 y = mod(i + shifts[2 * r], height), z = mod(j + shifts[2 * r + 1], length);
                    const char *from = x + n * strides[0] + y * strides[1] + z * strides[2];
                    i64 first = starts[r] * bytes, last = starts[r + 1] * bytes, pitch = width * bytes;
                    for (i64 g = 0; g < groups; g++)
                        memcpy(to + g * pitch + first, from + g * pitch + first, last - first);
                }
            }
}
