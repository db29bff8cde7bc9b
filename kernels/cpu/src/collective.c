/* Collectives between processes that map one segment of shared memory.
 *
 * Every collective is a sequence of phases. In a phase each rank writes into its slot, posts the phase's number and
 * waits until all have posted theirs; then everybody reads. A rank has two slots and takes turns: when it writes into
 * one again, all ranks have posted the phase in between, and so have done with reading it. One meeting per phase
 * suffices.
 *
 * Sums run over the ranks in their order, element by element, so they have the same bits on every rank, for every size.
 *
 * Whoever waits in vain until the deadline marks the segment as failed, for good: what is under way returns at once on
 * every rank, and so does what comes later. Nothing returns an error: an op may be part of a recorded program. The word
 * of the failure says what happened.
 */
#include "native.h"
#include "program.h"

#include <limits.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <time.h>
#include <unistd.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif

#define LINE 64
#define MAX_RANKS 32
#define SLOT_BYTES (128 << 10)
#define RINGS_BYTES (1 << 20) /* of all the rings into one rank, about; a power of two */
#define RING_STEPS 8          /* to fill a ring: the receiver reads while the sender writes on */
#define SCATTER_BYTES (32 << 10) /* from here on three ranks and more sum a part each */

#define SPINS 50          /* pauses, less than a microsecond: the one that is waited for may need this very core */
#define YIELD_NS 200000   /* so long others are let run again and again, then the thread sleeps */
#define SLEEP_NS 20000000 /* at a time: a failure may be told just before a thread falls asleep */

/* "collect" and the version of what follows. */
#define IDENTITY 0x636f6c6c65637401u

enum { LATE = 1, ABORTED, DISAGREE, DUPLICATE, FOREIGN }; /* mirrored in collective.py */
enum { BARRIER, ALL_REDUCE, ALL_GATHER, ALL_TO_ALL, BROADCAST };
enum { FLOAT32, BFLOAT16, FLOAT16 }; /* mirrored in collective.py */

#if defined(__x86_64__) || defined(__i386__)
#define pause_cpu() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define pause_cpu() __asm__ volatile("yield")
#else
#define pause_cpu() ((void)0)
#endif

/* A number that one rank raises and others wait for. It wraps around. */
typedef struct {
    _Alignas(LINE) _Atomic uint32_t value;
    _Atomic uint32_t num_sleeping;
    uint64_t calls[2]; /* what the phase is part of, by the phase's parity: all ranks must say the same */
    _Atomic uint32_t is_taken;
} flag;

/* A stream of bytes from one rank to another. */
typedef struct {
    flag written, read; /* bytes so far */
    char bytes[];       /* ring_bytes() */
} ring;

/* The segment, all zeros at first. Behind it lie the slots, [size][2][SLOT_BYTES], and the rings, [from][to]. */
typedef struct {
    _Atomic uint64_t failure; /* 0: none; kind, rank that found it << 8, mask of the ranks that it is about << 32 */
    _Alignas(LINE) _Atomic uint64_t identity;
    flag posted[MAX_RANKS];
} segment;

/* A rank's own view; mirrored by Member in collective.py. */
typedef struct {
    segment *shared; /* NULL: closed */
    int64_t rank, size;
    int64_t timeout_ns;
} member;

static char *slot_of(const member *m, int64_t rank, uint32_t phase) {
    return (char *)(m->shared + 1) + (rank * 2 + (phase & 1)) * SLOT_BYTES;
}

/* A power of two. */
static uint32_t ring_bytes(int64_t size) {
    uint32_t bytes = RINGS_BYTES;
    for (int64_t ranks = 1; ranks < size; ranks *= 2) bytes /= 2;
    return bytes;
}

static ring *ring_of(const member *m, int64_t from, int64_t to) {
    int64_t stride = (int64_t)sizeof(ring) + ring_bytes(m->size);
    return (ring *)((char *)(m->shared + 1) + m->size * 2 * SLOT_BYTES + (from * m->size + to) * stride);
}

