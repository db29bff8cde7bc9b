/* Causal attention of query tokens over the keys and values of their own sequences, which lie in blocks.
 *
 *   out[row] = sum over j of w[j] v[j] / sum over j of w[j],   w[j] = exp(cap(scale * q[row] . k[j]) - largest)
 *
 * A row is one query head of one token; j runs over the positions it sees: its own and those before it, or the last
 * `window` of them. cap(s) = softcap * tanh(s / softcap), or s itself.
 *
 * The softmax is online (Milakov and Gimelshein, 2018): positions are taken in chunks, and what was summed is scaled
 * down when a chunk brings a larger score. Chunks are anchored at position 0 and a chunk's order of operations is fixed,
 * so a row's result depends on nothing but the row: not on its neighbours in a tile, nor on how a prompt is cut. A
 * position that only a neighbour sees has weight 0, and so changes nothing.
 *
 * Rows of one sequence that share a key-value head form tiles, which the registers hold; tiles that share a task read
 * each chunk from the first-level cache.
 */
#include "kv_cache.h"
#include "pool.h"
#include "program.h"

#include <stdbool.h>

#define CHUNK 64 /* positions */
#define GROUPS (CHUNK / LANES)
#define TASK_ROWS 32
#define CACHE_LINE 64
#define MAX_PASS 4
#define LEAST (-3e38f) /* below every score; finite, since infinity minus itself is no number */

#if defined(__AVX512F__)
#define MAX_TILE_ROWS 8
#else
#define MAX_TILE_ROWS 4
#endif

/* Native vectors that one pass computes for each of a tile's rows: with the rows, as many sums as the registers hold and
 * the multiply-adds' latency asks for. */
#define PASS_WIDTH(rows) ((rows) == MAX_TILE_ROWS ? 2 : 4)

typedef struct {
    const float *q;    /* token t's heads at q + t * q_stride */
    int64_t q_stride;
    kv_cache kv;
    const int32_t *query_starts, *context_lens, *block_tables; /* as in attention.py */
    int64_t table_width, num_heads, window; /* window 0: none */
    float scale, softcap;
    float *out;
} attention;

/* Rows of one sequence and key-value head; row i is query head i % R of token i / R, R heads to a key-value head. */
typedef struct {
    int64_t sequence, head, first_row, num_rows;
} task_rows;

static int64_t num_heads_per_kv(const attention *a) { return a->num_heads / a->kv.num_kv_heads; }

static int64_t num_tasks_of(const attention *a, int64_t sequence) {
    int64_t num_tokens = a->query_starts[sequence + 1] - a->query_starts[sequence];
    return a->kv.num_kv_heads * ceil_div(num_tokens * num_heads_per_kv(a), TASK_ROWS);
}

static task_rows rows_of(const attention *a, int64_t index) {
    int64_t sequence = 0;
    for (int64_t tasks; index >= (tasks = num_tasks_of(a, sequence)); sequence++) index -= tasks;
    int64_t per_head = num_tasks_of(a, sequence) / a->kv.num_kv_heads;
    int64_t num_rows = (a->query_starts[sequence + 1] - a->query_starts[sequence]) * num_heads_per_kv(a);
    int64_t first = index % per_head * TASK_ROWS;
    return (task_rows){sequence, index / per_head, first, min_i64(TASK_ROWS, num_rows - first)};
}

/* A row's token in the step, query head, and position in its sequence. */
typedef struct {
    int64_t token, head, position;
} row_place;

static row_place place_of(const attention *a, const task_rows *task, int64_t row) {
    int64_t per_kv = num_heads_per_kv(a), start = a->query_starts[task->sequence];
    int64_t token = (task->first_row + row) / per_kv;
    int64_t num_tokens = a->query_starts[task->sequence + 1] - start;
    int64_t position = a->context_lens[task->sequence] - num_tokens + token;
    return (row_place){start + token, task->head * per_kv + (task->first_row + row) % per_kv, position};
}

/* How far a tile's rows have come. Rows beyond the task's last repeat it; nobody reads their result. */
typedef struct {
    int64_t first[MAX_TILE_ROWS], end[MAX_TILE_ROWS]; /* positions that a row sees; both grow from row to row */
    float peak[LANES];                                /* largest score so far */
    float sum[MAX_TILE_ROWS][LANES];                  /* of the weights of positions j, in j % LANES */
    float *q;                                         /* [D][rows], times scale */
    float *out;                                       /* [rows][D] */
} tile;

