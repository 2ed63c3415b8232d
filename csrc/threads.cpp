#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <ctime>
#include <deque>
#include <exception>
#include <fstream>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace pronk {
namespace {

constexpr auto kSpin = std::chrono::microseconds(300);  // then sleep; a step's next op comes sooner

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct alignas(64) Line {
    std::atomic<uint64_t> value{0};
};

using Clock = std::chrono::steady_clock;

// A thread that another process keeps from its core is left out for a while: what it holds when it is
// taken away stops everybody until it is back, some milliseconds later. The longer this goes on, the
// longer it stays out. Somebody who has waited for kStall looks how much the others compute in kLook.
constexpr auto kStall = std::chrono::microseconds(300), kLook = std::chrono::microseconds(100);
constexpr auto kShortestRest = std::chrono::milliseconds(10), kLongestRest = std::chrono::milliseconds(160);

struct alignas(64) Worker {
    std::atomic<bool> busy{false}, resting{false};
    clockid_t clock{};                               // of its processor time
    std::chrono::nanoseconds computed{};             // processor time at the first look; the caller's
    std::chrono::milliseconds rest = kShortestRest;  // the next one; the caller's
    Clock::time_point back;                          // end of the last one; the caller's, then the worker's

    std::chrono::nanoseconds processor_time() const {
        timespec t{};
        clock_gettime(clock, &t);
        return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
    }
};

// The region at work is one word, `tasks << 32 | next`. A claim is a fetch_add on it and is valid
// while next < tasks; whoever holds a valid claim keeps the caller waiting, so fn and context stay
// true. A late thread finds next >= tasks and touches nothing.
class Pool {
  public:
    void set_threads(int n) {
        std::lock_guard lock(region_);
        active_.store(n, std::memory_order_relaxed);
    }

    int threads() const { return active_.load(std::memory_order_relaxed); }

    void run(int64_t n, TaskFn fn, void* context) {
        if (n <= 0) return;
        if (n == 1 || threads() == 1) {
            for (int64_t task = 0; task < n; ++task) fn(context, task);
            return;
        }
        std::lock_guard lock(region_);
        while (int(workers_.size()) < threads() - 1) start();
        fn_ = fn;
        context_ = context;
        done_.value.store(0, std::memory_order_relaxed);
        claim_.value.store(uint64_t(n) << 32, std::memory_order_seq_cst);
        if (sleepers_.load(std::memory_order_seq_cst) > 0) {
            wake_.fetch_add(1, std::memory_order_seq_cst);
            wake_.notify_all();
        }
        const auto began = Clock::now();
        int64_t mine = 0;
        while (run_one()) ++mine;
        wait_for_all(uint64_t(n), mine ? (Clock::now() - began) / mine : Clock::duration::zero());
        if (failed_.exchange(false)) std::rethrow_exception(std::exchange(error_, nullptr));
    }

  private:
    // `usual`: how long a task takes this thread, 0 if it had none.
    void wait_for_all(uint64_t n, Clock::duration usual) {
        auto next = Clock::now() + 3 * usual + kStall;
        int looks = usual.count() > 0 ? 0 : 2;
        while (done_.value.load(std::memory_order_acquire) != n) {
            for (int i = 0; i < 64 && done_.value.load(std::memory_order_acquire) != n; ++i) relax();
            if (looks == 2 || Clock::now() < next) continue;
            for (Worker& w : workers_)
                if (looks == 0)
                    w.computed = w.processor_time();
                else
                    send_to_rest(w);
            ++looks;
            next = Clock::now() + kLook;
        }
    }

    void send_to_rest(Worker& w) {
        if (!w.busy.load(std::memory_order_acquire) || w.resting.load(std::memory_order_acquire)) return;
        if (w.processor_time() - w.computed > kLook / 2) return;  // it has a long task
        const auto now = Clock::now();
        // stalled again soon after it came back: its core is still taken
        w.rest = now - w.back < 4 * kShortestRest ? std::min(2 * w.rest, kLongestRest) : kShortestRest;
        w.back = now + w.rest;
        w.resting.store(true, std::memory_order_release);
    }

