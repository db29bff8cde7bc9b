/* y[t, o] = sum over groups g of s[t, g] * scale[o, g] * sum over k in g of q[t, k] * (w[o, k] - zero[o, g])  (+ bias[o])
 *
 * Weights w: 0..15, with a scale and a zero per output and group of inputs. Rows q, s: see quantized_rows.h, with the same
 * groups. Sums within a group are exact integers; groups are added in order, in float32.
 *
 * Packed per tile of 16 outputs: for each group [group / 8][16 outputs][4] bytes, byte i of the four holding input i in its
 * low half and input 4 + i in its high one; then [16] float32 scales, [16] float32 zeros (whole numbers). Inputs are padded
 * to whole groups with the weight zero. group: a multiple of 16.
 */
#include "program.h"
#include "quantized_rows.h"

typedef struct {
    quantized_rows x;
    int64_t num_outputs;
    const uint8_t *weight;
    const float *bias;
    float *out;
} product;

/* Bytes of one tile's group: weights, scales, zeros. */
INLINE int64_t group_bytes(int64_t group) { return group * LANES / 2 + 2 * LANES * (int64_t)sizeof(float); }

INLINE void block(const product *p, int64_t row, int64_t tile, const int rows, const int tiles) {
    const int64_t num_groups = p->x.num_groups, group = p->x.group, inputs = num_groups * group;
    const int64_t stride = group_bytes(group) * num_groups;
    const int8_t *q = p->x.q + row * inputs;
    const float *scale = p->x.scale + row * num_groups;
    const int32_t *q_sum = p->x.sum + row * num_groups;
    f32x16 sum[MAX_ROWS][NUM_TILES] = {};
    for (int64_t g = 0; g < num_groups; g++) {
        const uint8_t *weight = p->weight + tile * stride + g * group_bytes(group);
        i32x16 dot[MAX_ROWS][NUM_TILES] = {};
        for (int64_t k = 0; k < group; k += 8) {
            bytes low[NUM_TILES], high[NUM_TILES];
            for (int n = 0; n < tiles; n++) {
                i32x16 raw;
                memcpy(&raw, weight + n * stride + k * LANES / 2, sizeof raw);
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
            const float *scales = (const float *)(weight + n * stride + group * LANES / 2);
            f32x16 weight_scale = f32_load(scales), zero = f32_load(scales + LANES);
            for (int r = 0; r < rows; r++) { /* the first sum is exact: whole numbers below 2^24 */
                f32x16 whole = f32_fma(zero, f32_set1((float)-q_sum[r * num_groups + g]), f32_from_i32(dot[r][n]));
                sum[r][n] = f32_fma(whole, weight_scale * scale[r * num_groups + g], sum[r][n]);
            }
        }
    }
    for (int n = 0; n < tiles; n++) {
        int64_t o = (tile + n) * LANES, left = p->num_outputs - o;
        f32x16 bias = p->bias == NULL ? (f32x16){} : f32_load_n(p->bias + o, (int)min_i64(LANES, left));
        for (int r = 0; r < rows; r++)
            store_outputs(p->out + (row + r) * p->num_outputs + o, sum[r][n] + bias, left);
    }
}

static void strip(void *context, int64_t index, int32_t thread) {
    const product *p = context;
    (void)thread;
    int64_t num_tiles = ceil_div(p->num_outputs, LANES), end = min_i64((index + 1) * NUM_TILES, num_tiles);
    int64_t tile = index * NUM_TILES;
    int64_t tiles = end - tile == NUM_TILES ? NUM_TILES : 1;
    for (; tile < end; tile += tiles)
        for (int64_t row = 0; row < p->x.num_rows; row += MAX_ROWS) {
#define CASE(rows, tiles) block(p, row, tile, rows, tiles)
            SWITCH_BLOCK(CASE, min_i64(MAX_ROWS, p->x.num_rows - row), tiles)
#undef CASE
        }
}

/* scratch: rows * groups * (group + 8) bytes. */
void OP(linear_int4)(const float *x, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                     const uint8_t *weight, const float *bias, float *out, uint8_t *scratch) {
    product p = {quantized_rows_in(scratch, x, num_rows, num_inputs, group), num_outputs, weight, bias, out};
    quantize(&p.x);
    pool_run(ceil_div(ceil_div(num_outputs, LANES), NUM_TILES), strip, &p);
}

void OP(linear_int4_replay)(const cell *a) {
    OP(linear_int4)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p);
}

