/* y[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, for rows of x or of x + residual; the latter also gives that sum. */
#include "linear.h"
#include "program.h"

typedef struct {
    const float *x, *residual, *weight;
    int64_t x_stride, x_inner_stride, num_outer, num_inner, size;
    float eps, *sum, *out;
    int64_t out_stride, out_inner_stride;
} normalisation;

#define ELEMENTS_PER_TASK 16384

static void normalise(const normalisation *p, int64_t row) {
    const int64_t size = p->size, outer = row / p->num_inner, inner = row % p->num_inner;
    const float *x = p->x + outer * p->x_stride + inner * p->x_inner_stride;
    float *out = p->out + outer * p->out_stride + inner * p->out_inner_stride;
    float *total = p->sum == NULL ? NULL : p->sum + row * size;
    f32x16 squares = {};
    for (int64_t d = 0; d < size; d += LANES) {
        const int count = (int)min_i64(LANES, size - d);
        f32x16 value = f32_load_n(x + d, count);
        if (total != NULL) {
            value += f32_load_n(p->residual + row * size + d, count);
            f32_store_n(total + d, value, count);
        }
        squares = f32_fma(value, value, squares);
    }
    const float factor = 1.0f / sqrtf(f32_sum(squares) / (float)size + p->eps);
    const float *from = total != NULL ? total : x;
    for (int64_t d = 0; d < size; d += LANES) {
        const int count = (int)min_i64(LANES, size - d);
        f32_store_n(out + d, f32_load_n(from + d, count) * factor * f32_load_n(p->weight + d, count), count);
    }
}

static void run_task(void *context, int64_t index, int32_t thread) {
    const normalisation *p = context;
    (void)thread;
    const int64_t rows = ceil_div(ELEMENTS_PER_TASK, p->size), num_rows = p->num_outer * p->num_inner;
    for (int64_t row = index * rows; row < min_i64((index + 1) * rows, num_rows); row++) normalise(p, row);
}

static void run(normalisation *p) {
    pool_run(ceil_div(p->num_outer * p->num_inner, ceil_div(ELEMENTS_PER_TASK, p->size)), run_task, p);
}

void OP(rms_norm)(const float *x, int64_t x_stride, int64_t x_inner_stride, const float *weight, float eps,
                  int64_t num_outer, int64_t num_inner, int64_t size, float *out, int64_t out_stride,
                  int64_t out_inner_stride) {
    normalisation p = {x, NULL, weight, x_stride, x_inner_stride, num_outer, num_inner, size, eps, NULL, out, out_stride,
                       out_inner_stride};
    run(&p);
}

void OP(rms_norm_replay)(const cell *a) {
    OP(rms_norm)(a[0].p, a[1].i, a[2].i, a[3].p, (float)a[4].f, a[5].i, a[6].i, a[7].i, a[8].p, a[9].i, a[10].i);
}

void OP(add_rms_norm)(const float *x, const float *residual, const float *weight, float eps, int64_t num_rows,
                      int64_t size, float *out, float *sum) {
    normalisation p = {x, residual, weight, size, 0, num_rows, 1, size, eps, sum, out, size, 0};
    run(&p);
}

void OP(add_rms_norm_replay)(const cell *a) {
    OP(add_rms_norm)(a[0].p, a[1].p, a[2].p, (float)a[3].f, a[4].i, a[5].i, a[6].p, a[7].p);
}
