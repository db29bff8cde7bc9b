/* A recorded sequence of ops, run again by one call.
 *
 * Every op that can be recorded has a twin OP(name_replay) that takes its arguments, in order, as cells.
 */
#ifndef CLUSTER_PROGRAM_H
#define CLUSTER_PROGRAM_H

#include <stdint.h>

typedef union {
    int64_t i;
    double f;
    void *p;
} cell;

typedef struct {
    void (*replay)(const cell *arguments);
    int64_t first_cell;
} recorded_call;

void program_run(const recorded_call *calls, int64_t num_calls, const cell *cells);

#endif
