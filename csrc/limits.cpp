// What this machine can do at best, measured now: the yardsticks of `pronk bench`.
#include <sys/mman.h>

#include <algorithm>
#include <chrono>

#include "memory.h"
#include "ops.h"
#include "threads.h"

namespace pronk {
namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs rounds of body(thread_task) on all threads until `seconds` are over; the best round's rate.
template <class F>
double best_rate(int threads, double seconds, F&& body) {
    const int before = get_threads();
    set_threads(threads);
    double best = 0;
    const double end = now() + seconds;
    do {
        std::vector<int64_t> amounts(threads);
        const double start = now();
        parallel_for(threads, [&](int64_t task) { amounts[task] = body(task); });
        const double elapsed = now() - start;
        int64_t total = 0;
        for (int64_t amount : amounts) total += amount;
        best = total / elapsed > best ? total / elapsed : best;
    } while (now() < end);
    set_threads(before);
    return best;
}

}  // namespace

double measure_bandwidth(int threads, double seconds) {
    // all threads together 512 MB, or 32 MB each: far beyond any cache
    const size_t share = std::max((size_t(512) << 20) / threads, size_t(32) << 20) / 4096 * 4096;
    Memory memory(share * threads);
    const int before = get_threads();
    set_threads(threads);
    parallel_for(threads, [&](int64_t task) {
        for (size_t i = 0; i < share; i += 4096) memory.data()[task * share + i] = uint8_t(i);
    });
    set_threads(before);
    return best_rate(threads, seconds,
                     [&](int64_t task) { return kernels().read_burst(memory.data() + task * share, share); });
}

double measure_int8(int threads, double seconds) {
    return best_rate(threads, seconds, [](int64_t) { return kernels().int8_burst(1 << 19); });
}

}  // namespace pronk
