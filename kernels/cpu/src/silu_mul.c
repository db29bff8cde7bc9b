/* out = gate / (1 + exp(-gate)) * up   of rows that hold the gates first (SwiGLU: Shazeer, 2020). */
#include "native.h"
#include "pool.h"
#include "program.h"

#define NUMBERS_PER_TASK 4096 /* fewer are done before another thread has heard of them */

typedef struct {
    const float *gate_up;
    int64_t num_rows, size, row_tasks; /* tasks that share a row */
    float *out;
} silu;

/* A row, or a part of one where a row is longer than a task: a step of one token is shared too. */
static void run_part(void *context, int64_t index, int32_t thread) {
    const silu *a = context;
    (void)thread;
    int64_t row = index / a->row_tasks, first = index % a->row_tasks * NUMBERS_PER_TASK;
    const float *gate = a->gate_up + row * 2 * a->size, *up = gate + a->size;
    int64_t end = min_i64(first + NUMBERS_PER_TASK, a->size);
    for (int64_t i = first; i < end; i += WIDTH) {
        f32v g = v_load_n(gate + i, end - i), u = v_load_n(up + i, end - i);
        v_store_n(a->out + row * a->size + i, g / (1.0f + v_exp(-g)) * u, end - i);
    }
}

void OP(silu_mul)(const float *gate_up, int64_t num_rows, int64_t size, float *out) {
    silu a = {gate_up, num_rows, size, ceil_div(size, NUMBERS_PER_TASK), out};
    pool_run(num_rows * a.row_tasks, run_part, &a);
}

void OP(silu_mul_replay)(const cell *a) { OP(silu_mul)(a[0].p, a[1].i, a[2].i, a[3].p); }
