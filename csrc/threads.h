// One pool of pinned threads for the whole process. Tasks are claimed from a counter, so a thread
// that the machine has taken away delays only the task that it holds.
#pragma once

#include <cstdint>

namespace pronk {

using TaskFn = void (*)(void* context, int64_t task);

// Threads of the parallel regions that follow, the caller included; results never depend on it.
void set_threads(int n);
int get_threads();
int hardware_threads();  // processors that this process may use, and has the quota to use

// Runs fn(context, task) for task 0..n-1 and returns when all are done; of the exceptions that tasks
// end with, the first is thrown then. Regions of several callers
// run one after another; a region must not start another. Scratch memory of a task belongs in
// thread_local storage: how many threads take part is settled only while it runs.
void run_tasks(int64_t n, TaskFn fn, void* context);

template <class F>
void parallel_for(int64_t n, const F& body) {
    run_tasks(
        n, [](void* f, int64_t task) { (*static_cast<const F*>(f))(task); },
        const_cast<F*>(&body));
}

}  // namespace pronk
