/* y[t, o] = sum over k of x[t, k] * w[o, k]  (+ bias[o]), added in the order of k by fused multiply-adds.
 *
 * Weights w: float32 or bfloat16; a bfloat16 weight is exact in float32, so both give the same numbers.
 *
 * Packed: lines of [16 outputs] as linear.h orders them.
 */
#include "linear.h"
#include "program.h"

#define INPUTS_PER_PASS 2048 /* a strip's weights of so many inputs stay in the second-level cache for all rows */

typedef struct {
    const float *x;
    int64_t num_rows, num_inputs, num_outputs;
    const void *weight;
    const float *bias;
    float *out;
    task_split split;
} product;

INLINE f32x16 weights_at(const void *weight, int64_t line, const int is_bf16) {
    return is_bf16 ? f32_from_bf16((const uint16_t *)weight + line * LANES) : f32_load((const float *)weight + line * LANES);
}

/* Adds the inputs start .. end to the sums in p->out, which start from 0. */
INLINE void block(const product *p, int64_t row, int64_t tile, int64_t start, int64_t end, const int rows,
                  const int tiles, const int is_bf16) {
    const float *x = p->x + row * p->num_inputs;
    const line_range lines = lines_of(tile, p->num_outputs, p->num_inputs);
    const int64_t stride = tiles == 1 ? lines.stride : STRIP_TILES;
    f32x16 sum[MAX_ROWS][NUM_TILES] = {};
    if (start > 0)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < tiles; n++) {
                int64_t o = (tile + n) * LANES;
                sum[r][n] = f32_load_n(p->out + (row + r) * p->num_outputs + o, (int)min_i64(LANES, p->num_outputs - o));
            }
    for (int64_t k = start; k < end; k++) {
        f32x16 w[NUM_TILES];
        for (int n = 0; n < tiles; n++) w[n] = weights_at(p->weight, lines.first + k * stride + n, is_bf16);
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < tiles; n++) sum[r][n] = f32_fma(f32_set1(x[r * p->num_inputs + k]), w[n], sum[r][n]);
    }
    for (int n = 0; n < tiles; n++) {
        int64_t o = (tile + n) * LANES, left = p->num_outputs - o;
        f32x16 bias = {};
        if (end == p->num_inputs && p->bias != NULL) bias = f32_load_n(p->bias + o, (int)min_i64(LANES, left));
        for (int r = 0; r < rows; r++)
            store_outputs(p->out + (row + r) * p->num_outputs + o, sum[r][n] + bias, left);
    }
}

INLINE void run_task(const product *p, int64_t index, const int is_bf16) {
#define CASE(rows, tiles) \
    block(p, row, first, start, min_i64(start + INPUTS_PER_PASS, p->num_inputs), rows, tiles, is_bf16)
#define BODY(tile, tiles)                                                                           \
    for (int64_t start = 0, first = tile; start < p->num_inputs; start += INPUTS_PER_PASS)          \
        for (int64_t row = 0; row < p->num_rows; row += MAX_ROWS) {                                 \
            SWITCH_ROWS(CASE, min_i64(MAX_ROWS, p->num_rows - row), tiles)                          \
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
    line_range lines = lines_of(p->first_tile + index, p->num_outputs, p->num_inputs);
    for (int64_t k = 0; k < p->num_inputs; k++)
        for (int64_t o = 0; o < LANES; o++) {
            int64_t row = index * LANES + o, to = (lines.first + k * lines.stride) * LANES + o;
            float value = row < p->num_rows ? p->rows[row * p->num_inputs + k] : 0.0f;
            if (p->is_bf16)
                ((uint16_t *)p->weight)[to] = bf16_of(value);
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
#define DEFINE_UNPACK(format, element, as_float)                                                                    \
    void OP(unpack_##format)(const int64_t *ids, int64_t first_id, int64_t num_ids, int64_t num_inputs,            \
                             int64_t num_outputs, int64_t group, const uint8_t *weight, float *out) {              \
        (void)group;                                                                                                \
        for (int64_t i = 0; i < num_ids; i++, out += num_inputs) {                                                  \
            const int64_t row = ids[i] - first_id;                                                                  \
            if (row < 0 || row >= num_outputs) {                                                                    \
                memset(out, 0, (size_t)num_inputs * sizeof *out);                                                   \
                continue;                                                                                           \
            }                                                                                                       \
            line_range lines = lines_of(row / LANES, num_outputs, num_inputs);                                      \
            const element *from = (const element *)weight + lines.first * LANES + row % LANES;                      \
            for (int64_t k = 0; k < num_inputs; k++) out[k] = as_float(from[k * lines.stride * LANES]);             \
        }                                                                                                           \
    }                                                                                                               \
    void OP(unpack_##format##_replay)(const cell *a) {                                                              \
        OP(unpack_##format)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].i, a[6].p, a[7].p);                        \
    }
DEFINE_UNPACK(float32, float, )
DEFINE_UNPACK(bfloat16, uint16_t, f32_of_bf16)
