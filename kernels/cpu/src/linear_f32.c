/* y[t, o] = sum over k of x[t, k] * w[o, k]  (+ bias[o]), added in the order of k by fused multiply-adds.
 *
 * Weights w: float32 or bfloat16; a bfloat16 weight is exact in float32, so both give the same numbers.
 *
 * Packed: [tiles][inputs][16 outputs].
 */
#include "linear.h"
#include "program.h"

#define INPUTS_PER_PASS 512 /* a strip's weights of so many inputs stay in the second-level cache for all rows */

typedef struct {
    const float *x;
    int64_t num_rows, num_inputs, num_outputs;
    const void *weight;
    const float *bias;
    float *out;
} product;

INLINE f32x16 weights_at(const void *weight, int64_t index, const int is_bf16) {
    return is_bf16 ? f32_from_bf16((const uint16_t *)weight + index) : f32_load((const float *)weight + index);
}

/* Adds the inputs start .. end to the sums in p->out, which start from 0. */
INLINE void block(const product *p, int64_t row, int64_t tile, int64_t start, int64_t end, const int rows,
                  const int tiles, const int is_bf16) {
    const float *x = p->x + row * p->num_inputs;
    f32x16 sum[MAX_ROWS][NUM_TILES] = {};
    if (start > 0)
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < tiles; n++) {
                int64_t o = (tile + n) * LANES;
                sum[r][n] = f32_load_n(p->out + (row + r) * p->num_outputs + o, (int)min_i64(LANES, p->num_outputs - o));
            }
    for (int64_t k = start; k < end; k++) {
        f32x16 w[NUM_TILES];
        for (int n = 0; n < tiles; n++) w[n] = weights_at(p->weight, ((tile + n) * p->num_inputs + k) * LANES, is_bf16);
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

INLINE void strip(const product *p, int64_t index, const int is_bf16) {
    int64_t num_tiles = ceil_div(p->num_outputs, LANES), last = min_i64((index + 1) * NUM_TILES, num_tiles);
    int64_t tile = index * NUM_TILES;
    int64_t tiles = last - tile == NUM_TILES ? NUM_TILES : 1;
    /* One block of rows reads every weight once anyhow. */
    int64_t pass = p->num_rows <= MAX_ROWS ? p->num_inputs : INPUTS_PER_PASS;
    for (; tile < last; tile += tiles)
        for (int64_t start = 0; start < p->num_inputs; start += pass)
            for (int64_t row = 0; row < p->num_rows; row += MAX_ROWS) {
                int64_t end = min_i64(start + pass, p->num_inputs);
#define CASE(rows, tiles) block(p, row, tile, start, end, rows, tiles, is_bf16)
                SWITCH_BLOCK(CASE, min_i64(MAX_ROWS, p->num_rows - row), tiles)
#undef CASE
            }
}

static void strip_float32(void *context, int64_t index, int32_t thread) {
    (void)thread;
    strip(context, index, 0);
}

static void strip_bfloat16(void *context, int64_t index, int32_t thread) {
    (void)thread;
    strip(context, index, 1);
}

#define DEFINE_LINEAR(format)                                                                                           \
    void OP(linear_##format)(const float *x, int64_t num_rows, int64_t num_inputs, int64_t num_outputs, int64_t group, \
                             const uint8_t *weight, const float *bias, float *out, uint8_t *scratch) {                 \
        (void)group, (void)scratch;                                                                                     \
        product p = {x, num_rows, num_inputs, num_outputs, weight, bias, out};                                         \
        pool_run(ceil_div(ceil_div(num_outputs, LANES), NUM_TILES), strip_##format, &p);                               \
    }                                                                                                                   \
    void OP(linear_##format##_replay)(const cell *a) {                                                                  \
        OP(linear_##format)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p, a[7].p, a[8].p);                    \
    }
DEFINE_LINEAR(float32)
DEFINE_LINEAR(bfloat16)

typedef struct {
    const float *rows;
    int64_t num_rows, num_inputs;
    void *weight;
    int is_bf16;
} packing;

static void pack_tile(void *context, int64_t index, int32_t thread) {
    const packing *p = context;
    (void)thread;
    for (int64_t k = 0; k < p->num_inputs; k++)
        for (int64_t o = 0; o < LANES; o++) {
            int64_t row = index * LANES + o, to = (index * p->num_inputs + k) * LANES + o;
            float value = row < p->num_rows ? p->rows[row * p->num_inputs + k] : 0.0f;
            if (p->is_bf16)
                ((uint16_t *)p->weight)[to] = bf16_of(value);
            else
                ((float *)p->weight)[to] = value;
        }
}

/* Packs outputs first_row .. first_row + num_rows of a matrix. first_row is a multiple of 16, and so is the end unless it
 * is the matrix's. */
#define DEFINE_PACK(format, element, bf16)                                                                        \
    void OP(pack_##format)(const float *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,         \
                           int64_t group, int64_t first_row, uint8_t *weight) {                                   \
        (void)group, (void)num_outputs;                                                                           \
        packing p = {rows, num_rows, num_inputs, weight + first_row * num_inputs * (int64_t)sizeof(element), bf16}; \
        pool_run(ceil_div(num_rows, LANES), pack_tile, &p);                                                       \
    }
DEFINE_PACK(float32, float, 0)
DEFINE_PACK(bfloat16, uint16_t, 1)

/* Output rows[i] of the matrix, as the kernel takes it, to out[i]. */
#define DEFINE_UNPACK(format, element, as_float)                                                                    \
    void OP(unpack_##format)(const int64_t *rows, int64_t num_rows, int64_t num_inputs, int64_t num_outputs,       \
                             int64_t group, const uint8_t *weight, float *out) {                                    \
        (void)group, (void)num_outputs;                                                                             \
        for (int64_t i = 0; i < num_rows; i++, out += num_inputs) {                                                 \
            const element *from = (const element *)weight + rows[i] / LANES * LANES * num_inputs + rows[i] % LANES; \
            for (int64_t k = 0; k < num_inputs; k++) out[k] = as_float(from[k * LANES]);                            \
        }                                                                                                           \
    }                                                                                                               \
    void OP(unpack_##format##_replay)(const cell *a) {                                                              \
        OP(unpack_##format)(a[0].p, a[1].i, a[2].i, a[3].i, a[4].i, a[5].p, a[6].p);                                \
    }
DEFINE_UNPACK(float32, float, )
DEFINE_UNPACK(bfloat16, uint16_t, f32_of_bf16)
