// What this processor and its operating system can run, asked of the processor. Compiled for the plainest one of its kind.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// Linux lends the tile registers only to a process that asked for them (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool tiles_granted() {
#if defined(__linux__) && defined(__x86_64__)
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
    return false;
#endif
}

}  // namespace

// The highest of the levels that library.py knows: 0 generic, 1 avx2, 2 avx512 (with bf16 products and byte shuffles), 3 amx (bf16 tiles).
extern "C" int isa_level() {
    int level = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();  // these also ask whether the operating system saves the registers
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) return level;
    level = 1;
    bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    if (!wide) return level;
    level = 2;
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && tiles_granted()) level = 3;
#endif
    return level;
}
