/* Per token t and head of queries and keys, with x = (x1, x2) cut in halves:
 *
 *     (x1, x2) <- (x1 * cos[t] - x2 * sin[t], x2 * cos[t] + x1 * sin[t])
 *
 * in place; then keys and values go to their slots of the cache. Also without the rotation.
 */
#include "kv_cache.h"
#include "linear.h"
#include "program.h"

typedef struct {
    float *q; /* what turns: heads side by side, tokens every `stride` elements */
    const float *cos, *sin; /* [tokens][head size / 2]; NULL: nothing turns */
    const float *k, *v;
    int64_t stride, num_turning;
    const int64_t *slots;
    int64_t num_tokens;
    kv_cache cache;
} rotation;

#define TOKENS_PER_TASK 16

static void rotate(float *x, const float *cos, const float *sin, int64_t half) {
    for (int64_t d = 0; d < half; d += LANES) {
        const int count = (int)min_i64(LANES, half - d);
        f32x16 x1 = f32_load_n(x + d, count), x2 = f32_load_n(x + half + d, count);
        f32x16 c = f32_load_n(cos + d, count), s = f32_load_n(sin + d, count);
        f32_store_n(x + d, f32_fma(x1, c, -(x2 * s)), count);
        f32_store_n(x + half + d, f32_fma(x2, c, x1 * s), count);
    }
}

static void store(const rotation *p, int64_t slot, const float *k, const float *v) {
    const int64_t size = p->cache.head_size, block_size = p->cache.block_size;
    int64_t block = slot / block_size, offset = slot % block_size;
    for (int64_t head = 0; head < p->cache.num_heads; head++, k += size, v += size) {
        int64_t start = (block * p->cache.num_heads + head) * block_size * size;
        int64_t key = start + offset / LANES * LANES * size + offset % LANES, value = start + offset * size;
        for (int64_t d = 0; d < size; d++) {
            kv_store(p->cache.keys, key + d * LANES, k[d], p->cache.format);
            kv_store(p->cache.values, value + d, v[d], p->cache.format);
        }
    }
}

static void run_task(void *context, int64_t index, int32_t thread) {
    const rotation *p = context;
    (void)thread;
    const int64_t size = p->cache.head_size, half = size / 2;
    for (int64_t t = index * TOKENS_PER_TASK; t < min_i64((index + 1) * TOKENS_PER_TASK, p->num_tokens); t++) {
        for (int64_t h = 0; h < p->num_turning; h++)
            rotate(p->q + t * p->stride + h * size, p->cos + t * half, p->sin + t * half, half);
        if (p->slots[t] >= 0) store(p, p->slots[t], p->k + t * p->stride, p->v + t * p->stride);
    }
}

void OP(rotary_and_cache)(float *qkv, const float *cos, const float *sin, const int64_t *slots, int64_t num_tokens,
                          int64_t num_heads, void *cache, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads,
                          int64_t head_size, int64_t format) {
    float *k = qkv + num_heads * head_size, *v = k + num_kv_heads * head_size;
    rotation p = {qkv, cos, sin, k, v, (num_heads + 2 * num_kv_heads) * head_size, num_heads + num_kv_heads, slots,
                  num_tokens, kv_cache_of(cache, num_blocks, block_size, num_kv_heads, head_size, format)};
    pool_run(ceil_div(num_tokens, TOKENS_PER_TASK), run_task, &p);
}

void OP(rotary_and_cache_replay)(const cell *a) {
    OP(rotary_and_cache)(a[0].p, a[1].p, a[2].p, a[3].p, a[4].i, a[5].i, a[6].p, a[7].i, a[8].i, a[9].i, a[10].i, a[11].i);
}

void OP(reshape_and_cache)(const float *k, const float *v, int64_t stride, const int64_t *slots, int64_t num_tokens,
                           void *cache, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads, int64_t head_size,
                           int64_t format) {
    rotation p = {NULL, NULL, NULL, k, v, stride, 0, slots, num_tokens,
                  kv_cache_of(cache, num_blocks, block_size, num_kv_heads, head_size, format)};
    pool_run(ceil_div(num_tokens, TOKENS_PER_TASK), run_task, &p);
}

void OP(reshape_and_cache_replay)(const cell *a) {
    OP(reshape_and_cache)(a[0].p, a[1].p, a[2].i, a[3].p, a[4].i, a[5].p, a[6].i, a[7].i, a[8].i, a[9].i, a[10].i);
}