void OP(segment_bytes)(int64_t size, int64_t *num_bytes) {
    int64_t slots = size * 2 * SLOT_BYTES, rings = size * size * ((int64_t)sizeof(ring) + ring_bytes(size));
    *num_bytes = (int64_t)sizeof(segment) + slots + rings;
}

/* --- waiting --- */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void sleep_on(flag *f, uint32_t seen, int64_t ns) {
    struct timespec span = {ns / 1000000000, ns % 1000000000};
#if defined(__linux__)
    atomic_fetch_add(&f->num_sleeping, 1);
    if (atomic_load(&f->value) == seen) syscall(SYS_futex, &f->value, FUTEX_WAIT, seen, &span, NULL, 0);
    atomic_fetch_sub(&f->num_sleeping, 1);
#else
    (void)f, (void)seen;
    span = (struct timespec){0, 100000};
    nanosleep(&span, NULL);
#endif
}

static void wake(flag *f) {
#if defined(__linux__)
    syscall(SYS_futex, &f->value, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
#else
    (void)f;
#endif
}

/* What was written before is visible to whoever sees the new value. */
static void raise_flag(flag *f, uint32_t value) {
    atomic_store(&f->value, value); /* in one order with the look at the sleepers */
    if (atomic_load(&f->num_sleeping) > 0) wake(f);
}

static bool has_failed(const member *m) {
    return atomic_load_explicit(&m->shared->failure, memory_order_relaxed) != 0;
}

static void fail(const member *m, uint64_t kind, uint64_t ranks) {
    uint64_t none = 0;
    atomic_compare_exchange_strong(&m->shared->failure, &none, kind | (uint64_t)m->rank << 8 | ranks << 32);
    for (int64_t rank = 0; rank < m->size; rank++) {
        wake(&m->shared->posted[rank]);
        for (int64_t other = 0; other < m->size; other++) {
            wake(&ring_of(m, rank, other)->written);
            wake(&ring_of(m, rank, other)->read);
        }
    }
}

INLINE bool is_reached(const flag *f, uint32_t target) {
    return (int32_t)(atomic_load_explicit(&f->value, memory_order_acquire) - target) >= 0;
}

static __attribute__((noinline)) bool wait_long(const member *m, flag *f, uint32_t target, int64_t *start) {
    for (int spin = 0; spin < SPINS && !is_reached(f, target); spin++) pause_cpu();
    if (*start == 0) *start = now_ns();
    while (!has_failed(m)) {
        uint32_t seen = atomic_load_explicit(&f->value, memory_order_acquire);
        if ((int32_t)(seen - target) >= 0) return true;
        int64_t waited = now_ns() - *start;
        if (waited >= m->timeout_ns) return false;
        if (waited < YIELD_NS)
            sched_yield();
        else
            sleep_on(f, seen, min_i64(SLEEP_NS, m->timeout_ns - waited));
    }
    return false;
}

/* False: the deadline has passed, or the segment has failed. `start`: 0, or when waiting began; it is filled in. */
INLINE bool wait_for(const member *m, flag *f, uint32_t target, int64_t *start) {
    return is_reached(f, target) || wait_long(m, f, target, start);
}

/* --- phases --- */

/* Gives the number of the next phase. False: the segment has failed or is closed. */
static bool begin(const member *m, uint32_t *phase) {
    if (m->shared == NULL || has_failed(m)) return false;
    *phase = atomic_load_explicit(&m->shared->posted[m->rank].value, memory_order_relaxed) + 1;
    return true;
}

/* Posts the phase and waits until all have. False: the segment has failed. */
static bool meet(const member *m, uint32_t phase, uint64_t call) {
    flag *posted = m->shared->posted;
    posted[m->rank].calls[phase & 1] = call;
    raise_flag(&posted[m->rank], phase);
    uint64_t missing = 0, others = 0;
    int64_t start = 0;
    for (int64_t rank = 0; rank < m->size; rank++)
        if (!wait_for(m, &posted[rank], phase, &start)) {
            for (int64_t later = rank; later < m->size; later++)
                if (!is_reached(&posted[later], phase)) missing |= 1ull << later;
            if (missing == 0) continue; /* at the very last moment */
            fail(m, LATE, missing);
            return false;
        }
    for (int64_t rank = 0; rank < m->size; rank++)
        if (posted[rank].calls[phase & 1] != call) others |= 1ull << rank;
    if (others == 0) return true;
    fail(m, DISAGREE, others);
    return false;
}

static uint64_t call_of(uint64_t kind, int64_t detail) { return kind << 56 | (uint64_t)detail; }

/* Takes the rank's place in the segment and waits until every other has its own. */
void OP(segment_join)(const member *m) {
    uint64_t expected = 0, identity = IDENTITY ^ (uint64_t)m->size << 8;
    uint32_t phase;
    if (!atomic_compare_exchange_strong(&m->shared->identity, &expected, identity) && expected != identity)
        fail(m, FOREIGN, 0);
    if (!begin(m, &phase)) return;
    if (atomic_exchange(&m->shared->posted[m->rank].is_taken, 1) != 0)
        fail(m, DUPLICATE, 1ull << m->rank);
    else
        meet(m, phase, call_of(BARRIER, m->size));
}

void OP(segment_abort)(const member *m) {
    if (m->shared != NULL) fail(m, ABORTED, 0);
}

/* --- sums --- */

INLINE int64_t width_of(int64_t type) { return type == FLOAT32 ? 4 : 2; }

INLINE float f32_at(const char *from, int64_t i, int64_t type) {
    if (type == FLOAT32) return ((const float *)from)[i];
    uint16_t half = ((const uint16_t *)from)[i];
    return type == BFLOAT16 ? f32_of_bf16(half) : f32_of_f16(half);
}

INLINE f32v v_at(const char *from, int64_t i, int64_t type) {
    if (type == FLOAT32) return v_load((const float *)from + i);
    const uint16_t *halves = (const uint16_t *)from + i;
    return type == BFLOAT16 ? v_from_bf16(halves) : v_from_f16(halves);
}

INLINE uint16_t f16_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (value != value) return sign | 0x7e00;
    return fabsf(value) >= 65520.0f ? sign | 0x7c00 : sign | (f16_of_finite(value) & 0x7fff);
}