typedef struct {
    const float *rows;
    int64_t num_rows, num_inputs, group, num_groups;
    uint8_t *weight;
} packing;

typedef struct {
    float scale, zero;
} range;

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
        float shrink = 1.0f - 0.05f * (float)step, scale = (high - low) * shrink / 15.0f;
        if (!(1.0f / scale <= 3.4e38f)) return (range){0.0f, 8.0f};
        float zero = rintf(-low * shrink / scale);
        range candidate = {scale, zero < 0 ? 0 : zero > 15 ? 15 : zero};
        float error = range_error(from, count, candidate);
        if (error < least) least = error, best = candidate;
    }
    return best;
}

static void pack_group(uint8_t *to, int64_t group, int64_t o, const float *from, int64_t count) {
    range r = best_range(from, count);
    float inverse = r.scale > 0 ? 1.0f / r.scale : 0.0f;
    for (int64_t k = 0; k < group; k++) {
        float level = k < count ? rintf(from[k] * inverse) + r.zero : r.zero;
        uint8_t nibble = (uint8_t)(level < 0 ? 0 : level > 15 ? 15 : level);
        to[k / 8 * 64 + o * 4 + k % 4] |= (uint8_t)(k % 8 < 4 ? nibble : nibble << 4);
    }
    float *scales = (float *)(to + group * LANES / 2);
    scales[o] = r.scale;
    scales[LANES + o] = r.zero;
}

static void pack_tile(void *context, int64_t index, int32_t thread) {
    const packing *p = context;
    (void)thread;
    for (int64_t g = 0; g < p->num_groups; g++) {
        uint8_t *to = p->weight + (index * p->num_groups + g) * group_bytes(p->group);
        memset(to, 0, (size_t)group_bytes(p->group));
        for (int64_t o = 0; o < min_i64(LANES, p->num_rows - index * LANES); o++)
            pack_group(to, p->group, o, p->rows + (index * LANES + o) * p->num_inputs + g * p->group,
                       min_i64(p->group, p->num_inputs - g * p->group));
    }
}

/* Packs outputs first_row .. first_row + num_rows of a matrix. first_row is a multiple of 16, and so is the end unless it
 * is the matrix's. */
void OP(pack_int4)(const float *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                   int64_t first_row, uint8_t *weight) {
    (void)num_outputs;
    int64_t num_groups = ceil_div(num_inputs, group);
    packing p = {rows, num_rows, num_inputs, group, num_groups,
                 weight + first_row / LANES * num_groups * group_bytes(group)};
    pool_run(ceil_div(num_rows, LANES), pack_tile, &p);
}

/* Output rows[i] of the matrix, as the kernel takes it, to out[i]. */
void OP(unpack_int4)(const int64_t *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group,
                     const uint8_t *weight, float *out) {
    (void)num_outputs;
    int64_t num_groups = ceil_div(num_inputs, group);
    for (int64_t i = 0; i < num_rows; i++, out += num_inputs) {
        int64_t o = rows[i] % LANES;
        for (int64_t k = 0; k < num_inputs; k++) {
            const uint8_t *from = weight + (rows[i] / LANES * num_groups + k / group) * group_bytes(group);
            const float *scales = (const float *)(from + group * LANES / 2);
            int64_t j = k % group;
            uint8_t pair = from[j / 8 * 64 + o * 4 + j % 4];
            out[k] = ((float)(j % 8 < 4 ? pair & 15 : pair >> 4) - scales[LANES + o]) * scales[o];
        }
    }
}

void OP(unpack_int4_replay)(const cell *a) {
    OP(unpack_int4)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p);
}