    static bool open(uint64_t claim) { return uint32_t(claim) < claim >> 32; }

    bool run_one() {
        // look first: a blind fetch_add by idle threads would run the counter up
        if (!open(claim_.value.load(std::memory_order_acquire))) return false;
        const uint64_t claim = claim_.value.fetch_add(1, std::memory_order_acq_rel);
        if (!open(claim)) return false;
        try {
            fn_(context_, int64_t(uint32_t(claim)));
        } catch (...) {  // no memory, most likely; told to the caller when nobody is at work any more
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
        done_.value.fetch_add(1, std::memory_order_release);
        return true;
    }

    void work(int index, Worker& me) {
        for (;;) {
            if (me.resting.load(std::memory_order_acquire)) {
                std::this_thread::sleep_until(me.back);
                me.resting.store(false, std::memory_order_release);
            }
            me.busy.store(true, std::memory_order_release);
            const bool ran = index < threads() && run_one();
            me.busy.store(false, std::memory_order_release);
            if (ran) continue;
            const auto until = Clock::now() + kSpin;
            bool found = false;
            do {
                for (int i = 0; i < 32 && !found; ++i) {
                    found = index < threads() && open(claim_.value.load(std::memory_order_acquire));
                    if (!found) relax();
                }
            } while (!found && Clock::now() < until);
            if (!found) sleep(index);
        }
    }

    void sleep(int index) {
        const uint32_t seen = wake_.load(std::memory_order_seq_cst);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        const bool work = index < threads() && open(claim_.value.load(std::memory_order_seq_cst));
        if (!work) wake_.wait(seen, std::memory_order_seq_cst);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    void start() {
        Worker& worker = workers_.emplace_back();
        const int index = int(workers_.size());
        std::thread thread([this, index, &worker] { work(index, worker); });
        pthread_getcpuclockid(thread.native_handle(), &worker.clock);
        pin(thread, index);
        thread.detach();
    }

    static void pin(std::thread& thread, int index) {
        cpu_set_t allowed, one;
        if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        std::vector<int> cpus;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
        if (index >= int(cpus.size())) return;  // more threads than processors: let them float
        CPU_ZERO(&one);
        CPU_SET(cpus[index], &one);
        pthread_setaffinity_np(thread.native_handle(), sizeof one, &one);
    }

    Line claim_, done_;
    TaskFn fn_ = nullptr;
    void* context_ = nullptr;
    std::atomic<uint32_t> wake_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<int> active_{1};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;  // of the first task that has failed
    std::mutex region_;
    std::deque<Worker> workers_;  // started so far, from thread 1 on: the caller is thread 0
};

// Processors' worth of time that a container's control group grants; without a limit, very many.
int quota() {
    double limit = -1, period = 0;
    if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> limit >> period) return int(std::ceil(limit / period));
    std::ifstream v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
    if (v1 >> limit && v1_period >> period && limit > 0) return int(std::ceil(limit / period));
    return std::numeric_limits<int>::max();  // no such file, or the word "max"
}

// Never destroyed: detached threads outlive static destructors. A forked child has none of the
// threads, so it gets a pool of its own.
std::atomic<Pool*> pool{nullptr};

Pool& the_pool() {
    static const bool once = [] {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr, [] {
            const int n = pool.load()->threads();
            pool = new Pool;
            pool.load()->set_threads(n);
        });
        return true;
    }();
    (void)once;
    return *pool.load();
}

}  // namespace

int hardware_threads() {
    cpu_set_t allowed;
    int n = int(std::max(1u, std::thread::hardware_concurrency()));
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) n = CPU_COUNT(&allowed);
    return std::max(1, std::min(n, quota()));
}

void set_threads(int n) { the_pool().set_threads(std::max(1, n)); }
int get_threads() { return the_pool().threads(); }
void run_tasks(int64_t n, TaskFn fn, void* context) { the_pool().run(n, fn, context); }

}  // namespace pronk
