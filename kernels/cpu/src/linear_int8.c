/* y[t, o] = scale[o] * sum over groups g of s[t, g] * sum over k in g of q[t, k] * w[o, k]  (+ bias[o])
 *
 * Weights w: int8 with one scale per output (symmetric, absmax / 127), stored plus 128 as unsigned bytes, which is what
 * the dot product takes. Rows q, s: see quantized_rows.h. Sums within a group are exact integers; groups, and then the
 * row's outliers x[t, k] * w[o, k], are added in order, in float32.
 *
 * Packed: lines of [16 outputs][4 inputs] bytes as linear.h orders them, then [tiles * 16] scales. Inputs are padded to
 * whole groups with zeros. group: a multiple of 16.
 */
#include "program.h"
#include "quantized_rows.h"

#define MIN_BLOCKS 3 /* of prefetch_of, as measured */

typedef struct {
    quantized_rows x;
    int64_t num_outputs;
    const uint8_t *weight;
    const float *weight_scale, *bias;
    float *out;
    task_split split;
} product;

/* Behind the weights. */
INLINE const float *scales_of(const uint8_t *weight, int64_t num_outputs, int64_t padded_inputs) {
    return (const float *)(weight + ceil_div(num_outputs, LANES) * LANES * padded_inputs);
}

INLINE void block(const product *p, int64_t row, int64_t tile, prefetch next, const int rows, const int tiles) {
    const int64_t num_groups = p->x.num_groups, group = p->x.group, inputs = num_groups * group;
    const line_range lines = lines_of(tile, p->num_outputs, inputs / 4);
    const int64_t stride = tiles == 1 ? lines.stride : STRIP_TILES;
    const uint8_t *weight = p->weight + lines.first * 64;
    const int8_t *q = p->x.q + row * inputs;
    const float *scale = p->x.scale + row * num_groups;
    const int32_t *q_sum = p->x.sum + row * num_groups;
    f32x16 sum[MAX_ROWS][NUM_TILES] = {};
    for (int64_t g = 0; g < num_groups; g++) {
        i32x16 dot[MAX_ROWS][NUM_TILES];
        for (int r = 0; r < rows; r++) /* what the 128 on every weight adds too much */
            for (int n = 0; n < tiles; n++) dot[r][n] = (i32x16){} - 128 * q_sum[r * num_groups + g];
        for (int64_t k = g * group; k < (g + 1) * group; k += 4) {
            bytes w[NUM_TILES];
            for (int i = 0; i < next.lines_at_once; i++, next.from += 64) __builtin_prefetch(next.from, 0, 2);
            for (int n = 0; n < tiles; n++) {
                i32x16 raw;
                memcpy(&raw, weight + (k / 4 * stride + n) * 64, sizeof raw);
                w[n] = bytes_unsigned(raw);
            }
            for (int r = 0; r < rows; r++) {
                bytes x = bytes_signed_set1(q + r * inputs + k);
                for (int n = 0; n < tiles; n++) dot[r][n] = i32_dot(dot[r][n], w[n], x);
            }
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < tiles; n++)
                sum[r][n] = f32_fma(f32_from_i32(dot[r][n]), f32_set1(scale[r * num_groups + g]), sum[r][n]);
    }
    for (int r = 0; r < rows; r++) {
        const outliers *out = p->x.outlier + row + r;
        for (int32_t i = 0; i < out->count; i++)
            for (int n = 0; n < tiles; n++) {
                int32_t k = out->input[i];
                i32x16 raw;
                memcpy(&raw, weight + (k / 4 * stride + n) * 64, sizeof raw);
                f32x16 w = f32_from_i32((i32x16)((u32x16)raw >> (uint32_t)(k % 4 * 8)) & 255) - 128.0f;
                sum[r][n] = f32_fma(w, f32_set1(out->value[i]), sum[r][n]);
            }
    }
    for (int n = 0; n < tiles; n++) {
        int64_t o = (tile + n) * LANES, left = p->num_outputs - o;
        f32x16 factor = f32_load(p->weight_scale + o);
        f32x16 bias = p->bias == NULL ? (f32x16){} : f32_load_n(p->bias + o, (int)min_i64(LANES, left));
        for (int r = 0; r < rows; r++)
            store_outputs(p->out + (row + r) * p->num_outputs + o, f32_fma(sum[r][n], factor, bias), left);
    }
}

