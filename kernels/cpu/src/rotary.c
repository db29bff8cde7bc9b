/* Rotary embedding of queries and keys, fused with the write of keys and values to the cache:
 *
 *   (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)   for the halves of a head (Su et al., 2021)
 *
 * Queries are rotated where they lie. A slot is block * block_size + offset; a negative one stores nothing.
 */
#include "kv_cache.h"
#include "pool.h"
#include "program.h"

#define NUMBERS_PER_TASK 8192 /* fewer are done before another thread has heard of them */

typedef struct {
    float *qkv; /* rotary_and_cache: tokens of H + 2G heads */
    const float *keys, *values;
    int64_t token_stride; /* floats */
    const float *cos, *sin;
    kv_cache kv;
    const int64_t *slots;
    int64_t num_tokens, num_heads, tokens_per_task;
} rotation;

/* to may be x. */
INLINE void rotate(const float *x, const float *cos, const float *sin, int64_t half, float *to) {
    for (int64_t i = 0; i < half; i += WIDTH) {
        f32v x1 = v_load_n(x + i, half - i), x2 = v_load_n(x + half + i, half - i);
        f32v c = v_load_n(cos + i, half - i), s = v_load_n(sin + i, half - i);
        v_store_n(to + i, x1 * c - x2 * s, half - i);
        v_store_n(to + half + i, x2 * c + x1 * s, half - i);
    }
}

INLINE void store_key(const kv_cache *kv, int64_t slot, int64_t head, const float *key, const int type) {
    int64_t at = key_at(kv, slot / kv->block_size, slot % kv->block_size, head);
    for (int64_t d = 0; d < kv->head_dim; d++) kv_store(kv->keys, at + d * LANES, key[d], type);
}

INLINE void store_value(const kv_cache *kv, int64_t slot, int64_t head, const float *value, const int type) {
    int64_t at = value_at(kv, slot / kv->block_size, slot % kv->block_size, head);
    for (int64_t d = 0; d < kv->head_dim; d++) kv_store(kv->values, at + d, value[d], type);
}

INLINE void run_tokens(const rotation *a, int64_t index, const int type) {
    int64_t head_dim = a->kv.head_dim, half = head_dim / 2;
    int64_t end = min_i64((index + 1) * a->tokens_per_task, a->num_tokens);
    for (int64_t t = index * a->tokens_per_task; t < end; t++) {
        int64_t slot = a->slots[t];
        float rotated[head_dim];
        for (int64_t h = 0; h < a->num_heads; h++) {
            float *q = a->qkv + t * a->token_stride + h * head_dim;
            rotate(q, a->cos + t * half, a->sin + t * half, half, q);
        }
        for (int64_t h = 0; h < a->kv.num_kv_heads && slot >= 0; h++) {
            const float *key = a->keys + t * a->token_stride + h * head_dim;
            if (a->cos != NULL) {
                rotate(key, a->cos + t * half, a->sin + t * half, half, rotated);
                key = rotated;
            }
            store_key(&a->kv, slot, h, key, type);
            store_value(&a->kv, slot, h, a->values + t * a->token_stride + h * head_dim, type);
        }
    }
}

#define DEFINE_TASK(type)                                                  \
    static void run_##type(void *context, int64_t index, int32_t thread) { \
        (void)thread;                                                      \
        run_tokens(context, index, type);                                  \
    }
DEFINE_TASK(KV_FLOAT32)
DEFINE_TASK(KV_BFLOAT16)
DEFINE_TASK(KV_FLOAT16)

static void run(rotation *a, int64_t type) {
    int64_t numbers = (a->num_heads + 2 * a->kv.num_kv_heads) * a->kv.head_dim;
    a->tokens_per_task = max_i64(1, NUMBERS_PER_TASK / max_i64(1, numbers));
#define CASE(constant) pool_run(ceil_div(a->num_tokens, a->tokens_per_task), run_##constant, a)
    SWITCH_KV_TYPE(type, CASE)
#undef CASE
}

/* qkv: contiguous tokens of num_heads query heads, then keys, then values. cos, sin: (T, head_dim / 2). Others as in
 * attention.c. */
void OP(rotary_and_cache)(float *qkv, const float *cos, const float *sin, const int64_t *slots, int64_t num_tokens,
                          int64_t num_heads, void *cache, int64_t num_blocks, int64_t block_size,
                          int64_t num_kv_heads, int64_t head_dim, int64_t type) {
    rotation a = {.qkv = qkv, .keys = qkv + num_heads * head_dim, .values = qkv + (num_heads + num_kv_heads) * head_dim,
                  .token_stride = (num_heads + 2 * num_kv_heads) * head_dim, .cos = cos, .sin = sin, .slots = slots,
                  .num_tokens = num_tokens, .num_heads = num_heads};
    a.kv = kv_cache_of(cache, num_blocks, block_size, num_kv_heads, head_dim, (int)type);
    run(&a, type);
}

void OP(rotary_and_cache_replay)(const cell *a) {
    OP(rotary_and_cache)(a[0].p, a[1].p, a[2].p, a[3].p, a[4].i, a[5].i, a[6].p, a[7].i, a[8].i, a[9].i, a[10].i,
                         a[11].i);
}

/* Keys and values as they are; token_stride: floats from one token to the next, of both. */
void OP(reshape_and_cache)(const float *keys, const float *values, int64_t token_stride, const int64_t *slots,
                           int64_t num_tokens, void *cache, int64_t num_blocks, int64_t block_size,
                           int64_t num_kv_heads, int64_t head_dim, int64_t type) {
    rotation a = {.keys = keys, .values = values, .token_stride = token_stride, .slots = slots,
                  .num_tokens = num_tokens};
    a.kv = kv_cache_of(cache, num_blocks, block_size, num_kv_heads, head_dim, (int)type);
    run(&a, type);
}

void OP(reshape_and_cache_replay)(const cell *a) {
    OP(reshape_and_cache)(a[0].p, a[1].p, a[2].i, a[3].p, a[4].i, a[5].p, a[6].i, a[7].i, a[8].i, a[9].i, a[10].i);
}
