// What this machine can do at best, measured now: the yardsticks of `pronk bench`.
#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>

#include "memory.h"
#include "ops.h"
#include "threads.h"

namespace pronk {
namespace {

double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs rounds of body(task, round), a task for each thread, until `seconds` are over; the best
// round's rate. A round is a few milliseconds, so one that the system disturbs does not count.
template <class F>
double best_rate(int threads, double seconds, F&& body) {
    const int before = get_threads();
    set_threads(threads);
    std::vector<int64_t> amounts(threads);
    double best = 0;
    const double end = now() + seconds;
    for (int round = 0; round == 0 || now() < end; ++round) {
        const double start = now();
        parallel_for(threads, [&](int64_t task) { amounts[task] = body(task, round); });
        const double elapsed = now() - start;
        int64_t total = 0;
        for (int64_t amount : amounts) total += amount;
        best = std::max(best, total / elapsed);
    }
    set_threads(before);
    return best;
}

// Memory far beyond any cache, kept for the next measurement. All threads together read 512 MB, or
// 32 MB each; engine/bench.py counts on that.
class Expanse {
  public:
    explicit Expanse(int threads)
        : share_(std::max((size_t(512) << 20) / threads, size_t(32) << 20) / 4096 * 4096), memory_(share_ * threads) {
        // Pages that nobody has written to are one and the same page of zeros, and those that one thread
        // has written all lie beside one processor.
        parallel_for(threads, [&](int64_t task) {
            for (size_t i = task * share_; i < (task + 1) * share_; i += 4096) memory_.data()[i] = uint8_t(i >> 12);
        });
    }

    size_t share() const { return share_; }
    const uint8_t* part(int64_t task) const { return memory_.data() + task * share_; }

  private:
    size_t share_;
    Memory memory_;
};

}  // namespace

double measure_bandwidth(int threads, double seconds) {
    static std::mutex mutex;
    static std::unique_ptr<Expanse> expanse;
    static int made_for = 0;
    std::lock_guard lock(mutex);
    if (made_for != threads) {
        expanse.reset();
        expanse = std::make_unique<Expanse>(threads);
        made_for = threads;
    }
    return best_rate(threads, seconds, [&](int64_t task, int round) {
        return kernels().read_burst(expanse->part(task), expanse->share(), round % kReadWays);
    });
}

double measure_int8(int threads, double seconds) {
    return best_rate(threads, seconds, [](int64_t, int) { return kernels().int8_burst(1 << 19); });
}

}  // namespace pronk
