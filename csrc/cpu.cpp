// Finds the processor's features once and picks the kernels.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace pronk {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // asked for by number: clang 14 does not know the name
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
bool has_avx512vnni() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}
bool has_avxvnni() {
#if defined(PRONK_AVXVNNI_BY_AVX512)
    return has_avx512vnni();
#else
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
#endif
}
#elif defined(__aarch64__)
bool has_dotprod() {
#if defined(__linux__)
    return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
    return false;
#endif
}
#endif

bool supported(const Kernels& table) {
    const std::string name = table.name;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (name == "avx2") return avx2;
    if (name == "avxvnni") return avx2 && has_avxvnni();
    if (name == "avx512vnni") return has_avx512vnni();
#elif defined(__aarch64__)
    if (name == "dotprod") return has_dotprod();
#endif
    return name == "portable";
}

const Kernels& pick() {
    const Kernels* tables[] = {
#if defined(__x86_64__)
        &avx512vnni::table, &avxvnni::table, &avx2::table,
#elif defined(__aarch64__)
        &dotprod::table,
#endif
        &portable::table,
    };
    const char* forced = std::getenv("PRONK_ISA");
    std::string known;
    for (const Kernels* table : tables) {
        if (!forced || !*forced) {
            if (supported(*table)) return *table;
            continue;
        }
        if (std::string(forced) == table->name) {
            if (supported(*table)) return *table;
            throw std::runtime_error(std::string("PRONK_ISA: this processor has no ") + forced);
        }
        known += std::string(known.empty() ? "" : ", ") + table->name;
    }
    throw std::runtime_error(std::string("PRONK_ISA: unknown name '") + forced + "'; choose one of " + known);
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& table = pick();
    return table;
}

}  // namespace pronk
