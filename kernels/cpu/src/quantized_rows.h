/* Rows of activations as int8, quantized anew in every call.
 *
 *     q[t, k] = round(x[t, k] / scale[t, g]),  scale[t, g] = max |x[t, k]| over the inputs k of group g, / 127
 *
 * A scale per row keeps requests independent of their batch; one per group of inputs confines an outlier to its group.
 */
#ifndef CLUSTER_QUANTIZED_ROWS_H
#define CLUSTER_QUANTIZED_ROWS_H

#include "linear.h"

typedef struct {
    const float *x; /* [rows][inputs] */
    int64_t num_rows, num_inputs, group, num_groups;
    float *scale; /* [rows][groups] */
    int32_t *sum; /* [rows][groups], of q */
    int8_t *q;    /* [rows][groups * group], zeros behind the inputs */
} quantized_rows;

/* scratch: rows * groups * (group + 8) bytes. */
INLINE quantized_rows quantized_rows_in(uint8_t *scratch, const float *x, int64_t num_rows, int64_t num_inputs,
                                        int64_t group) {
    int64_t num_groups = ceil_div(num_inputs, group), num_scales = num_rows * num_groups;
    return (quantized_rows){x, num_rows, num_inputs, group, num_groups, (float *)scratch,
                            (int32_t *)(scratch + 4 * num_scales), (int8_t *)(scratch + 8 * num_scales)};
}

static void quantize_row(const quantized_rows *rows, int64_t row) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    const float *x = rows->x + row * rows->num_inputs;
    int8_t *q = rows->q + row * rows->num_groups * rows->group;
    for (int64_t g = 0; g < rows->num_groups; g++, x += rows->group, q += rows->group) {
        int64_t count = min_i64(rows->group, rows->num_inputs - g * rows->group);
        f32x16 largest = {};
        int64_t k = 0;
        for (; k + LANES <= count; k += LANES) largest = f32_max(largest, f32_abs(f32_load(x + k)));
        if (k < count) largest = f32_max(largest, f32_abs(f32_load_n(x + k, (int)(count - k))));
        float absmax = f32_max_all(largest), inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
        i32x16 sums = {};
        for (k = 0; k < rows->group; k += LANES) {
            int64_t left = count - k;
            f32x16 value = left >= LANES ? f32_load(x + k) : left > 0 ? f32_load_n(x + k, (int)left) : (f32x16){};
            i32x16 whole = i32_from_f32(f32_round(value * inverse));
            sums += whole;
            i8x16 narrow = __builtin_convertvector(whole, i8x16);
            memcpy(q + k, &narrow, sizeof narrow);
        }
        int32_t sum = 0;
        for (int i = 0; i < LANES; i++) sum += sums[i];
        rows->scale[row * rows->num_groups + g] = absmax / 127.0f;
        rows->sum[row * rows->num_groups + g] = sum;
    }
}

#define ROWS_PER_TASK 16

static void quantize_task(void *context, int64_t index, int32_t thread) {
    const quantized_rows *rows = context;
    (void)thread;
    int64_t start = index * ROWS_PER_TASK;
    for (int64_t row = start; row < min_i64(start + ROWS_PER_TASK, rows->num_rows); row++) quantize_row(rows, row);
}

static void quantize(quantized_rows *rows) { pool_run(ceil_div(rows->num_rows, ROWS_PER_TASK), quantize_task, rows); }

#endif