INLINE void put(char *to, int64_t i, float value, int64_t type) {
    if (type == FLOAT32)
        ((float *)to)[i] = value;
    else
        ((uint16_t *)to)[i] = type == BFLOAT16 ? bf16_of(value) : f16_of(value);
}

INLINE void sum_typed(const char *const *terms, int64_t num_terms, int64_t count, char *out, int64_t type) {
    int64_t i = 0;
    for (; i + WIDTH <= count; i += WIDTH) {
        f32v sum = v_at(terms[0], i, type);
        for (int64_t n = 1; n < num_terms; n++) sum += v_at(terms[n], i, type);
        if (type == FLOAT32)
            v_store((float *)out + i, sum);
        else
            for (int lane = 0; lane < WIDTH; lane++) put(out, i + lane, sum[lane], type);
    }
    for (; i < count; i++) {
        float sum = f32_at(terms[0], i, type);
        for (int64_t n = 1; n < num_terms; n++) sum += f32_at(terms[n], i, type);
        put(out, i, sum, type);
    }
}

/* out[i] = rank 0's x[first + i] + rank 1's x[first + i] + ..., in float32, rounded once; others' are in their slots. */
static void sum_ranks(const member *m, uint32_t phase, const char *x, int64_t first, int64_t count, char *out,
                      int64_t type) {
    const char *terms[MAX_RANKS];
    for (int64_t rank = 0; rank < m->size; rank++)
        terms[rank] = (rank == m->rank ? x : slot_of(m, rank, phase)) + first * width_of(type);
    if (type == FLOAT32)
        sum_typed(terms, m->size, count, out, FLOAT32);
    else if (type == BFLOAT16)
        sum_typed(terms, m->size, count, out, BFLOAT16);
    else
        sum_typed(terms, m->size, count, out, FLOAT16);
}

