/* y[t, o] = sum over k of x[t, k] * w[o, k]  (+ bias[o]), added in the order of k by fused multiply-adds.
 *
 * Weights w: float32 or bfloat16; a bfloat16 weight is exact in float32, so both give the same numbers.
 *
 * Packed: lines as linear.h orders them; a line holds one input's float32 weights of 16 outputs, or two inputs' bfloat16
 * ones: an output's 32 bits have the even input below the odd one, so that each becomes a float32 in one instruction. An
 * odd number of inputs is padded by a 0.
 */
#include "linear.h"
#include "program.h"

/* The blocks of rows take turns with a strip's next lines, which stay in a cache until the last has had them. Where few
 * blocks leave much of a turn to reading, they stay in the first-level one, and each block fetches its share of the next
 * turn's, so that reading goes on while all of them compute. */
#define LINES_PER_TURN 2048
#define LINES_PER_SHORT_TURN 64
#define MAX_BLOCKS_OF_SHORT_TURNS 3

typedef struct {
    const float *x;
    int64_t num_rows, num_inputs, num_outputs;
    const void *weight;
    const float *bias;
    float *out;
    task_split split;
} product;

INLINE int64_t lines_per_tile(int64_t num_inputs, const int is_bf16) { return is_bf16 ? ceil_div(num_inputs, 2) : num_inputs; }

/* Which lines a block of rows works on, and which tiles of the lines after them it fetches meanwhile. */
typedef struct {
    int64_t start, end, first_fetched, num_fetched;
} turn;

INLINE void add_products(f32x16 sum[MAX_ROWS][NUM_TILES], const float *x, int64_t num_inputs, const f32x16 *w, const int rows,
                         const int tiles) {
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < tiles; n++) sum[r][n] = f32_fma(f32_set1(x[r * num_inputs]), w[n], sum[r][n]);
}

/* Adds the products with the turn's lines to the sums in p->out, which start from 0. */
INLINE void block(const product *p, int64_t row, int64_t tile, turn now, const int rows, const int tiles, const int is_bf16) {
    const float *x = p->x + row * p->num_inputs;
    const int64_t num_lines = lines_per_tile(p->num_inputs, is_bf16);
    const line_range lines = lines_of(tile, p->num_outputs, num_lines);
    const int64_t stride = tiles == 1 ? lines.stride : STRIP_TILES;
    const float *weight = (const float *)p->weight + lines.first * LANES;
    f32x16 sum[MAX_ROWS][NUM_TILES] = {};
    if (now.start > 0)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < tiles; n++) {
                int64_t o = (tile + n) * LANES;
                sum[r][n] = f32_load_n(p->out + (row + r) * p->num_outputs + o, (int)min_i64(LANES, p->num_outputs - o));
            }
    for (int64_t line = now.start; line < now.end; line++) {
        const float *at = weight + line * stride * LANES;
        f32x16 w[NUM_TILES];
        for (int n = 0; n < tiles; n++) w[n] = f32_load(at + n * LANES);
        for (int64_t n = 0; n < now.num_fetched; n++)
            __builtin_prefetch(at + (LINES_PER_SHORT_TURN * stride + now.first_fetched + n) * LANES);
        if (!is_bf16) {
            add_products(sum, x + line, p->num_inputs, w, rows, tiles);
            continue;
        }
        f32x16 even[NUM_TILES], odd[NUM_TILES];
        for (int n = 0; n < tiles; n++) {
            even[n] = (f32x16)((u32x16)w[n] << 16);
            odd[n] = (f32x16)((u32x16)w[n] & 0xffff0000);
        }
        add_products(sum, x + 2 * line, p->num_inputs, even, rows, tiles);
        if (2 * line + 1 < p->num_inputs) add_products(sum, x + 2 * line + 1, p->num_inputs, odd, rows, tiles);
    }
    for (int n = 0; n < tiles; n++) {
        int64_t o = (tile + n) * LANES, left = p->num_outputs - o;
        f32x16 bias = {};
        if (now.end == num_lines && p->bias != NULL) bias = f32_load_n(p->bias + o, (int)min_i64(LANES, left));
        for (int r = 0; r < rows; r++)
            store_outputs(p->out + (row + r) * p->num_outputs + o, sum[r][n] + bias, left);
    }
}

