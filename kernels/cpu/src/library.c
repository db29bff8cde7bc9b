/* What the library says of itself. */
#include <stdint.h>

/* Of the sources and flags that it was made from; see build.py. */
const char *source_digest(void) { return SOURCE_DIGEST; }

/* Whether this machine has an instruction set that ops are compiled for. */
int32_t has_avx512(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
#else
    return 0;
#endif
}

int32_t has_avx2(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return 0;
#endif
}

int32_t has_avxvnni(void) {
#if defined(__x86_64__)
    return has_avx2() && __builtin_cpu_supports("avxvnni");
#else
    return 0;
#endif
}

int32_t has_portable(void) { return 1; }
