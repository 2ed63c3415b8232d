// The thread pool under the thread sanitizer (`cmake --build . --target check_threads`): every task is
// run once, whatever the number of threads, whoever stalls, throws, or calls at the same time.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../threads.h"

namespace {

void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "check_threads: %s\n", what);
    std::exit(1);
}

double work(int64_t seed, int steps) {
    double sum = 0;
    for (int i = 0; i < steps; ++i) sum += double(i ^ seed);
    return sum;
}

void every_task_runs_once() {
    std::vector<int> runs(200);
    for (int round = 0; round < 2000; ++round) {
        const int64_t n = 1 + round % int(runs.size());
        pronk::parallel_for(n, [&](int64_t i) { runs[i] += work(i, round % 7 || i != 3 ? 50 : 20000) >= 0; });
        for (int64_t i = 0; i < n; ++i) require(runs[i] == 1, "a task was run twice or never");
        runs.assign(runs.size(), 0);
    }
}

void exceptions_reach_the_caller() {
    for (int round = 0; round < 200; ++round) {
        std::atomic<int> others{0};
        bool caught = false;
        try {
            pronk::parallel_for(64, [&](int64_t i) {
                if (i == 17 || i == 40) throw std::runtime_error("no memory");
                ++others;
            });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        require(caught && others == 62, "an exception was lost, or took other tasks along");
    }
}

// Workers that sleep in a task look like ones that have lost their core: they rest, and come back.
void stalled_threads_come_back() {
    const auto caller = std::this_thread::get_id();
    const auto run = [&](std::chrono::milliseconds sleep) {
        std::atomic<int> elsewhere{0};
        std::vector<double> out(16);
        pronk::parallel_for(16, [&](int64_t i) {
            const bool here = std::this_thread::get_id() == caller;
            elsewhere += !here;
            if (!here) std::this_thread::sleep_for(sleep);
            out[i] = 1 + work(i, 200000);
        });
        for (const double x : out) require(x > 0, "a task was lost beside a stalled thread");
        return elsewhere.load();
    };
    for (int round = 0; round < 20; ++round) run(std::chrono::milliseconds(3));
    std::this_thread::sleep_for(std::chrono::milliseconds(400));  // longer than any rest
    int elsewhere = 0;
    for (int round = 0; round < 200 && !elsewhere; ++round) elsewhere = run(std::chrono::milliseconds(0));
    require(elsewhere > 0, "a thread that had rested did not come back");
}

void callers_take_turns() {
    std::atomic<long> sum{0};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i)
        callers.emplace_back([&] {
            for (int round = 0; round < 500; ++round) pronk::parallel_for(20, [&](int64_t task) { sum += task; });
        });
    for (std::thread& caller : callers) caller.join();
    require(sum == 4 * 500 * 190, "callers at the same time lost tasks");
}

}  // namespace

int main() {
    for (const int threads : {2, 3, 4, 2, 8}) {
        pronk::set_threads(threads);
        every_task_runs_once();
        exceptions_reach_the_caller();
        stalled_threads_come_back();
        callers_take_turns();
    }
    std::puts("check_threads: passed");
}