/* A chunk's positions that some row of a tile sees, and the scores, then weights, of its rows. */
typedef struct {
    int64_t first, end;                   /* positions */
    int64_t base;                         /* position of the first group; a multiple of 16 */
    int num_groups;                       /* of 16 positions */
    int64_t keys[GROUPS], values[GROUPS]; /* elements of the cache */
    float weights[MAX_TILE_ROWS][CHUNK] __attribute__((aligned(CACHE_LINE)));
    float keep[LANES]; /* factor of what was summed before */
} chunk;

/* The chunk from `start` on, without its weights. It may be empty. */
static void find_chunk(const attention *a, const task_rows *task, const tile *t, int rows, int64_t start, chunk *c) {
    const int32_t *table = a->block_tables + task->sequence * a->table_width;
    c->first = max_i64(start, t->first[0]);
    c->end = max_i64(c->first, min_i64(start + CHUNK, t->end[rows - 1]));
    c->base = c->first / LANES * LANES;
    c->num_groups = c->first < c->end ? (int)ceil_div(c->end - c->base, LANES) : 0;
    for (int g = 0; g < c->num_groups; g++) {
        int64_t position = c->base + g * LANES;
        int64_t block = table[position / a->kv.block_size], offset = position % a->kv.block_size;
        c->keys[g] = key_at(&a->kv, block, offset, task->head);
        c->values[g] = value_at(&a->kv, block, offset, task->head);
    }
}

/* Asks for a group's keys or values, which lie in one piece. */
INLINE void fetch(const attention *a, const void *elements, int64_t at, const int type) {
    const int64_t size = type == KV_FLOAT32 ? 4 : 2;
    const char *from = (const char *)elements + at * size;
    for (int64_t i = 0; i < LANES * a->kv.head_dim * size; i += CACHE_LINE) __builtin_prefetch(from + i);
}

/* Scores of `width` native vectors of positions, n and those after it: sums over the dimensions in order. */
INLINE void score(const attention *a, const tile *t, chunk *c, int n, const int rows, const int width, const int type) {
    f32v sum[MAX_TILE_ROWS][MAX_PASS] = {};
    const float *q = t->q;
    for (int64_t d = 0; d < a->kv.head_dim; d++, q += rows) {
        f32v k[MAX_PASS];
        for (int i = 0; i < width; i++)
            k[i] = kv_load(a->kv.keys, c->keys[(n + i) / PARTS] + d * LANES + (n + i) % PARTS * WIDTH, type);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < width; i++) sum[r][i] = v_fma(v_set1(q[r]), k[i], sum[r][i]);
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++) v_store(c->weights[r] + (n + i) * WIDTH, sum[r][i]);
}

/* Capped, and minus infinity where the row, which sees first .. end, does not see the position. */
INLINE f32v visible_score(const attention *a, const chunk *c, int64_t first, int64_t end, int r, int n) {
    f32v score = v_load(c->weights[r] + n * WIDTH);
    if (a->softcap != 0.0f) score = a->softcap * v_tanh(score / a->softcap);
    int64_t base = c->base + n * WIDTH;
    if (first > base || end < base + WIDTH) {
        int32_t from = (int32_t)max_i64(0, min_i64(first - base, WIDTH));
        int32_t to = (int32_t)max_i64(0, min_i64(end - base, WIDTH));
        score = v_select((v_indices() >= from) & (v_indices() < to), score, v_set1(-INFINITY));
    }
    return score;
}

/* Scores become weights. */
static void weigh(const attention *a, tile *t, chunk *c, int rows) {
    float before[LANES];
    memcpy(before, t->peak, sizeof before);
    for (int r = 0; r < rows; r++) {
        f32v peak = v_set1(t->peak[r]);
        for (int n = 0; n < c->num_groups * PARTS; n++) {
            f32v score = visible_score(a, c, t->first[r], t->end[r], r, n);
            peak = v_max(peak, score);
            v_store(c->weights[r] + n * WIDTH, score);
        }
        t->peak[r] = v_max_all(peak);
    }
    for (int i = 0; i < rows; i += WIDTH) v_store(c->keep + i, v_exp(v_load(before + i) - v_load(t->peak + i)));
    for (int r = 0; r < rows; r++) {
        f32v sum[PARTS];
        for (int p = 0; p < PARTS; p++) sum[p] = v_load(t->sum[r] + p * WIDTH) * c->keep[r];
        for (int g = 0; g < c->num_groups; g++)
            for (int p = 0; p < PARTS; p++) {
                float *at = c->weights[r] + g * LANES + p * WIDTH;
                f32v weight = v_exp(v_load(at) - t->peak[r]);
                v_store(at, weight);
                sum[p] += weight;
            }
        for (int p = 0; p < PARTS; p++) v_store(t->sum[r] + p * WIDTH, sum[p]);
    }
}

