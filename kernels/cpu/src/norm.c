/* out = x / sqrt(mean(x^2) + eps) * weight   over the last dimension (Zhang and Sennrich, 2019); x may be the sum of two
 * tensors, which is kept.
 *
 * The square of number i of a row is added to sum i % SUMS, so the order of additions follows from a row's size alone.
 */
#include "native.h"
#include "pool.h"
#include "program.h"

#define NUMBERS_PER_TASK 16384 /* fewer are done before another thread has heard of them */
#define SUMS 64                /* as many as the additions' latency asks for */

typedef struct {
    const float *x, *residual, *weight; /* residual NULL: none */
    float *total, *out;
    int64_t num_rows, num_inner;                                    /* row i is (i / num_inner, i % num_inner) */
    int64_t x_stride, x_inner_stride, out_stride, out_inner_stride; /* in floats */
    int64_t size, rows_per_task;
    float eps;
} norm;

INLINE f32v term(const float *x, const float *residual, float *total, int64_t i, int64_t count) {
    f32v value = v_load_n(x + i, count);
    if (residual == NULL) return value;
    value += v_load_n(residual + i, count);
    v_store_n(total + i, value, count);
    return value;
}

INLINE float mean_square(const float *x, const float *residual, float *total, int64_t size) {
    f32v sum[SUMS / WIDTH] = {};
    int64_t i = 0;
    for (; i + SUMS <= size; i += SUMS)
        for (int n = 0; n < SUMS / WIDTH; n++) {
            f32v value = term(x, residual, total, i + n * WIDTH, WIDTH);
            sum[n] = v_fma(value, value, sum[n]);
        }
    float sums[SUMS];
    for (int n = 0; n < SUMS / WIDTH; n++) {
        if (i + n * WIDTH < size) {
            f32v value = term(x, residual, total, i + n * WIDTH, size - i - n * WIDTH);
            sum[n] = v_fma(value, value, sum[n]);
        }
        v_store(sums + n * WIDTH, sum[n]);
    }
    return sum_halves(sums, SUMS) / (float)size;
}

static void normalize_rows(void *context, int64_t index, int32_t thread) {
    const norm *a = context;
    (void)thread;
    for (int64_t row = index * a->rows_per_task; row < min_i64((index + 1) * a->rows_per_task, a->num_rows); row++) {
        int64_t outer = row / a->num_inner, inner = row % a->num_inner;
        const float *x = a->x + outer * a->x_stride + inner * a->x_inner_stride;
        float *out = a->out + outer * a->out_stride + inner * a->out_inner_stride;
        const float *residual = a->residual == NULL ? NULL : a->residual + row * a->size;
        float *total = a->residual == NULL ? NULL : a->total + row * a->size;
        float inverse = 1.0f / sqrtf(mean_square(x, residual, total, a->size) + a->eps);
        if (residual != NULL) x = total;
        for (int64_t i = 0; i < a->size; i += WIDTH) {
            int64_t count = a->size - i;
            v_store_n(out + i, v_load_n(x + i, count) * inverse * v_load_n(a->weight + i, count), count);
        }
    }
}

static void run(norm *a) {
    a->rows_per_task = max_i64(1, NUMBERS_PER_TASK / max_i64(1, a->size));
    pool_run(ceil_div(a->num_rows, a->rows_per_task), normalize_rows, a);
}

/* Rows (num_outer, num_inner) of `size` floats each, at the strides given; out may be x. */
void OP(rms_norm)(const float *x, int64_t x_stride, int64_t x_inner_stride, const float *weight, float eps,
                  int64_t num_outer, int64_t num_inner, int64_t size, float *out, int64_t out_stride,
                  int64_t out_inner_stride) {
    norm a = {.x = x, .weight = weight, .out = out, .num_rows = num_outer * num_inner, .num_inner = num_inner,
              .x_stride = x_stride, .x_inner_stride = x_inner_stride, .out_stride = out_stride,
              .out_inner_stride = out_inner_stride, .size = size, .eps = eps};
    run(&a);
}

void OP(rms_norm_replay)(const cell *a) {
    OP(rms_norm)(a[0].p, a[1].i, a[2].i, a[3].p, (float)a[4].f, a[5].i, a[6].i, a[7].i, a[8].p, a[9].i, a[10].i);
}

/* Contiguous rows; total = x + residual. */
void OP(add_rms_norm)(const float *x, const float *residual, const float *weight, float eps, int64_t num_rows,
                      int64_t size, float *out, float *total) {
    norm a = {.x = x, .residual = residual, .weight = weight, .total = total, .out = out, .num_rows = num_rows,
              .num_inner = 1, .x_stride = size, .out_stride = size, .size = size, .eps = eps};
    run(&a);
}

void OP(add_rms_norm_replay)(const cell *a) {
    OP(add_rms_norm)(a[0].p, a[1].p, a[2].p, (float)a[3].f, a[4].i, a[5].i, a[6].p, a[7].p);
}
