/* y[t, o] = sum over groups g of s[t, g] * scale[o, g] * sum over k in g of q[t, k] * (w[o, k] - zero[o, g])  (+ bias[o])
 *
 * Weights w: 0..15, with a scale and a zero per output and group of inputs. Rows q, s: see quantized_rows.h, with the same
 * groups. Sums within a group are exact integers; groups, and then the row's outliers times their weights, are added in
 * order, in float32.
 *
 * Packed: lines as linear.h orders them; for each group group / 8 lines of [16 outputs][4] bytes, byte i of the four
 * holding input i in its low half and input 4 + i in its high one, then a line of [16] ranges: float32 scales whose lowest
 * four bits are the zero instead. Inputs are padded to whole groups with the zero. group: a multiple of 16.
 */
#include "program.h"
#include "quantized_rows.h"

#define MIN_BLOCKS 2 /* of prefetch_of, as measured */

typedef struct {
    quantized_rows x;
    int64_t num_outputs;
    const uint8_t *weight;
    const float *bias;
    float *out;
    task_split split;
} product;

/* Of one group of a tile. */
INLINE int64_t group_lines(int64_t group) { return group / 8 + 1; }

INLINE void block(const product *p, int64_t row, int64_t tile, prefetch next, const int rows, const int tiles) {
    const int64_t num_groups = p->x.num_groups, group = p->x.group, inputs = num_groups * group;
    const line_range lines = lines_of(tile, p->num_outputs, num_groups * group_lines(group));
    const int64_t stride = tiles == 1 ? lines.stride : STRIP_TILES;
    const uint8_t *first = p->weight + lines.first * 64, *weight = first;
    const int8_t *q = p->x.q + row * inputs;
    const float *scale = p->x.scale + row * num_groups;
    const int32_t *q_sum = p->x.sum + row * num_groups;
    f32x16 sum[MAX_ROWS][NUM_TILES] = {};
    for (int64_t g = 0; g < num_groups; g++, weight += group_lines(group) * stride * 64) {
        i32x16 dot[MAX_ROWS][NUM_TILES] = {};
        for (int64_t k = 0; k < group; k += 8) {
            bytes low[NUM_TILES], high[NUM_TILES];
            for (int i = 0; i < next.lines_at_once; i++, next.from += 64) __builtin_prefetch(next.from, 0, 2);
            for (int n = 0; n < tiles; n++) {
                i32x16 raw;
                memcpy(&raw, weight + (k / 8 * stride + n) * 64, sizeof raw);
                low[n] = bytes_unsigned(raw & 0x0f0f0f0f);
                high[n] = bytes_unsigned((i32x16)((u32x16)raw >> 4) & 0x0f0f0f0f);
            }
            for (int r = 0; r < rows; r++) {
                const int8_t *x = q + r * inputs + g * group + k;
                bytes first = bytes_signed_set1(x), second = bytes_signed_set1(x + 4);
                for (int n = 0; n < tiles; n++) dot[r][n] = i32_dot(dot[r][n], low[n], first);
                for (int n = 0; n < tiles; n++) dot[r][n] = i32_dot(dot[r][n], high[n], second);
            }
        }
        for (int n = 0; n < tiles; n++) {
            i32x16 range;
            memcpy(&range, weight + (group / 8 * stride + n) * 64, sizeof range);
            f32x16 weight_scale = (f32x16)(range & ~15), zero = f32_from_i32(range & 15);
            for (int r = 0; r < rows; r++) { /* the first sum is exact: whole numbers below 2^24 */
                f32x16 whole = f32_fma(zero, f32_set1((float)-q_sum[r * num_groups + g]), f32_from_i32(dot[r][n]));
                sum[r][n] = f32_fma(whole, weight_scale * scale[r * num_groups + g], sum[r][n]);
            }
        }
    }
    for (int r = 0; r < rows; r++) {
        const outliers *out = p->x.outlier + row + r;
        for (int32_t i = 0; i < out->count; i++)
            for (int n = 0; n < tiles; n++) {
                int32_t k = out->input[i] % (int32_t)group;
                const uint8_t *from = first + (out->input[i] / group * group_lines(group) * stride + n) * 64;
                i32x16 raw, range;
                memcpy(&raw, from + k / 8 * stride * 64, sizeof raw);
                memcpy(&range, from + group / 8 * stride * 64, sizeof range);
                raw = (i32x16)((u32x16)raw >> (uint32_t)(k % 4 * 8 + (k % 8 < 4 ? 0 : 4))) & 15;
                f32x16 w = f32_from_i32(raw - (range & 15)) * (f32x16)(range & ~15);
                sum[r][n] = f32_fma(w, f32_set1(out->value[i]), sum[r][n]);
            }
    }
    for (int n = 0; n < tiles; n++) {
        int64_t o = (tile + n) * LANES, left = p->num_outputs - o;
        f32x16 bias = p->bias == NULL ? (f32x16){} : f32_load_n(p->bias + o, (int)min_i64(LANES, left));
        for (int r = 0; r < rows; r++)
            store_outputs(p->out + (row + r) * p->num_outputs + o, sum[r][n] + bias, left);
    }
}

