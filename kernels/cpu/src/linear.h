/* What the linear kernels share: how a weight matrix is packed, and how a product is cut into tasks.
 *
 * Weights lie in tiles of 16 outputs. A *line* is one step of a tile: as many inputs' weights of its 16 outputs as one
 * vector instruction takes. A sum runs down the lines in one order, whatever the number of rows, so a row's result does
 * not depend on its batch. Four tiles form a strip, their lines interleaved, so that a thread reads one stream of memory;
 * tiles that fill no strip lie one by one. NUM_TILES tiles times at most MAX_ROWS rows are what the registers hold.
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
#define STRIP_TILES 4

/* Where line 0 of a tile is, and from there to its next line, both in lines. */
typedef struct {
    int64_t first, stride;
} line_range;

INLINE line_range lines_of(int64_t tile, int64_t num_outputs, int64_t lines_per_tile) {
    int64_t in_strips = ceil_div(num_outputs, LANES) / STRIP_TILES * STRIP_TILES;
    if (tile >= in_strips) return (line_range){tile * lines_per_tile, 1};
    return (line_range){tile / STRIP_TILES * STRIP_TILES * lines_per_tile + tile % STRIP_TILES, STRIP_TILES};
}

/* A task is a run of strips, counting tiles that lie alone as strips: long enough to be read as a stream, short enough
 * that no thread waits long for another's last one. */
typedef struct {
    int64_t num_strips, strips_per_task;
} task_split;

INLINE task_split split_tasks(int64_t num_outputs) {
    int64_t num_tiles = ceil_div(num_outputs, LANES);
    int64_t num_strips = num_tiles / STRIP_TILES + num_tiles % STRIP_TILES;
    int64_t share = num_strips / (8 * (int64_t)pool_num_threads());
    return (task_split){num_strips, share < 1 ? 1 : share};
}

INLINE int64_t num_tasks_of(task_split split) { return ceil_div(split.num_strips, split.strips_per_task); }

/* BODY(tile, tiles) for every block of tiles of task `index`: NUM_TILES of a strip, or one that lies alone. */
#define FOR_TILES(split, num_outputs, index, BODY)                                                                    \
    for (int64_t strip = (index) * (split).strips_per_task;                                                           \
         strip < min_i64(((index) + 1) * (split).strips_per_task, (split).num_strips); strip++) {                     \
        int64_t whole = ceil_div(num_outputs, LANES) / STRIP_TILES;                                                   \
        if (strip < whole)                                                                                            \
            for (int64_t tile = strip * STRIP_TILES; tile < (strip + 1) * STRIP_TILES; tile += NUM_TILES) {           \
                BODY(tile, NUM_TILES)                                                                                 \
            }                                                                                                         \
        else {                                                                                                        \
            BODY(whole * STRIP_TILES + strip - whole, 1)                                                              \
        }                                                                                                             \
    }

/* What a block of rows fetches of the strip that comes next: so many cache lines at each of its lines, from there on. */
typedef struct {
    const uint8_t *from;
    int lines_at_once;
} prefetch;

/* The first block of rows reads a strip from memory, the others find it in the second-level cache: while they compute,
 * the next one can come. With fewer than min_blocks they have too little time: what is asked for in such haste comes no
 * sooner. */
INLINE prefetch prefetch_of(const uint8_t *weight, int64_t tile, int64_t lines_per_tile, int64_t block,
                            int64_t num_blocks, int64_t min_blocks) {
    if (block == 0 || num_blocks < min_blocks) return (prefetch){NULL, 0};
    const int64_t lines_at_once = ceil_div(STRIP_TILES, num_blocks - 1);
    const int64_t first = (block - 1) * lines_at_once * lines_per_tile;
    if (first >= STRIP_TILES * lines_per_tile) return (prefetch){NULL, 0};
    return (prefetch){weight + ((tile / STRIP_TILES + 1) * STRIP_TILES * lines_per_tile + first) * 64, (int)lines_at_once};
}

/* Sixteen outputs of one row, or the last few of them. */
INLINE void store_outputs(float *out, f32x16 value, int64_t count) {
    if (count >= LANES)
        f32_store(out, value);
    else
        f32_store_n(out, value, (int)count);
}

#endif