/* Adds the weighted values, dimensions d and those after it, to the tile's output, position by position. */
INLINE void add_values(const attention *a, const tile *t, const chunk *c, const chunk *next, int64_t d, const int rows,
                       const int width, const int64_t count, const int type) {
    int64_t head_dim = a->kv.head_dim;
    f32v sum[MAX_TILE_ROWS][MAX_PASS];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++)
            sum[r][i] = v_load_n(t->out + r * head_dim + d + i * WIDTH, count) * c->keep[r];
    for (int g = 0; g < c->num_groups; g++) {
        if (next != NULL && g < next->num_groups) fetch(a, a->kv.keys, next->keys[g], type);
        int64_t base = c->base + g * LANES;
        int64_t from = max_i64(c->first - base, 0), to = min_i64(c->end - base, LANES);
        int64_t at = c->values[g] + from * head_dim + d;
        for (int64_t j = g * LANES + from; j < g * LANES + to; j++, at += head_dim) {
            for (int i = 0; i < width; i++) {
                f32v value = kv_load_n(a->kv.values, at + i * WIDTH, count, type);
                for (int r = 0; r < rows; r++) sum[r][i] = v_fma(v_set1(c->weights[r][j]), value, sum[r][i]);
            }
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < width; i++) v_store_n(t->out + r * head_dim + d + i * WIDTH, sum[r][i], count);
}

static void start_tile(const attention *a, const task_rows *task, int64_t first_row, tile *t, int rows) {
    int64_t head_dim = a->kv.head_dim;
    for (int r = 0; r < rows; r++) {
        row_place place = place_of(a, task, min_i64(first_row + r, task->num_rows - 1));
        t->end[r] = place.position + 1;
        t->first[r] = a->window == 0 ? 0 : max_i64(0, t->end[r] - a->window);
        const float *q = a->q + place.token * a->q_stride + place.head * head_dim;
        for (int64_t d = 0; d < head_dim; d++) t->q[d * rows + r] = q[d] * a->scale;
    }
    for (int i = 0; i < LANES; i++) t->peak[i] = LEAST;
    memset(t->sum, 0, sizeof t->sum);
    memset(t->out, 0, (size_t)(rows * head_dim) * sizeof *t->out);
}

/* streams: nobody reads this memory again soon, so what comes next is asked for while this is computed. */
INLINE void take_chunk(const attention *a, const task_rows *task, int64_t start, tile *t, const bool streams,
                       const int rows, const int type) {
    chunk c, next;
    find_chunk(a, task, t, rows, start, &c);
    if (c.num_groups == 0) return;
    next.num_groups = 0;
    if (streams) find_chunk(a, task, t, rows, start + CHUNK, &next);
    int num_vectors = c.num_groups * PARTS;
    for (int n = 0, width; n < num_vectors; n += width) {
        width = n + PASS_WIDTH(rows) <= num_vectors ? PASS_WIDTH(rows) : 1;
        for (int i = n; streams && i < n + width; i++)
            if (i % PARTS == 0) fetch(a, a->kv.values, c.values[i / PARTS], type);
        if (width == 1)
            score(a, t, &c, n, rows, 1, type);
        else
            score(a, t, &c, n, rows, PASS_WIDTH(rows), type);
    }
    weigh(a, t, &c, rows);
    int64_t d = 0, head_dim = a->kv.head_dim;
    for (; d + PASS_WIDTH(rows) * WIDTH <= head_dim; d += PASS_WIDTH(rows) * WIDTH)
        add_values(a, t, &c, d == 0 ? &next : NULL, d, rows, PASS_WIDTH(rows), WIDTH, type);
    for (; d + WIDTH <= head_dim; d += WIDTH) add_values(a, t, &c, d == 0 ? &next : NULL, d, rows, 1, WIDTH, type);
    if (d < head_dim) add_values(a, t, &c, NULL, d, rows, 1, head_dim - d, type);
}