static void run_task(void *context, int64_t index, int32_t thread) {
    const product *p = context;
    (void)thread;
    const int64_t num_blocks = ceil_div(p->x.num_rows, MAX_ROWS);
    const int64_t num_lines = p->x.num_groups * group_lines(p->x.group);
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
void OP(linear_int4)(const float *x, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                     const uint8_t *weight, const float *bias, float *out, uint8_t *scratch) {
    product p = {quantized_rows_in(scratch, x, num_rows, num_inputs, group), num_outputs, weight, bias, out,
                 split_tasks(num_outputs)};
    quantize(&p.x);
    pool_run(num_tasks_of(p.split), run_task, &p);
}

void OP(linear_int4_replay)(const cell *a) {
    OP(linear_int4)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p);
}

typedef struct {
    const float *rows;
    int64_t num_rows, num_inputs, num_outputs, group, num_groups, first_tile;
    uint8_t *weight;
} packing;

typedef struct {
    float scale, zero;
} range;

/* The scale as it is stored: its lowest four bits make room for the zero. */
static uint32_t scale_bits(float scale) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof bits);
    return bits & ~(uint32_t)15;
}

static float stored_scale(float scale) {
    uint32_t bits = scale_bits(scale);
    memcpy(&scale, &bits, sizeof scale);
    return scale;
}

/* Squared error of `from` in 0..15 steps of r. */
static float range_error(const float *from, int64_t count, range r) {
    float error = 0, inverse = 1.0f / r.scale;
    for (int64_t k = 0; k < count; k++) {
        float level = rintf(from[k] * inverse) + r.zero;
        level = level < 0 ? 0 : level > 15 ? 15 : level;
        float difference = (level - r.zero) * r.scale - from[k];
        error += difference * difference;
    }
    return error;
}

/* The scale and zero with the least squared error among ranges shrunk from [min, max] in steps of 5 %: clipping the
 * group's extremes often costs less than coarse steps for all the rest. */
static range best_range(const float *from, int64_t count) {
    float low = 0, high = 0; /* zero itself always has a level */
    for (int64_t k = 0; k < count; k++) {
        low = from[k] < low ? from[k] : low;
        high = from[k] > high ? from[k] : high;
    }
    if (high - low <= 0) return (range){0.0f, 8.0f};
    range best = {0};
    float least = INFINITY;
    for (int step = 0; step < 8; step++) {
        float shrink = 1.0f - 0.05f * (float)step, scale = stored_scale((high - low) * shrink / 15.0f);
        if (!(1.0f / scale <= 3.4e38f)) return (range){0.0f, 8.0f};
        float zero = rintf(-low * shrink / scale);
        range candidate = {scale, zero < 0 ? 0 : zero > 15 ? 15 : zero};
        float error = range_error(from, count, candidate);
        if (error < least) least = error, best = candidate;
    }
    return best;
}

