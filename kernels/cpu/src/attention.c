/* Paged attention: out[t, h] = softmax over positions j <= position(t) of (scale * q[t, h] . k[j, g]) times v[j, g].
 *
 * One algorithm for decoding and for chunks of prompts. The rows of a (sequence, key-value head) are its query tokens times
 * the query heads that share the head; a tile takes up to TILE_ROWS of them over the positions in chunks of 64 that are
 * anchored at position 0, with a running maximum and sum per row (Milakov & Gimelshein, 2018). What a row does not see
 * weighs exactly 0, and a chunk of which it sees nothing changes nothing, so a row's result depends neither on the tile it
 * lies in nor on how its prompt was cut.
 *
 * Cache of a layer: keys [blocks][heads][block_size / 16][size][16 positions], values [blocks][heads][block_size][size].
 */
#include "program.h"

#include "kv_cache.h"
#include "linear.h"

#define TILE_ROWS 8
#define CHUNK 64
#define CHUNK_GROUPS (CHUNK / LANES)
#define TILES_PER_TASK 4

typedef struct {
    const float *q;
    float *out;
    kv_cache cache;
    int64_t q_stride, num_heads, num_seqs;
    const int32_t *query_start, *context_len, *block_table;
    int64_t table_stride, window;
    float scale, softcap;
    const int64_t *first_task; /* of each sequence; a task is some tiles of one of its heads */
} attention;

INLINE f32x16 f32_tanh(f32x16 x) { return 1.0f - 2.0f / (1.0f + f32_exp(x * 2.0f)); }

typedef struct {
    int64_t position, first; /* of the query, and of the first key it sees */
    const float *q;
    float *out;
} query_row;

INLINE const int32_t *table_of(const attention *a, int64_t seq) { return a->block_table + seq * a->table_stride; }

/* scores[r][j] = q[r] . k[start + j] for the groups of 16 positions from `start` that lie below `end`. */
INLINE void score_chunk(const attention *a, const int32_t *table, int64_t head, int64_t start, int64_t end,
                        const float *q, float (*scores)[CHUNK], const int rows, const int format) {
    const int groups_at_once = rows >= 4 ? 2 : 4;
    const int64_t size = a->cache.head_size;
    for (int64_t group = 0; group < CHUNK_GROUPS && start + group * LANES < end; group += groups_at_once) {
        int64_t keys[4];
        for (int i = 0; i < groups_at_once; i++) { /* a group beyond the end repeats the last one before it */
            int64_t position = min_i64(start + (group + i) * LANES, (end - 1) / LANES * LANES);
            keys[i] = key_index(&a->cache, table, head, position);
        }
        f32x16 sum[TILE_ROWS][4] = {};
        for (int64_t d = 0; d < size; d++)
            for (int i = 0; i < groups_at_once; i++) {
                f32x16 k = kv_load(a->cache.keys, keys[i] + d * LANES, format);
                for (int r = 0; r < rows; r++) sum[r][i] = f32_fma(f32_set1(q[r * size + d]), k, sum[r][i]);
            }
        for (int i = 0; i < groups_at_once; i++)
            for (int r = 0; r < rows; r++) f32_store(scores[r] + (group + i) * LANES, sum[r][i]);
    }
}

/* Scores of one row to weights; returns what the row's sums so far are to be multiplied by. */
INLINE float weigh(const attention *a, const query_row *row, int64_t start, float *scores, float *maximum, f32x16 *sum) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 hidden = f32_set1(-INFINITY);
    int64_t from = row->first - start, to = row->position - start; /* seen: from <= j <= to */
    if (to < 0 || from >= CHUNK) {
        memset(scores, 0, CHUNK * sizeof *scores);
        return 1.0f;
    }
    int32_t low = (int32_t)(from < 0 ? 0 : from), high = (int32_t)min_i64(to, CHUNK - 1);
    f32x16 largest = f32_set1(*maximum);
    f32x16 s[CHUNK_GROUPS];
    for (int i = 0; i < CHUNK_GROUPS; i++) {
        s[i] = f32_load(scores + i * LANES) * a->scale;
        if (a->softcap > 0) s[i] = f32_tanh(s[i] / a->softcap) * a->softcap;
        i32x16 j = lane + i * LANES;
        s[i] = f32_select((j >= low) & (j <= high), s[i], hidden);
        largest = f32_max(s[i], largest);
    }
    float new_maximum = f32_max_all(largest), factor = f32_exp(f32_set1(*maximum - new_maximum))[0];
    *maximum = new_maximum;
    *sum *= factor;
    for (int i = 0; i < CHUNK_GROUPS; i++) {
        f32x16 weight = f32_exp(s[i] - new_maximum);
        *sum += weight;
        f32_store(scores + i * LANES, weight);
    }
    return factor;
}

