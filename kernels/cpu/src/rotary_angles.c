/* cos[t, r] = scale * cos(position[t] * frequency[r]), and sin alike. */
#include "pool.h"
#include "program.h"
#include "simd.h"

typedef struct {
    const int64_t *positions;
    const float *frequencies;
    int64_t num_rows, num_frequencies;
    float scale, *cos, *sin;
} angles;

#define ROWS_PER_TASK 32

static void compute_rows(void *context, int64_t index, int32_t thread) {
    const angles *a = context;
    (void)thread;
    for (int64_t t = index * ROWS_PER_TASK; t < min_i64((index + 1) * ROWS_PER_TASK, a->num_rows); t++)
        for (int64_t r = 0; r < a->num_frequencies; r++) {
            float angle = (float)a->positions[t] * a->frequencies[r];
            a->cos[t * a->num_frequencies + r] = cosf(angle) * a->scale;
            a->sin[t * a->num_frequencies + r] = sinf(angle) * a->scale;
        }
}

void OP(rotary_angles)(const int64_t *positions, const float *frequencies, int64_t num_rows, int64_t num_frequencies,
                       float scale, float *cos, float *sin) {
    angles a = {positions, frequencies, num_rows, num_frequencies, scale, cos, sin};
    pool_run(ceil_div(num_rows, ROWS_PER_TASK), compute_rows, &a);
}

void OP(rotary_angles_replay)(const cell *a) {
    OP(rotary_angles)(a[0].p, a[1].p, a[2].i, a[3].i, (float)a[4].f, a[5].p, a[6].p);
}
