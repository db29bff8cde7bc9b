/* The process's one pool of compute threads.
 *
 * A job is a number of independent tasks, claimed one by one by whoever is free, the caller included. Between jobs the
 * threads spin for some tens of microseconds, since the next operator of a step follows at once, then sleep.
 */
#ifndef CLUSTER_POOL_H
#define CLUSTER_POOL_H

#include <stdint.h>

/* One task. `thread` is in [0, pool_num_threads()): no two tasks that run at the same time share it. */
typedef void (*pool_task)(void *context, int64_t index, int32_t thread);

/* Runs tasks 0 .. num_tasks - 1 and returns when all have ended. Callers on several threads take turns; a task that
 * calls it runs its tasks itself. */
void pool_run(int64_t num_tasks, pool_task task, void *context);

int32_t pool_num_threads(void);

/* Threads of the next jobs, the caller counted, at least 1. Returns how many there are: fewer where the system refuses
 * more. */
int32_t pool_set_num_threads(int32_t num_threads);

#endif
