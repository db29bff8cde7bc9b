/* The blocks of one layer's keys and values.
 *
 * Keys: [blocks][heads][block_size / 16][head size][16 positions], so that a vector holds one dimension of 16 positions;
 * values: [blocks][heads][block_size][head size]. block_size: a multiple of 16.
 */
#ifndef CLUSTER_KV_CACHE_H
#define CLUSTER_KV_CACHE_H

#include "simd.h"

#define MAX_HEAD_SIZE 512

enum { KV_FLOAT32, KV_BFLOAT16, KV_FLOAT16 };

typedef struct {
    void *keys, *values;
    int64_t format, block_size, num_heads, head_size;
} kv_cache;

INLINE kv_cache kv_cache_of(void *cache, int64_t num_blocks, int64_t block_size, int64_t num_heads, int64_t head_size,
                            int64_t format) {
    int64_t half = num_blocks * block_size * num_heads * head_size * (format == KV_FLOAT32 ? 4 : 2);
    return (kv_cache){cache, (char *)cache + half, format, block_size, num_heads, head_size};
}

/* Element of dimension 0 of the keys of the 16 positions from `position` on, a multiple of 16. */
INLINE int64_t key_index(const kv_cache *cache, const int32_t *table, int64_t head, int64_t position) {
    int64_t block = table[position / cache->block_size], offset = position % cache->block_size;
    return ((block * cache->num_heads + head) * cache->block_size + offset) * cache->head_size;
}

/* Element of dimension 0 of the values of `position`. */
INLINE int64_t value_index(const kv_cache *cache, const int32_t *table, int64_t head, int64_t position) {
    int64_t block = table[position / cache->block_size], offset = position % cache->block_size;
    return ((block * cache->num_heads + head) * cache->block_size + offset) * cache->head_size;
}

INLINE f32x16 kv_load(const void *from, int64_t index, const int format) {
    if (format == KV_FLOAT32) return f32_load((const float *)from + index);
    if (format == KV_BFLOAT16) return f32_from_bf16((const uint16_t *)from + index);
    return f32_from_f16((const uint16_t *)from + index);
}

/* The first `count` lanes, zeros behind them. */
INLINE f32x16 kv_load_n(const void *from, int64_t index, int count, const int format) {
    if (count == LANES) return kv_load(from, index, format);
    if (format == KV_FLOAT32) return f32_load_n((const float *)from + index, count);
    uint16_t lanes[LANES] = {};
    memcpy(lanes, (const uint16_t *)from + index, (size_t)count * sizeof *lanes);
    return kv_load(lanes, 0, format);
}

/* What is not finite is stored as a finite number: a block outlives its request, and hidden positions weigh 0, which only
 * finite numbers survive. */
INLINE void kv_store(void *to, int64_t index, float value, int64_t format) {
    if (format == KV_FLOAT16) {
        ((uint16_t *)to)[index] = f16_of_finite(value);
        return;
    }
    const float largest = 3.3895e38f; /* finite in bfloat16 too */
    if (!(value == value)) value = 0;
    value = value > largest ? largest : value < -largest ? -largest : value;
    if (format == KV_FLOAT32)
        ((float *)to)[index] = value;
    else
        ((uint16_t *)to)[index] = bf16_of(value);
}

#endif