/* `to` is the group's first line, the next ones are `stride` lines apart. */
static void pack_group(uint8_t *to, int64_t stride, int64_t group, int64_t o, const float *from, int64_t count) {
    range r = best_range(from, count);
    float inverse = r.scale > 0 ? 1.0f / r.scale : 0.0f;
    for (int64_t k = 0; k < group; k++) {
        float level = k < count ? rintf(from[k] * inverse) + r.zero : r.zero;
        uint8_t nibble = (uint8_t)(level < 0 ? 0 : level > 15 ? 15 : level);
        to[k / 8 * stride * 64 + o * 4 + k % 4] |= (uint8_t)(k % 8 < 4 ? nibble : nibble << 4);
    }
    uint32_t bits = scale_bits(r.scale) | (uint32_t)r.zero;
    memcpy(to + group / 8 * stride * 64 + o * 4, &bits, sizeof bits);
}

static void pack_tile(void *context, int64_t index, int32_t thread) {
    const packing *p = context;
    (void)thread;
    int64_t num_lines = p->num_groups * group_lines(p->group);
    line_range lines = lines_of(p->first_tile + index, p->num_outputs, num_lines);
    uint8_t *to = p->weight + lines.first * 64;
    for (int64_t line = 0; line < num_lines; line++) memset(to + line * lines.stride * 64, 0, 64);
    for (int64_t g = 0; g < p->num_groups; g++, to += group_lines(p->group) * lines.stride * 64)
        for (int64_t o = 0; o < min_i64(LANES, p->num_rows - index * LANES); o++)
            pack_group(to, lines.stride, p->group, o, p->rows + (index * LANES + o) * p->num_inputs + g * p->group,
                       min_i64(p->group, p->num_inputs - g * p->group));
}

/* Packs outputs first_row .. first_row + num_rows of a matrix. first_row is a multiple of 16, and so is the end unless it
 * is the matrix's. */
void OP(pack_int4)(const float *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                   int64_t first_row, uint8_t *weight) {
    packing p = {rows, num_rows, num_inputs, num_outputs, group, ceil_div(num_inputs, group), first_row / LANES, weight};
    pool_run(ceil_div(num_rows, LANES), pack_tile, &p);
}

/* Output ids[i] - first_id of the matrix, as the kernel takes it, to out[i]; zeros where it has no such output. */
void OP(unpack_int4)(const int64_t *ids, int64_t first_id, int64_t num_ids, int64_t num_inputs, int64_t num_outputs,
                     int64_t group, const uint8_t *weight, float *out) {
    int64_t num_groups = ceil_div(num_inputs, group);
    for (int64_t i = 0; i < num_ids; i++, out += num_inputs) {
        const int64_t row = ids[i] - first_id;
        if (row < 0 || row >= num_outputs) {
            memset(out, 0, (size_t)num_inputs * sizeof *out);
            continue;
        }
        line_range lines = lines_of(row / LANES, num_outputs, num_groups * group_lines(group));
        const uint8_t *from = weight + lines.first * 64 + row % LANES * 4;
        for (int64_t g = 0; g < num_groups; g++, from += group_lines(group) * lines.stride * 64) {
            uint32_t bits;
            memcpy(&bits, from + group / 8 * lines.stride * 64, sizeof bits);
            float scale, zero = (float)(bits & 15);
            bits &= ~(uint32_t)15;
            memcpy(&scale, &bits, sizeof scale);
            for (int64_t k = g * group; k < min_i64((g + 1) * group, num_inputs); k++) {
                int64_t j = k % group;
                uint8_t pair = from[j / 8 * lines.stride * 64 + j % 4];
                out[k] = ((float)(j % 8 < 4 ? pair & 15 : pair >> 4) - zero) * scale;
            }
        }
    }
}

void OP(unpack_int4_replay)(const cell *a) {
    OP(unpack_int4)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].i, a[6].p, a[7].p);
}
