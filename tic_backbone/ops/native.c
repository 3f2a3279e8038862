/* MSA-Conv on the CPU in float32: one pass a query, nothing of window size leaves the registers and the stack.
 *
 * Scores want many keys at once, the weighted sum many channels. So the rows of keys around a block of queries are
 * transposed once to (channel, column), where a window's row is LANES neighbouring floats; values are read where they
 * lie. Backward makes the weights again from the log-sum-exp and adds to the gradients of keys and values in place:
 * blocks of rows that could meet on a key run one after the other, so every sum has one order and is repeatable.
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

typedef struct { /* one thread's workspace for a block of queries */
    float *keys, *values;  /* (ring, width, pitch): transposed rows; values in backward only */
    i64 *row;              /* (ring): which row of the window grid lies there */
    i64 *column;           /* (pitch): column of the key map; -1 beyond the border */
    float *weights, *dscores; /* (kernel[0], lanes) */
    float *beyond;            /* (lanes): -inf where a row of weights has more lanes than the window has columns */
    float *zeros;             /* (width): a token beyond the border */
    i64 ring, pitch, segment, lanes;
} Block;

static inline i64 mod(i64 a, i64 b) { i64 m = a % b; return m < 0 ? m + b : m; }

static inline vec select_(ivec mask, vec a, vec b) { return (vec)((mask & (ivec)a) | (~mask & (ivec)b)); }

static inline vec exp_(vec x) { /* Cephes' expf; NaN stays NaN */
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
    return (vec)((ivec)y + power);
}

/* `m` rows of a window's scores at once, to share what is loaded of x. */
static inline __attribute__((always_inline)) void score_rows(const int m, const Problem *p, const Block *b,
                                                             const float *const *row, const float *x, float *scores) {
    for (i64 lane = 0; lane < b->lanes; lane += LANES) {
        vec even[m], odd[m];
        for (int a = 0; a < m; a++) even[a] = odd[a] = (vec){0};
        i64 d = 0;
        for (; d + 2 <= p->width; d += 2)
            for (int a = 0; a < m; a++) {
                even[a] += x[d] * *(const vec *)(row[a] + d * b->pitch + lane);
                odd[a] += x[d + 1] * *(const vec *)(row[a] + (d + 1) * b->pitch + lane);
            }
        for (int a = 0; d < p->width && a < m; a++) even[a] += x[d] * *(const vec *)(row[a] + d * b->pitch + lane);
        for (int a = 0; a < m; a++) *(vec *)(scores + a * b->lanes + lane) = even[a] + odd[a];
    }
}

/* scores[a][e] = x . key(a, e) for the window at `start` of the transposed rows */
static void scores_(const Problem *p, const Block *b, const float *rows, const i64 *slot, i64 start, const float *x,
                    float *scores) {
    for (i64 a = 0; a < p->kernel[0]; a += 4) {
        const float *row[4];
        int m = p->kernel[0] - a < 4 ? p->kernel[0] - a : 4;
        for (int i = 0; i < m; i++) row[i] = rows + slot[a + i] * p->width * b->pitch + start;
        float *into = scores + a * b->lanes;
        if (m == 4) score_rows(4, p, b, row, x, into);
        else if (m == 3) score_rows(3, p, b, row, x, into);
        else if (m == 2) score_rows(2, p, b, row, x, into);
        else score_rows(1, p, b, row, x, into);
    }
}

static inline i64 centre(const Problem *p, int axis, i64 out) { return out * p->stride[axis] / p->key_stride[axis]; }

/* Where the window of output column j starts in a transposed row: dilated columns lie in one segment a residue. */
static inline i64 start_(const Problem *p, const Block *b, i64 first, i64 j) {
    i64 u = centre(p, 1, j) - centre(p, 1, first);
    return u % p->dilation[1] * b->segment + u / p->dilation[1];
}

static void columns_(const Problem *p, Block *b, i64 first) {
    i64 left = centre(p, 1, first) - p->kernel[1] / 2 * p->dilation[1];
    for (i64 i = 0; i < b->pitch; i++) {
        i64 x = left + i % b->segment * p->dilation[1] + i / b->segment; /* of the slack at the end too: never met */
        b->column[i] = x < 0 || x >= p->key_length ? -1 : x;
    }
    for (i64 i = 0; i < b->ring; i++) b->row[i] = INT64_MIN; /* nothing transposed yet */
}