INLINE void run_task(const product *p, int64_t index, const int is_bf16) {
    const int64_t num_lines = lines_per_tile(p->num_inputs, is_bf16), num_blocks = ceil_div(p->num_rows, MAX_ROWS);
    const int is_short = num_blocks > 1 && num_blocks <= MAX_BLOCKS_OF_SHORT_TURNS;
    const int64_t step = is_short ? LINES_PER_SHORT_TURN : LINES_PER_TURN;
#define CASE(rows, tiles) block(p, row, first, now, rows, tiles, is_bf16)
#define BODY(tile, tiles)                                                                                 \
    for (int64_t start = 0, first = tile; start < num_lines; start += step)                               \
        for (int64_t row = 0, at = 0, rows; at < num_blocks; row += rows, at++) {                         \
            turn now = {start, min_i64(start + step, num_lines), 0, 0};                                   \
            rows = ceil_div(p->num_rows - row, num_blocks - at);                                          \
            if (is_short) {                                                                               \
                now.first_fetched = tiles * at / num_blocks;                                              \
                now.num_fetched = tiles * (at + 1) / num_blocks - now.first_fetched;                      \
            }                                                                                             \
            SWITCH_ROWS(CASE, rows, tiles)                                                                \
        }
    FOR_TILES(p->split, p->num_outputs, index, BODY)
#undef BODY
#undef CASE
}

static void run_float32(void *context, int64_t index, int32_t thread) {
    (void)thread;
    run_task(context, index, 0);
}

static void run_bfloat16(void *context, int64_t index, int32_t thread) {
    (void)thread;
    run_task(context, index, 1);
}

#define DEFINE_LINEAR(format)                                                                                           \
    void OP(linear_##format)(const float *x, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group, \
                             const uint8_t *weight, const float *bias, float *out, uint8_t *scratch) {                 \
        (void)group, (void)scratch;                                                                                     \
        product p = {x, num_rows, num_inputs, num_outputs, weight, bias, out, split_tasks(num_outputs)};               \
        pool_run(num_tasks_of(p.split), run_##format, &p);                                                              \
    }                                                                                                                   \
    void OP(linear_##format##_replay)(const cell *a) {                                                                  \
        OP(linear_##format)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p);                    \
    }
DEFINE_LINEAR(float32)
DEFINE_LINEAR(bfloat16)

typedef struct {
    const float *rows;
    int64_t num_rows, num_inputs, num_outputs, first_tile;
    void *weight;
    int is_bf16;
} packing;

static void pack_tile(void *context, int64_t index, int32_t thread) {
    const packing *p = context;
    (void)thread;
    const int64_t per_line = p->is_bf16 ? 2 : 1, num_lines = lines_per_tile(p->num_inputs, p->is_bf16);
    line_range lines = lines_of(p->first_tile + index, p->num_outputs, num_lines);
    for (int64_t k = 0; k < num_lines * per_line; k++)
        for (int64_t o = 0; o < LANES; o++) {
            int64_t row = index * LANES + o, to = (lines.first + k / per_line * lines.stride) * LANES + o;
            float value = row < p->num_rows && k < p->num_inputs ? p->rows[row * p->num_inputs + k] : 0.0f;
            if (p->is_bf16)
                ((uint16_t *)p->weight)[2 * to + k % 2] = bf16_of(value);
            else
                ((float *)p->weight)[to] = value;
        }
}

/* Packs outputs first_row .. first_row + num_rows of a matrix. first_row is a multiple of 16, and so is the end unless it
 * is the matrix's. */
#define DEFINE_PACK(format, bf16)                                                                           \
    void OP(pack_##format)(const float *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,   \
                           int64_t group, int64_t first_row, uint8_t *weight) {                             \
        (void)group;                                                                                        \
        packing p = {rows, num_rows, num_inputs, num_outputs, first_row / LANES, weight, bf16};             \
        pool_run(ceil_div(num_rows, LANES), pack_tile, &p);                                                 \
    }
DEFINE_PACK(float32, 0)
DEFINE_PACK(bfloat16, 1)

/* Output ids[i] - first_id of the matrix, as the kernel takes it, to out[i]; zeros where it has no such output. */
#define DEFINE_UNPACK(format, element, per_line, as_float)                                                          \
    void OP(unpack_##format)(const int64_t *ids, int64_t first_id, int64_t num_ids, int64_t num_inputs,            \
                             int64_t num_outputs, int64_t group, const uint8_t *weight, float *out) {              \
        (void)group;                                                                                                \
        for (int64_t i = 0; i < num_ids; i++, out += num_inputs) {                                                  \
            const int64_t row = ids[i] - first_id;                                                                  \
            if (row < 0 || row >= num_outputs) {                                                                    \
                memset(out, 0, (size_t)num_inputs * sizeof *out);                                                   \
                continue;                                                                                           \
            }                                                                                                       \
            line_range lines = lines_of(row / LANES, num_outputs, ceil_div(num_inputs, per_line));                  \
            const element *from = (const element *)weight + (lines.first * LANES + row % LANES) * per_line;         \
            for (int64_t k = 0; k < num_inputs; k++)                                                                \
                out[k] = as_float(from[k / per_line * lines.stride * LANES * per_line + k % per_line]);             \
        }                                                                                                           \
    }                                                                                                               \
    void OP(unpack_##format##_replay)(const cell *a) {                                                              \
        OP(unpack_##format)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].i, a[6].p, a[7].p);                        \
    }
DEFINE_UNPACK(float32, float, 1, )
DEFINE_UNPACK(bfloat16, uint16_t, 2, f32_of_bf16)