/* out[r] = out[r] * factor[r] + sum over j of weights[r][j] * v[start + j]; positions from `end` on are never read. */
INLINE void add_values(const attention *a, const int32_t *table, int64_t head, int64_t start, int64_t end,
                       float (*weights)[CHUNK], const float *factor, float *out, int64_t padded, const int rows,
                       const int format) {
    const int64_t size = a->cache.head_size;
    for (int64_t d = 0; d < size; d += LANES) {
        const int count = (int)min_i64(LANES, size - d);
        f32x16 sum[TILE_ROWS];
        for (int r = 0; r < rows; r++) sum[r] = f32_load(out + r * padded + d) * factor[r];
        for (int64_t group = start; group < min_i64(start + CHUNK, end); group += LANES) {
            int64_t values = value_index(&a->cache, table, head, group) + d, num = min_i64(LANES, end - group);
            for (int64_t j = 0; j < num; j++) {
                f32x16 v = kv_load_n(a->cache.values, values + j * size, count, format);
                for (int r = 0; r < rows; r++)
                    sum[r] = f32_fma(f32_set1(weights[r][group - start + j]), v, sum[r]);
            }
        }
        for (int r = 0; r < rows; r++) f32_store(out + r * padded + d, sum[r]);
    }
}

INLINE void attend(const attention *a, int64_t seq, int64_t head, const query_row *row, int num_rows, const int rows,
                   const int format) {
    const int64_t size = a->cache.head_size, padded = ceil_div(size, LANES) * LANES;
    const int32_t *table = table_of(a, seq);
    float q[TILE_ROWS * MAX_HEAD_SIZE], out[TILE_ROWS * MAX_HEAD_SIZE] __attribute__((aligned(64)));
    float scores[TILE_ROWS][CHUNK] __attribute__((aligned(64)));
    float maximum[TILE_ROWS], factor[TILE_ROWS];
    f32x16 sum[TILE_ROWS] = {};
    int64_t first = row[0].first, end = 0;
    memset(out, 0, sizeof(float) * (size_t)(rows * padded));
    memset(q, 0, sizeof(float) * (size_t)(rows * size));
    for (int r = 0; r < num_rows; r++) {
        memcpy(q + r * size, row[r].q, sizeof(float) * (size_t)size);
        maximum[r] = -1e30f; /* finite: what is hidden is -infinity, and must weigh 0 even where nothing was seen yet */
        first = min_i64(first, row[r].first);
        end = row[r].position + 1 > end ? row[r].position + 1 : end;
    }
    for (int64_t start = first / CHUNK * CHUNK; start < end; start += CHUNK) {
        score_chunk(a, table, head, start, end, q, scores, rows, format);
        for (int r = 0; r < num_rows; r++) factor[r] = weigh(a, &row[r], start, scores[r], &maximum[r], &sum[r]);
        for (int r = num_rows; r < rows; r++) memset(scores[r], 0, sizeof scores[r]), factor[r] = 0;
        add_values(a, table, head, start, end, scores, factor, out, padded, rows, format);
    }
    for (int r = 0; r < num_rows; r++) {
        float inverse = 1.0f / f32_sum(sum[r]);
        for (int64_t d = 0; d < size; d += LANES)
            f32_store_n(row[r].out + d, f32_load(out + r * padded + d) * inverse, (int)min_i64(LANES, size - d));
    }
}

