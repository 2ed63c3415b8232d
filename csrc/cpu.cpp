// Finds the processor's features once and picks the kernels.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pronk {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // asked for by number: clang 14 does not know the name
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool supported(const Kernels& table) {
    const std::string name = table.name;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (name == "avx2")
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (name == "avx512vnni")
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
#endif
    return name == "portable";
}

const Kernels& pick() {
    const Kernels* tables[] = {
#if defined(__x86_64__)
        &avx512vnni::table, &avx2::table,
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
