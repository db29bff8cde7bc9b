/* Rows of activations as int8, quantized anew in every call.
 *
 *     q[t, k] = round(x[t, k] / scale[t, g]),  scale[t, g] = max |x[t, k]| over the inputs k of group g, / 127
 *
 * A scale per row keeps requests independent of their batch. *Outliers*, the inputs of a row beyond OUTLIER_RATIO times its
 * typical magnitude, are left out of q and multiplied in float32 (the decomposition of Dettmers et al., 2022, per row): in
 * a group's scale one of them would coarsen all its neighbours.
 */
#ifndef CLUSTER_QUANTIZED_ROWS_H
#define CLUSTER_QUANTIZED_ROWS_H

#include "linear.h"

#define OUTLIER_RATIO 16.0f /* of thousands of normal numbers the largest is 6 times the typical one */
#define MAX_OUTLIERS 64     /* of a row; the first ones count */
#define MAX_GROUP 128

typedef struct {
    int32_t count, input[MAX_OUTLIERS];
    float value[MAX_OUTLIERS];
} outliers;

_Static_assert(sizeof(outliers) == 516, "linear.py takes so many bytes of scratch per row");

typedef struct {
    const float *x; /* [rows][inputs] */
    int64_t num_rows, num_inputs, group, num_groups;
    outliers *outlier; /* [rows] */
    float *scale;      /* [rows][groups] */
    int32_t *sum;      /* [rows][groups], of q */
    int8_t *q;         /* [rows][groups * group], zeros behind the inputs */
} quantized_rows;

INLINE int64_t quantized_row_bytes(int64_t num_inputs, int64_t group) {
    return (int64_t)sizeof(outliers) + ceil_div(num_inputs, group) * (group + 8);
}

/* scratch: rows * quantized_row_bytes. */
INLINE quantized_rows quantized_rows_in(uint8_t *scratch, const float *x, int64_t num_rows, int64_t num_inputs,
                                        int64_t group) {
    int64_t num_groups = ceil_div(num_inputs, group), num_scales = num_rows * num_groups;
    quantized_rows rows = {x, num_rows, num_inputs, group, num_groups, (outliers *)scratch, NULL, NULL, NULL};
    rows.scale = (float *)(rows.outlier + num_rows);
    rows.sum = (int32_t *)(rows.scale + num_scales);
    rows.q = (int8_t *)(rows.sum + num_scales);
    return rows;
}

/* The mean magnitude of a row, none counting for more than twice the mean so far: three rounds forget the outliers. */
INLINE float typical_magnitude(const float *x, int64_t count) {
    float mean = INFINITY;
    for (int round = 0; round < 3; round++) {
        const f32x16 most = f32_set1(2.0f * mean);
        f32x16 sum = {};
        for (int64_t k = 0; k < count; k += LANES) {
            int64_t left = count - k;
            sum += f32_min(f32_abs(left >= LANES ? f32_load(x + k) : f32_load_n(x + k, (int)left)), most);
        }
        mean = f32_sum(sum) / (float)count;
    }
    return mean;
}

/* Moves what lies beyond `bound` from the `count` inputs at x, the row's first `start` on, to the row's outliers. */
static void take_outliers(outliers *out, float *x, int64_t start, int64_t count, float bound) {
    for (int64_t k = 0; k < count && out->count < MAX_OUTLIERS; k++)
        if (fabsf(x[k]) > bound) {
            out->input[out->count] = (int32_t)(start + k);
            out->value[out->count++] = x[k];
            x[k] = 0;
        }
}

static void quantize_row(const quantized_rows *rows, int64_t row) {
    typedef int8_t i8x16 __attribute__((vector_size(16)));
    const float *x = rows->x + row * rows->num_inputs;
    int8_t *q = rows->q + row * rows->num_groups * rows->group;
    outliers *out = rows->outlier + row;
    const float bound = OUTLIER_RATIO * typical_magnitude(x, rows->num_inputs);
    f32x16 poison = {}; /* 0, or NaN where the row is not finite: integers would hide it */
    out->count = 0;
    for (int64_t g = 0; g < rows->num_groups; g++, x += rows->group, q += rows->group) {
        int64_t start = g * rows->group, count = min_i64(rows->group, rows->num_inputs - start);
        float value[MAX_GROUP] __attribute__((aligned(64)));
        f32x16 largest = {};
        for (int64_t k = 0; k < rows->group; k += LANES) {
            int64_t left = count - k;
            f32x16 lanes = left >= LANES ? f32_load(x + k) : left > 0 ? f32_load_n(x + k, (int)left) : (f32x16){};
            largest = f32_max(largest, f32_abs(lanes));
            poison += lanes * 0.0f;
            f32_store(value + k, lanes);
        }
        float absmax = f32_max_all(largest);
        if (absmax > bound) {
            take_outliers(out, value, start, count, bound);
            largest = (f32x16){};
            for (int64_t k = 0; k < rows->group; k += LANES) largest = f32_max(largest, f32_abs(f32_load(value + k)));
            absmax = f32_max_all(largest);
        }
        float inverse = absmax > 0 ? 127.0f / absmax : 0.0f;
        i32x16 sums = {};
        for (int64_t k = 0; k < rows->group; k += LANES) {
            i32x16 whole = i32_from_f32(f32_round(f32_load(value + k) * inverse));
            sums += whole;
            i8x16 narrow = __builtin_convertvector(whole, i8x16);
            memcpy(q + k, &narrow, sizeof narrow);
        }
        int32_t sum = 0;
        for (int i = 0; i < LANES; i++) sum += sums[i];
        rows->scale[row * rows->num_groups + g] = absmax / 127.0f;
        rows->sum[row * rows->num_groups + g] = sum;
    }
    rows->scale[row * rows->num_groups] += f32_sum(poison);
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