static void attend_tile(const attention *a, int64_t seq, int64_t head, const query_row *row, int num_rows) {
#define ATTEND(rows)                                                                                      \
    switch (a->cache.format) {                                                                            \
        case KV_FLOAT32: attend(a, seq, head, row, num_rows, rows, KV_FLOAT32); break;                    \
        case KV_BFLOAT16: attend(a, seq, head, row, num_rows, rows, KV_BFLOAT16); break;                  \
        case KV_FLOAT16: attend(a, seq, head, row, num_rows, rows, KV_FLOAT16); break;                    \
    }
    if (num_rows > 4) {
        ATTEND(8)
    } else if (num_rows > 2) {
        ATTEND(4)
    } else if (num_rows == 2) {
        ATTEND(2)
    } else {
        ATTEND(1)
    }
#undef ATTEND
}

/* The last sequence whose first task is not behind `index`. */
INLINE int64_t sequence_of(const attention *a, int64_t index) {
    int64_t low = 0, high = a->num_seqs;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (a->first_task[middle] <= index)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static void run_task(void *context, int64_t index, int32_t thread) {
    const attention *a = context;
    (void)thread;
    const int64_t size = a->cache.head_size, group = a->num_heads / a->cache.num_heads;
    int64_t seq = sequence_of(a, index), query_len = a->query_start[seq + 1] - a->query_start[seq];
    int64_t num_rows = query_len * group, per_task = TILE_ROWS * TILES_PER_TASK;
    index -= a->first_task[seq];
    int64_t head = index % a->cache.num_heads, begin = index / a->cache.num_heads * per_task;
    for (int64_t tile = begin; tile < min_i64(begin + per_task, num_rows); tile += TILE_ROWS) {
        query_row row[TILE_ROWS];
        int count = (int)min_i64(TILE_ROWS, num_rows - tile);
        for (int r = 0; r < count; r++) {
            int64_t token = (tile + r) / group, query_head = head * group + (tile + r) % group;
            int64_t position = a->context_len[seq] - query_len + token, t = a->query_start[seq] + token;
            int64_t first = a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
            row[r] = (query_row){position, first, a->q + t * a->q_stride + query_head * size,
                                 a->out + (t * a->num_heads + query_head) * size};
        }
        attend_tile(a, seq, head, row, count);
    }
}

/* keys and values: the two halves of one layer's cache of num_blocks blocks. */
void OP(paged_attention)(const float *q, int64_t q_stride, int64_t num_heads, void *cache, int64_t num_blocks,
                         int64_t block_size, int64_t num_kv_heads, int64_t head_size, int64_t format,
                         const int32_t *query_start, const int32_t *context_len, const int32_t *block_table,
                         int64_t num_seqs, int64_t table_stride, int64_t window, float scale, float softcap, float *out) {
    attention a = {q, out, kv_cache_of(cache, num_blocks, block_size, num_kv_heads, head_size, format), q_stride,
                   num_heads, num_seqs, query_start, context_len, block_table, table_stride, window, scale, softcap, NULL};
    int64_t num_tasks = 0, first_task[num_seqs];
    for (int64_t seq = 0; seq < num_seqs; seq++) {
        int64_t num_rows = (query_start[seq + 1] - query_start[seq]) * (num_heads / num_kv_heads);
        first_task[seq] = num_tasks;
        num_tasks += num_kv_heads * ceil_div(num_rows, TILE_ROWS * TILES_PER_TASK);
    }
    a.first_task = first_task;
    pool_run(num_tasks, run_task, &a);
}

void OP(paged_attention_replay)(const cell *a) {
    OP(paged_attention)(a[0].p, a[1].i, a[2].i, a[3].p, a[4].i, a[5].i, a[6].i, a[7].i, a[8].i, a[9].p, a[10].p, a[11].p,
                        a[12].i, a[13].i, a[14].i, (float)a[15].f, (float)a[16].f, a[17].p);
}