/* Eight tokens of eight channels each, transposed in registers. */
static inline void transpose_square(const float *const *token, i64 d, float *rows, i64 pitch) {
    vec t[LANES], u[LANES];
    for (int i = 0; i < LANES; i++) t[i] = *(const vec *)(token[i] + d);
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
        *(vec *)(rows + (d + i) * pitch) = SHUFFLE(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *(vec *)(rows + (d + i + 4) * pitch) = SHUFFLE(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

/* Row y of the key map, -1 for zeros, to (width, pitch) with the block's columns side by side. */
static void transpose_(const Problem *p, const Block *b, const float *map, const i64 *strides, i64 y, float *rows) {
    if (y < 0) {
        memset(rows, 0, 4 * p->width * b->pitch);
        return;
    }
    for (i64 i = 0; i < b->pitch; i += LANES) {
        const float *token[LANES];
        for (int l = 0; l < LANES; l++)
            token[l] = b->column[i + l] < 0 ? b->zeros : map + y * strides[1] + b->column[i + l] * strides[2];
        i64 d = 0;
        for (; d + LANES <= p->width; d += LANES) transpose_square(token, d, rows + i, b->pitch);
        for (; d < p->width; d++)
            for (int l = 0; l < LANES; l++) rows[d * b->pitch + i + l] = token[l][d];
    }
}

/* The window's rows for output row i: of each its place in the ring and its row of the key map, -1 beyond the border. */
static void rows_(const Problem *p, Block *b, const float *k, const float *v, i64 i, i64 *slot, i64 *row) {
    for (i64 a = 0; a < p->kernel[0]; a++) {
        i64 y = centre(p, 0, i) + (a - p->kernel[0] / 2) * p->dilation[0];
        slot[a] = mod(y, b->ring);
        row[a] = y < 0 || y >= p->key_height ? -1 : y;
        if (b->row[slot[a]] == y) continue;
        b->row[slot[a]] = y;
        transpose_(p, b, k, p->k, row[a], b->keys + slot[a] * p->width * b->pitch);
        if (v) transpose_(p, b, v, p->v, row[a], b->values + slot[a] * p->width * b->pitch);
    }
}

/* `CHUNKS(step)` covers a group's channels by the widest steps, whose sums then fit the registers. */
#define CHUNKS(step)                                              \
    for (i64 c = 0; c < p->width;) {                              \
        i64 rest = p->width - c;                                  \
        if (rest >= 32) { step(32); c += 32; }                    \
        else if (rest >= 16) { step(16); c += 16; }               \
        else if (rest >= 8) { step(8); c += 8; }                  \
        else { step(1); c += 1; }                                 \
    }

#define WINDOW(body)                                                               \
    for (i64 a = 0; a < p->kernel[0]; a++) {                                       \
        if (row[a] < 0) continue;                                                  \
        for (i64 e = 0; e < p->kernel[1]; e++) {                                   \
            i64 x = b->column[start + e];                                          \
            if (x >= 0) { body }                                                   \
        }                                                                          \
    }

static void forward_query(const Problem *p, Block *b, const i64 *slot, const i64 *row, i64 start, const float *q,
                          const float *v, float *out, float *lse) {
    float scaled[p->width], *w = b->weights;
    for (i64 d = 0; d < p->width; d++) scaled[d] = p->scale * q[d];
    scores_(p, b, b->keys, slot, start, scaled, w);
    i64 n = p->kernel[0] * b->lanes;
    float top = -INFINITY, sum = 0;
    vec most = (vec){0} - INFINITY, total = {0};
    for (i64 i = 0; i < n; i += LANES) {
        vec score = *(vec *)(w + i) + *(vec *)(b->beyond + i % b->lanes);
        most = select_((ivec)(most < score), score, most);
        *(vec *)(w + i) = score;
    }
    for (int l = 0; l < LANES; l++) top = top < most[l] ? most[l] : top;
    for (i64 i = 0; i < n; i += LANES) {
        vec weight = exp_(*(vec *)(w + i) - top); /* of lanes beyond 1e-38, which adds nothing to a sum of 1 or more */
        *(vec *)(w + i) = weight;
        total += weight;
    }
    for (int l = 0; l < LANES; l++) sum += total[l];
    *lse = top + logf(sum);
    float share = 1 / sum;
#define STEP(m)                                                                                          \
    float acc[m] = {0};                                                                                  \
    WINDOW(const float *t = v + row[a] * p->v[1] + x * p->v[2] + c; float s = w[a * b->lanes + e];       \
           for (int d = 0; d < m; d++) acc[d] += s * t[d];)                                              \
    for (int d = 0; d < m; d++) out[c + d] = acc[d] * share;
    CHUNKS(STEP)
#undef STEP
}

static void backward_query(const Problem *p, Block *b, const i64 *slot, const i64 *row, i64 start, const float *q,
                           const float *k, const float *out, const float *dout, float lse, float *dq, float *dk,
                           float *dv, const i64 *dstrides) {
    float scaled[p->width], *w = b->weights, *ds = b->dscores, delta = 0;
    for (i64 d = 0; d < p->width; d++) scaled[d] = p->scale * q[d];
    for (i64 d = 0; d < p->width; d++) delta += out[d] * dout[d];
    scores_(p, b, b->keys, slot, start, scaled, w);
    scores_(p, b, b->values, slot, start, dout, ds);
    for (i64 i = 0; i < p->kernel[0] * b->lanes; i += LANES) {
        vec weight = exp_(*(vec *)(w + i) - lse);
        *(vec *)(w + i) = weight;
        *(vec *)(ds + i) = weight * (*(vec *)(ds + i) - delta) * p->scale;
    }
#define STEP(m)                                                                                              \
    float acc[m] = {0}, query[m], grad[m];                                                                   \
    for (int d = 0; d < m; d++) query[d] = q[c + d], grad[d] = dout[c + d];                                  \
    WINDOW(const float *t = k + row[a] * p->k[1] + x * p->k[2] + c; float s = ds[a * b->lanes + e];          \
           float u = w[a * b->lanes + e]; i64 at = row[a] * dstrides[1] + x * dstrides[2] + c;               \
           for (int d = 0; d < m; d++) acc[d] += s * t[d];                                                   \
           for (int d = 0; d < m; d++) dk[at + d] += s * query[d];                                           \
           for (int d = 0; d < m; d++) dv[at + d] += u * grad[d];)                                           \
    for (int d = 0; d < m; d++) dq[c + d] = acc[d];
    CHUNKS(STEP)
#undef STEP
}

static i64 allocate(const Problem *p, Block *b, int backward) {
    b->lanes = (p->kernel[1] + LANES - 1) / LANES * LANES;
    b->ring = (p->kernel[0] - 1) * p->dilation[0] + 1;
    b->segment = (COLUMNS * p->stride[1] / p->key_stride[1] + 1) / p->dilation[1] + 1 + b->lanes;
    b->pitch = (b->segment * p->dilation[1] + LANES - 1) / LANES * LANES;
    i64 rows = b->ring * p->width * b->pitch + LANES, window = p->kernel[0] * b->lanes;
    b->keys = malloc(4 * (rows * (1 + backward) + 2 * window + b->lanes + p->width));
    b->row = malloc(8 * (b->ring + b->pitch + 2 * p->kernel[0]));
    if (!b->keys || !b->row) return 0;
    b->values = b->keys + rows;
    b->weights = b->keys + rows * (1 + backward);
    b->dscores = b->weights + window;
    b->beyond = b->dscores + window;
    b->zeros = b->beyond + b->lanes;
    b->column = b->row + b->ring;
    for (i64 l = 0; l < b->lanes; l++) b->beyond[l] = l < p->kernel[1] ? 0 : -INFINITY;
    for (i64 d = 0; d < p->width; d++) b->zeros[d] = 0;
    return 1;
}

/* Forward where dout is NULL: writes out and lse. Backward otherwise: writes dq and adds to dk and dv, of k's strides
 * `dstrides`. All of out, dout, dq have strides (height * length, length, 1) * groups * width. Returns 0, or 1 where
 * memory is short. lse: (batch, groups, height, length). */
int msa_conv2d(const Problem *p, const float *q, const float *k, const float *v, float *out, float *lse,
               const float *dout, float *dq, float *dk, float *dv, const i64 *dstrides) {
    i64 reach = (p->kernel[0] - 1) * p->dilation[0] + 2; /* rows after which two blocks' windows cannot meet */
    i64 rows = (reach * p->key_stride[0] + p->stride[0] - 1) / p->stride[0];
    if (rows < MIN_ROWS) rows = MIN_ROWS;
    i64 blocks = (p->height + rows - 1) / rows, heads = p->batch * p->groups, channels = p->groups * p->width;
    int short_of_memory = 0;
#pragma omp parallel num_threads(p->threads)
    {
        Block block, *b = &block;
        i64 ok = allocate(p, b, dout != NULL);
        if (!ok) {
#pragma omp atomic write
            short_of_memory = 1;
        }
        i64 *slot = b->column + b->pitch, *row = slot + p->kernel[0];
#pragma omp barrier
        for (i64 colour = 0; colour < 2; colour++) {
            i64 half = (blocks + 1 - colour) / 2;
#pragma omp for schedule(dynamic)
            for (i64 unit = 0; unit < heads * half; unit++) {
                if (short_of_memory) continue;
                i64 n = unit / half / p->groups, g = unit / half % p->groups, c = g * p->width;
                i64 top = (2 * (unit % half) + colour) * rows;
                i64 bottom = top + rows < p->height ? top + rows : p->height;
                const float *kg = k + n * p->k[0] + c, *vg = v + n * p->v[0] + c;
                for (i64 first = 0; first < p->length; first += COLUMNS) {
                    i64 last = first + COLUMNS < p->length ? first + COLUMNS : p->length;
                    columns_(p, b, first);
                    for (i64 i = top; i < bottom; i++) {
                        rows_(p, b, kg, dout ? vg : NULL, i, slot, row);
                        for (i64 j = first; j < last; j++) {
                            const float *query =
                                q + n * p->q[0] + i * p->stride[0] * p->q[1] + j * p->stride[1] * p->q[2] + c;
                            i64 token = (n * p->height + i) * p->length + j, start = start_(p, b, first, j);
                            i64 head = ((n * p->groups + g) * p->height + i) * p->length + j;
                            if (dout)
                                backward_query(p, b, slot, row, start, query, kg, out + token * channels + c,
                                               dout + token * channels + c, lse[head], dq + token * channels + c,
                                               dk + n * dstrides[0] + c, dv + n * dstrides[0] + c, dstrides);
                            else
                                forward_query(p, b, slot, row, start, query, vg, out + token * channels + c,
                                              lse + head);
                        }
                    }
                }
            }
        }
        free(b->keys);
        free(b->row);
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
