// One blocking pool of std::thread shared by every CPU kernel.
//
// parallel_for(tasks, threads, body) calls body(task) once for every task in [0, tasks), on at most `threads`
// threads, the caller's among them, and returns when all calls have returned. The first exception that a call
// throws is rethrown to the caller; tasks that have not started by then are skipped.
//
// A kernel cuts its work into tasks by size alone, never by thread count, and combines results in task order:
// that makes its output bit-identical for any number of threads.
//
// Safe to call from several threads at once (a caller that finds the pool busy runs its tasks itself), from
// inside a task (runs in place), after fork (the child starts a pool of its own) and during interpreter exit.
#pragma once

#include <cstdint>
#include <functional>

namespace platonic {

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace platonic
