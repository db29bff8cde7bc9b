/* y[t] = gate[t] / (1 + exp(-gate[t])) * up[t], the two being the halves of a row. */
#include "linear.h"
#include "program.h"

typedef struct {
    const float *gate_up;
    int64_t num_rows, size;
    float *out;
} gating;

#define ELEMENTS_PER_TASK 8192

static void run_task(void *context, int64_t index, int32_t thread) {
    const gating *p = context;
    (void)thread;
    const int64_t rows = ceil_div(ELEMENTS_PER_TASK, p->size);
    for (int64_t row = index * rows; row < min_i64((index + 1) * rows, p->num_rows); row++) {
        const float *gate = p->gate_up + row * 2 * p->size, *up = gate + p->size;
        for (int64_t d = 0; d < p->size; d += LANES) {
            const int count = (int)min_i64(LANES, p->size - d);
            f32x16 x = f32_load_n(gate + d, count);
            f32x16 y = x / (1.0f + f32_exp(-x)) * f32_load_n(up + d, count);
            f32_store_n(p->out + row * p->size + d, y, count);
        }
    }
}

void OP(silu_mul)(const float *gate_up, int64_t num_rows, int64_t size, float *out) {
    gating p = {gate_up, num_rows, size, out};
    pool_run(ceil_div(num_rows, ceil_div(ELEMENTS_PER_TASK, size)), run_task, &p);
}

void OP(silu_mul_replay)(const cell *a) { OP(silu_mul)(a[0].p, a[1].i, a[2].i, a[3].p); }
