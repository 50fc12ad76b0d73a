/* Which variant of the functions in a portable library suits the processor that runs it. */

#if defined(__x86_64__)
const char *pipeoptim_variant(void) {
    __builtin_cpu_init();
#if defined(HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return "avx512"; /* also asks whether the operating system saves these registers */
#endif
#if defined(HAS_AVX2)
    if (__builtin_cpu_supports("avx2")) return "avx2";
#endif
    return "baseline";
}
#else
const char *pipeoptim_variant(void) { return "baseline"; }
#endif
