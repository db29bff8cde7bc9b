#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define MAX_THREADS 256
#define SPINS 4000 /* pauses before a thread sleeps: about 50 us */

#if defined(__x86_64__) || defined(__i386__)
#define pause_cpu() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_cpu() __asm__ volatile("yield")
#else
#define pause_cpu() ((void)0)
#endif

static pthread_mutex_t callers = PTHREAD_MUTEX_INITIALIZER; /* held for a whole job */
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

static int32_t num_threads = 1;
static int32_t num_workers; /* started; worker i has thread number i + 1 */
static pthread_t workers[MAX_THREADS];

/* The job: written by its caller before `tickets` opens it. A claimed task keeps the job open, so whoever claims one
 * reads the fields of the job that it belongs to. */
static pool_task job_task;
static void *job_context;
static int64_t job_num_tasks;
static _Atomic uint64_t tickets;   /* generation of the job << 32 | tasks that nobody has claimed */
static _Atomic int64_t unfinished; /* tasks that have not ended */
static _Atomic int32_t num_sleeping;
static _Atomic bool stopping;

static _Thread_local int32_t own_thread = -1; /* while it runs tasks; -1 outside */

static bool run_one(int32_t thread) {
    uint64_t ticket = atomic_load_explicit(&tickets, memory_order_acquire);
    do {
        if ((uint32_t)ticket == 0) return false;
    } while (!atomic_compare_exchange_weak_explicit(&tickets, &ticket, ticket - 1, memory_order_acq_rel,
                                                    memory_order_acquire));
    job_task(job_context, job_num_tasks - (int64_t)(uint32_t)ticket, thread);
    atomic_fetch_sub_explicit(&unfinished, 1, memory_order_release);
    return true;
}

static bool has_news(uint32_t seen) {
    return (uint32_t)(atomic_load(&tickets) >> 32) != seen || atomic_load(&stopping);
}

static void *work(void *argument) {
    int32_t thread = own_thread = (int32_t)(intptr_t)argument;
    while (!atomic_load_explicit(&stopping, memory_order_acquire)) {
        uint32_t seen = (uint32_t)(atomic_load(&tickets) >> 32);
        while (run_one(thread)) {
        }
        for (int spin = 0; spin < SPINS && !has_news(seen); spin++) pause_cpu();
        if (has_news(seen)) continue;
        pthread_mutex_lock(&sleep_lock);
        atomic_fetch_add(&num_sleeping, 1);
        while (!has_news(seen)) pthread_cond_wait(&wake, &sleep_lock);
        atomic_fetch_sub(&num_sleeping, 1);
        pthread_mutex_unlock(&sleep_lock);
    }
    return NULL;
}

static void wake_all(void) {
    if (atomic_load(&num_sleeping) == 0) return;
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleep_lock);
}

/* A forked child has none of the threads, and locks in whatever state they were. */
static void forget_workers(void) {
    pthread_mutex_init(&callers, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_cond_init(&wake, NULL);
    num_workers = 0;
    atomic_store(&tickets, 0);
    atomic_store(&unfinished, 0);
    atomic_store(&num_sleeping, 0);
    atomic_store(&stopping, false);
    own_thread = -1;
}

static pthread_once_t once = PTHREAD_ONCE_INIT;
static void watch_forks(void) { pthread_atfork(NULL, NULL, forget_workers); }

static void stop_workers(void) {
    atomic_store(&stopping, true);
    wake_all();
    for (int32_t i = 0; i < num_workers; i++) pthread_join(workers[i], NULL);
    num_workers = 0;
    atomic_store(&stopping, false);
}

static void start_workers(void) {
    pthread_once(&once, watch_forks);
    while (num_workers < num_threads - 1) {
        if (pthread_create(&workers[num_workers], NULL, work, (void *)(intptr_t)(num_workers + 1)) != 0) {
            num_threads = num_workers + 1;
            return;
        }
        num_workers++;
    }
}

int32_t pool_num_threads(void) { return num_threads; }

int32_t pool_set_num_threads(int32_t wanted) {
    wanted = wanted < 1 ? 1 : wanted > MAX_THREADS ? MAX_THREADS : wanted;
    pthread_mutex_lock(&callers);
    if (num_workers >= wanted) stop_workers();
    num_threads = wanted;
    start_workers();
    pthread_mutex_unlock(&callers);
    return num_threads;
}

static void run_here(int64_t num_tasks, pool_task task, void *context, int32_t thread) {
    for (int64_t index = 0; index < num_tasks; index++) task(context, index, thread);
}

static void run_shared(int64_t num_tasks, pool_task task, void *context) {
    start_workers(); /* a forked child has none yet */
    job_task = task;
    job_context = context;
    job_num_tasks = num_tasks;
    atomic_store_explicit(&unfinished, num_tasks, memory_order_relaxed);
    uint64_t generation = (atomic_load_explicit(&tickets, memory_order_relaxed) >> 32) + 1;
    atomic_store(&tickets, generation << 32 | (uint64_t)num_tasks);
    wake_all();
    while (run_one(0)) {
    }
    /* Yields now and then: the thread that is waited for may need this very core. */
    for (int spin = 1; atomic_load_explicit(&unfinished, memory_order_acquire) > 0; spin++) {
        if (spin % 1024 == 0)
            sched_yield();
        else
            pause_cpu();
    }
}

void pool_run(int64_t num_tasks, pool_task task, void *context) {
    if (num_tasks <= 0) return;
    if (own_thread >= 0) {
        run_here(num_tasks, task, context, own_thread);
        return;
    }
    pthread_mutex_lock(&callers);
    own_thread = 0;
    if (num_tasks == 1 || num_threads == 1 || num_tasks > UINT32_MAX)
        run_here(num_tasks, task, context, 0);
    else
        run_shared(num_tasks, task, context);
    own_thread = -1;
    pthread_mutex_unlock(&callers);
}