/* Everybody sums everything. */
static bool reduce_whole(const member *m, char *x, int64_t count, int64_t type, uint64_t call) {
    uint32_t phase;
    if (!begin(m, &phase)) return false;
    memcpy(slot_of(m, m->rank, phase), x, (size_t)(count * width_of(type)));
    if (!meet(m, phase, call)) return false;
    sum_ranks(m, phase, x, 0, count, x, type);
    return true;
}

/* Each rank sums its part, then they are put together. */
static bool reduce_parts(const member *m, char *x, int64_t count, int64_t type, uint64_t call) {
    int64_t width = width_of(type), part = ceil_div(ceil_div(count, m->size), LINE) * LINE;
    int64_t first = min_i64(m->rank * part, count), size = min_i64(part, count - first);
    uint32_t phase;
    if (!begin(m, &phase)) return false;
    memcpy(slot_of(m, m->rank, phase), x, (size_t)(count * width));
    if (!meet(m, phase, call)) return false;
    sum_ranks(m, phase, x, first, size, slot_of(m, m->rank, phase + 1), type);
    if (!meet(m, phase + 1, call)) return false;
    for (int64_t rank = 0; rank < m->size; rank++) {
        first = min_i64(rank * part, count), size = min_i64(part, count - first);
        memcpy(x + first * width, slot_of(m, rank, phase + 1), (size_t)(size * width));
    }
    return true;
}

/* x[count] = the sum of all ranks' x. */
void OP(all_reduce)(const member *m, char *x, int64_t count, int64_t type) {
    int64_t width = width_of(type), step = SLOT_BYTES / width;
    uint64_t call = call_of(ALL_REDUCE, count * 4 + type);
    bool in_parts = m->size > 2 && count * width >= SCATTER_BYTES;
    for (int64_t start = 0; start < count; start += step) {
        int64_t size = min_i64(step, count - start);
        if (!(in_parts ? reduce_parts : reduce_whole)(m, x + start * width, size, type, call)) return;
    }
}

void OP(all_reduce_replay)(const cell *a) { OP(all_reduce)(a[0].p, a[1].p, a[2].i, a[3].i); }

/* --- copies; sizes in bytes --- */

/* out[r * size ...] = rank r's x. */
void OP(all_gather)(const member *m, const char *x, int64_t size, char *out) {
    for (int64_t start = 0; start < size; start += SLOT_BYTES) {
        int64_t count = min_i64(SLOT_BYTES, size - start);
        uint32_t phase;
        if (!begin(m, &phase)) return;
        memcpy(slot_of(m, m->rank, phase), x + start, (size_t)count);
        if (!meet(m, phase, call_of(ALL_GATHER, size))) return;
        for (int64_t rank = 0; rank < m->size; rank++)
            memcpy(out + rank * size + start, slot_of(m, rank, phase), (size_t)count);
    }
}

void OP(all_gather_replay)(const cell *a) { OP(all_gather)(a[0].p, a[1].p, a[2].i, a[3].p); }

/* Part r of x, `size` bytes, to rank r; part r of out is what rank r sent here. */
void OP(all_to_all)(const member *m, const char *x, int64_t size, char *out) {
    int64_t step = SLOT_BYTES / m->size / LINE * LINE;
    for (int64_t start = 0; start < size; start += step) {
        int64_t count = min_i64(step, size - start);
        uint32_t phase;
        if (!begin(m, &phase)) return;
        for (int64_t rank = 0; rank < m->size; rank++)
            memcpy(slot_of(m, m->rank, phase) + rank * step, x + rank * size + start, (size_t)count);
        if (!meet(m, phase, call_of(ALL_TO_ALL, size))) return;
        for (int64_t rank = 0; rank < m->size; rank++)
            memcpy(out + rank * size + start, slot_of(m, rank, phase) + m->rank * step, (size_t)count);
    }
}