static void run_task(void *context, int64_t index, int32_t thread) {
    const product *p = context;
    (void)thread;
    const int64_t num_blocks = ceil_div(p->x.num_rows, MAX_ROWS), num_lines = p->x.num_groups * p->x.group / 4;
#define CASE(rows, tiles) block(p, row, first, next, rows, tiles)
#define BODY(tile, tiles)                                                                             \
    for (int64_t row = 0, at = 0, first = tile, rows; at < num_blocks; row += rows, at++) {           \
        prefetch next = prefetch_of(p->weight, first, num_lines, at, num_blocks, MIN_BLOCKS);         \
        rows = ceil_div(p->x.num_rows - row, num_blocks - at);                                        \
        SWITCH_ROWS(CASE, rows, tiles)                                                                \
    }
    FOR_TILES(p->split, p->num_outputs, index, BODY)
#undef BODY
#undef CASE
}

/* scratch: rows * quantized_row_bytes. */
void OP(linear_int8)(const float *x, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                     const uint8_t *weight, const float *bias, float *out, uint8_t *scratch) {
    product p = {quantized_rows_in(scratch, x, num_rows, num_inputs, group), num_outputs, weight, NULL, bias, out,
                 split_tasks(num_outputs)};
    p.weight_scale = scales_of(weight, num_outputs, p.x.num_groups * group);
    quantize(&p.x);
    pool_run(num_tasks_of(p.split), run_task, &p);
}

void OP(linear_int8_replay)(const cell *a) {
    OP(linear_int8)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p);
}

typedef struct {
    const float *rows;
    int64_t num_rows, num_inputs, num_outputs, padded_inputs, first_tile;
    uint8_t *weight;
    float *weight_scale;
} packing;

static void pack_tile(void *context, int64_t index, int32_t thread) {
    const packing *p = context;
    (void)thread;
    line_range lines = lines_of(p->first_tile + index, p->num_outputs, p->padded_inputs / 4);
    uint8_t *to = p->weight + lines.first * 64;
    for (int64_t line = 0; line < p->padded_inputs / 4; line++) memset(to + line * lines.stride * 64, 128, 64);
    for (int64_t o = 0; o < LANES; o++) {
        float *scale = p->weight_scale + (p->first_tile + index) * LANES + o;
        *scale = 0;
        if (index * LANES + o >= p->num_rows) continue;
        const float *from = p->rows + (index * LANES + o) * p->num_inputs;
        float absmax = 0;
        for (int64_t k = 0; k < p->num_inputs; k++) absmax = fabsf(from[k]) > absmax ? fabsf(from[k]) : absmax;
        float inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
        *scale = absmax / 127.0f;
        for (int64_t k = 0; k < p->num_inputs; k++)
            to[k / 4 * lines.stride * 64 + o * 4 + k % 4] = (uint8_t)((int32_t)rintf(from[k] * inverse) + 128);
    }
}

/* Packs outputs first_row .. first_row + num_rows of a matrix. first_row is a multiple of 16, and so is the end unless it
 * is the matrix's. */
void OP(pack_int8)(const float *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                   int64_t first_row, uint8_t *weight) {
    int64_t padded = ceil_div(num_inputs, group) * group;
    float *scale = (float *)scales_of(weight, num_outputs, padded);
    packing p = {rows, num_rows, num_inputs, num_outputs, padded, first_row / LANES, weight, scale};
    pool_run(ceil_div(num_rows, LANES), pack_tile, &p);
}

/* Output ids[i] - first_id of the matrix, as the kernel takes it, to out[i]; zeros where it has no such output. */
void OP(unpack_int8)(const int64_t *ids, int64_t first_id, int64_t num_ids, int64_t num_inputs, int64_t num_outputs,
                     int64_t group, const uint8_t *weight, float *out) {
    int64_t padded = ceil_div(num_inputs, group) * group;
    const float *scale = scales_of(weight, num_outputs, padded);
    for (int64_t i = 0; i < num_ids; i++, out += num_inputs) {
        const int64_t row = ids[i] - first_id;
        if (row < 0 || row >= num_outputs) {
            memset(out, 0, (size_t)num_inputs * sizeof *out);
            continue;
        }
        line_range lines = lines_of(row / LANES, num_outputs, padded / 4);
        const uint8_t *from = weight + lines.first * 64 + row % LANES * 4;
        for (int64_t k = 0; k < num_inputs; k++)
            out[k] = (float)(from[k / 4 * lines.stride * 64 + k % 4] - 128) * scale[row];
    }
}

void OP(unpack_int8_replay)(const cell *a) {
    OP(unpack_int8)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].i, a[6].p, a[7].p);
}
