/* What the linear kernels share: how a weight matrix is packed, and how a product is cut into tasks.
 *
 * Weights lie in tiles of 16 outputs, so that a vector holds one input's (or four inputs') weights of 16 outputs and a
 * sum runs down the inputs in one order, whatever the number of rows: a row's result does not depend on its batch.
 * A strip of NUM_TILES tiles times a block of at most MAX_ROWS rows is what the registers hold at once.
 */
#ifndef CLUSTER_LINEAR_H
#define CLUSTER_LINEAR_H

#include "pool.h"
#include "simd.h"

#if defined(__AVX512F__)
#define NUM_TILES 4
#define MAX_ROWS 6
#else
#define NUM_TILES 2
#define MAX_ROWS 3
#endif

INLINE int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* Calls CASE(rows, tiles) with both as constants, so that the compiler keeps the sums in registers. */
#define SWITCH_ROWS_1(CASE, rows, tiles) \
    case 1: CASE(1, tiles); break;
#define SWITCH_ROWS_3(CASE, rows, tiles)  \
    SWITCH_ROWS_1(CASE, rows, tiles)      \
    case 2: CASE(2, tiles); break;        \
    case 3: CASE(3, tiles); break;
#define SWITCH_ROWS_6(CASE, rows, tiles)  \
    SWITCH_ROWS_3(CASE, rows, tiles)      \
    case 4: CASE(4, tiles); break;        \
    case 5: CASE(5, tiles); break;        \
    case 6: CASE(6, tiles); break;
#if MAX_ROWS == 6
#define SWITCH_ROWS(CASE, rows, tiles) \
    switch (rows) { SWITCH_ROWS_6(CASE, rows, tiles) }
#else
#define SWITCH_ROWS(CASE, rows, tiles) \
    switch (rows) { SWITCH_ROWS_3(CASE, rows, tiles) }
#endif
/* A whole strip, or a matrix's last one tile by tile. */
#define SWITCH_BLOCK(CASE, rows, tiles)               \
    if ((tiles) == NUM_TILES) {                       \
        SWITCH_ROWS(CASE, rows, NUM_TILES)            \
    } else {                                          \
        SWITCH_ROWS(CASE, rows, 1)                    \
    }

/* Sixteen outputs of one row, or the last few of them. */
INLINE void store_outputs(float *out, f32x16 value, int64_t count) {
    if (count >= LANES)
        f32_store(out, value);
    else
        f32_store_n(out, value, (int)count);
}

#endif