void OP(all_to_all_replay)(const cell *a) { OP(all_to_all)(a[0].p, a[1].p, a[2].i, a[3].p); }

void OP(broadcast)(const member *m, char *x, int64_t size, int64_t root) {
    for (int64_t start = 0; start < size; start += SLOT_BYTES) {
        int64_t count = min_i64(SLOT_BYTES, size - start);
        uint32_t phase;
        if (!begin(m, &phase)) return;
        if (m->rank == root) memcpy(slot_of(m, root, phase), x + start, (size_t)count);
        if (!meet(m, phase, call_of(BROADCAST, size * MAX_RANKS + root))) return;
        if (m->rank != root) memcpy(x + start, slot_of(m, root, phase), (size_t)count);
    }
}

void OP(broadcast_replay)(const cell *a) { OP(broadcast)(a[0].p, a[1].p, a[2].i, a[3].i); }

void OP(barrier)(const member *m) {
    uint32_t phase;
    if (begin(m, &phase)) meet(m, phase, call_of(BARRIER, 0));
}

void OP(barrier_replay)(const cell *a) { OP(barrier)(a[0].p); }

/* --- from one rank to another --- */

static bool push(const member *m, int64_t to, const char *from, int64_t size) {
    ring *r = ring_of(m, m->rank, to);
    uint32_t capacity = ring_bytes(m->size);
    while (size > 0) {
        uint32_t written = atomic_load_explicit(&r->written.value, memory_order_relaxed);
        uint32_t wanted = (uint32_t)min_i64(size, capacity / RING_STEPS);
        int64_t start = 0;
        if (has_failed(m)) return false;
        if (!wait_for(m, &r->read, written + wanted - capacity, &start)) {
            fail(m, LATE, 1ull << to);
            return false;
        }
        uint32_t at = written % capacity, whole = (uint32_t)min_i64(wanted, capacity - at);
        memcpy(r->bytes + at, from, whole);
        memcpy(r->bytes, from + whole, wanted - whole);
        raise_flag(&r->written, written + wanted);
        from += wanted, size -= wanted;
    }
    return true;
}

static bool pull(const member *m, int64_t from, char *to, int64_t size) {
    ring *r = ring_of(m, from, m->rank);
    uint32_t capacity = ring_bytes(m->size);
    while (size > 0) {
        uint32_t read = atomic_load_explicit(&r->read.value, memory_order_relaxed);
        uint32_t wanted = (uint32_t)min_i64(size, capacity / RING_STEPS);
        int64_t start = 0;
        if (has_failed(m)) return false;
        if (!wait_for(m, &r->written, read + wanted, &start)) {
            fail(m, LATE, 1ull << from);
            return false;
        }
        uint32_t at = read % capacity, whole = (uint32_t)min_i64(wanted, capacity - at);
        memcpy(to, r->bytes + at, whole);
        memcpy(to + whole, r->bytes, wanted - whole);
        raise_flag(&r->read, read + wanted);
        to += wanted, size -= wanted;
    }
    return true;
}

/* Every message opens with its size. Returns when all of it lies in the ring: before it is received, if it fits. */
void OP(send)(const member *m, const char *x, int64_t size, int64_t to) {
    if (m->shared != NULL && push(m, to, (const char *)&size, sizeof size)) push(m, to, x, size);
}

void OP(send_replay)(const cell *a) { OP(send)(a[0].p, a[1].p, a[2].i, a[3].i); }

void OP(recv)(const member *m, char *out, int64_t size, int64_t from) {
    int64_t sent;
    if (m->shared == NULL || !pull(m, from, (char *)&sent, sizeof sent)) return;
    if (sent == size)
        pull(m, from, out, size);
    else
        fail(m, DISAGREE, 1ull << from);
}

void OP(recv_replay)(const cell *a) { OP(recv)(a[0].p, a[1].p, a[2].i, a[3].i); }
