/* How a layer's KV cache lies in memory, for whoever writes or reads it.
 *
 * The cache is (2, num_blocks, block_size, G, D) of one element type, keys first, and opaque but for its blocks. A block
 * holds, per key-value head,
 *
 *   keys   [block_size / 16][D][16]   transposed, so that the scores of 16 positions are one vector
 *   values [block_size][D]
 *
 * What is stored is finite: attention multiplies what it hides by zero, and only a finite number survives that.
 */
#ifndef CLUSTER_KV_CACHE_H
#define CLUSTER_KV_CACHE_H

#include "native.h"

/* Element types, numbered as in attention.py. */
enum { KV_FLOAT32, KV_BFLOAT16, KV_FLOAT16 };

typedef struct {
    void *keys, *values;
    int64_t block_size; /* a multiple of 16 */
    int64_t num_kv_heads, head_dim;
} kv_cache;

/* Calls CASE(type) with the element type as a constant. */
#define SWITCH_KV_TYPE(type, CASE)                  \
    switch (type) {                                 \
        case KV_FLOAT32: CASE(KV_FLOAT32); break;   \
        case KV_BFLOAT16: CASE(KV_BFLOAT16); break; \
        case KV_FLOAT16: CASE(KV_FLOAT16); break;   \
    }

INLINE kv_cache kv_cache_of(void *cache, int64_t num_blocks, int64_t block_size, int64_t num_kv_heads,
                            int64_t head_dim, const int type) {
    int64_t num_bytes = num_blocks * block_size * num_kv_heads * head_dim * (type == KV_FLOAT32 ? 4 : 2);
    return (kv_cache){cache, (char *)cache + num_bytes, block_size, num_kv_heads, head_dim};
}

/* The element of dimension 0 of a head's key; the next dimension's is LANES further. */
INLINE int64_t key_at(const kv_cache *kv, int64_t block, int64_t offset, int64_t head) {
    int64_t of_head = (block * kv->num_kv_heads + head) * kv->block_size;
    return (of_head + offset / LANES * LANES) * kv->head_dim + offset % LANES;
}

/* The element of dimension 0 of a head's value. */
INLINE int64_t value_at(const kv_cache *kv, int64_t block, int64_t offset, int64_t head) {
    return ((block * kv->num_kv_heads + head) * kv->block_size + offset) * kv->head_dim;
}

INLINE f32v kv_load(const void *elements, int64_t at, const int type) {
    if (type == KV_BFLOAT16) return v_from_bf16((const uint16_t *)elements + at);
    if (type == KV_FLOAT16) return v_from_f16((const uint16_t *)elements + at);
    return v_load((const float *)elements + at);
}

/* The first `count` elements, zeros behind them. */
INLINE f32v kv_load_n(const void *elements, int64_t at, int64_t count, const int type) {
    if (count >= WIDTH) return kv_load(elements, at, type);
    if (type == KV_FLOAT32) return v_load_n((const float *)elements + at, count);
    uint16_t padded[WIDTH] = {0};
    memcpy(padded, (const uint16_t *)elements + at, (size_t)count * sizeof *padded);
    return kv_load(padded, 0, type);
}

/* Infinities become the type's largest number, NaN becomes 0. */
INLINE void kv_store(void *elements, int64_t at, float value, const int type) {
    const float largest = type == KV_BFLOAT16 ? 3.3895314e38f : 3.4028235e38f;
    if (type == KV_FLOAT16) {
        ((uint16_t *)elements)[at] = f16_of_finite(value);
        return;
    }
    value = value > largest ? largest : value < -largest ? -largest : value == value ? value : 0.0f;
    if (type == KV_BFLOAT16)
        ((uint16_t *)elements)[at] = bf16_of(value);
    else
        ((float *)elements)[at] = value;
}

#endif