static void finish_tile(const attention *a, const task_rows *task, int64_t first_row, tile *t, int rows) {
    int64_t head_dim = a->kv.head_dim;
    for (int r = 0; r < rows && first_row + r < task->num_rows; r++) {
        row_place place = place_of(a, task, first_row + r);
        float *out = a->out + (place.token * a->num_heads + place.head) * head_dim;
        float inverse = 1.0f / sum_halves(t->sum[r], LANES);
        for (int64_t d = 0; d < head_dim; d++) out[d] = t->out[r * head_dim + d] * inverse;
    }
}

INLINE void attend(const attention *a, const task_rows *task, const int rows, const int type) {
    int64_t head_dim = a->kv.head_dim, num_tiles = ceil_div(task->num_rows, rows);
    tile tiles[TASK_ROWS];
    float out[num_tiles * rows * head_dim] __attribute__((aligned(CACHE_LINE)));
    float q[num_tiles * rows * head_dim];
    for (int64_t i = 0; i < num_tiles; i++) {
        tiles[i].out = out + i * rows * head_dim;
        tiles[i].q = q + i * rows * head_dim;
        start_tile(a, task, i * rows, &tiles[i], rows);
    }
    for (int64_t start = tiles[0].first[0] / CHUNK * CHUNK; start < tiles[num_tiles - 1].end[rows - 1]; start += CHUNK)
        for (int64_t i = 0; i < num_tiles; i++) take_chunk(a, task, start, &tiles[i], num_tiles == 1, rows, type);
    for (int64_t i = 0; i < num_tiles; i++) finish_tile(a, task, i * rows, &tiles[i], rows);
}

INLINE void run_task(const attention *a, int64_t index, const int type) {
    task_rows task = rows_of(a, index);
    if (task.num_rows == 1)
        attend(a, &task, 1, type);
    else if (task.num_rows == 2)
        attend(a, &task, 2, type);
    else if (task.num_rows <= 4 || MAX_TILE_ROWS == 4)
        attend(a, &task, 4, type);
    else
        attend(a, &task, MAX_TILE_ROWS, type);
}

#define DEFINE_TASK(type)                                                      \
    static void run_##type(void *context, int64_t index, int32_t thread) {     \
        (void)thread;                                                          \
        run_task(context, index, type);                                        \
    }
DEFINE_TASK(KV_FLOAT32)
DEFINE_TASK(KV_BFLOAT16)
DEFINE_TASK(KV_FLOAT16)

/* Arguments as in attention.py; q_stride: floats from one token's queries to the next's. */
void OP(paged_attention)(const float *q, int64_t q_stride, int64_t num_heads, void *cache, int64_t num_blocks,
                         int64_t block_size, int64_t num_kv_heads, int64_t head_dim, int64_t type,
                         const int32_t *query_starts, const int32_t *context_lens, const int32_t *block_tables,
                         int64_t num_seqs, int64_t table_width, int64_t window, float scale, float softcap, float *out) {
    attention a = {.q = q, .q_stride = q_stride, .query_starts = query_starts, .context_lens = context_lens,
                   .block_tables = block_tables, .table_width = table_width, .num_heads = num_heads,
                   .window = window, .scale = scale, .softcap = softcap, .out = out};
    a.kv = kv_cache_of(cache, num_blocks, block_size, num_kv_heads, head_dim, (int)type);
    int64_t num_tasks = 0;
    for (int64_t sequence = 0; sequence < num_seqs; sequence++) num_tasks += num_tasks_of(&a, sequence);
#define CASE(constant) pool_run(num_tasks, run_##constant, &a)
    SWITCH_KV_TYPE(type, CASE)
#undef CASE
}

void OP(paged_attention_replay)(const cell *a) {
    OP(paged_attention)(a[0].p, a[1].i, a[2].i, a[3].p, a[4].i, a[5].i, a[6].i, a[7].i, a[8].i, a[9].p, a[10].p,
                        a[11].p, a[12].i, a[13].i, a[14].i, (float)a[15].f, (float)a[16].f, a[17].p);
}
