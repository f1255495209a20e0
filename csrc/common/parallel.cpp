#include "common/parallel.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "common/exact_denormals.h"

namespace platonic {
namespace {

// One call of parallel_for. Lives on the caller's stack: the caller leaves only when no worker is inside.
struct Job {
    const std::function<void(int64_t)>& body;
    const int64_t tasks;
    std::atomic<int64_t> next{0};
    std::mutex error_lock;
    std::exception_ptr error;

    Job(const std::function<void(int64_t)>& body, int64_t tasks) : body(body), tasks(tasks) {}

    void work() {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
            try {
                body(task);
            } catch (...) {
                std::lock_guard<std::mutex> hold(error_lock);
                if (!error) error = std::current_exception();
                next = tasks;
            }
        }
    }
};

thread_local bool inside_task = false;

class Pool {
public:
    const pid_t owner = getpid();
    std::mutex one_job;  // held by the caller whose job the pool runs

    void run(Job& job, int helpers) {
        start_workers(helpers);
        {
            std::lock_guard<std::mutex> hold(lock_);
            job_ = &job;
            seats_ = helpers;
        }
        wake_.notify_all();
        inside_task = true;
        job.work();
        inside_task = false;
        std::unique_lock<std::mutex> hold(lock_);
        job_ = nullptr;  // nobody joins any more
        idle_.wait(hold, [this] { return busy_ == 0; });
    }

private:
    void start_workers(int wanted) {
        while (workers_ < wanted) {
            // Detached: a blocked worker is discarded with the process, so exit never waits for it.
            std::thread([this] { serve(); }).detach();
            ++workers_;
        }
    }

    void serve() {
        inside_task = true;
        const ExactDenormals exact;  // a new thread begins with the mode of the one that started it
        std::unique_lock<std::mutex> hold(lock_);
        for (;;) {
            wake_.wait(hold, [this] { return job_ != nullptr && seats_ > 0; });
            Job* job = job_;
            --seats_;
            ++busy_;
            hold.unlock();
            job->work();
            hold.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    std::mutex lock_;
    std::condition_variable wake_, idle_;
    Job* job_ = nullptr;
    int seats_ = 0, busy_ = 0, workers_ = 0;
};

// The pool is never destroyed (workers may outlive static destructors), and a forked child, in which no worker
// exists, gets a new one.
Pool& pool() {
    static std::atomic<Pool*> current{nullptr};
    Pool* seen = current.load();
    while (seen == nullptr || seen->owner != getpid()) {
        Pool* fresh = new Pool;
        if (current.compare_exchange_strong(seen, fresh)) return *fresh;
        delete fresh;
    }
    return *seen;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    if (tasks <= 0) return;
    Job job(body, tasks);
    const int helpers = static_cast<int>(threads < tasks ? threads : tasks) - 1;
    if (helpers <= 0 || inside_task) {
        job.work();
    } else {
        Pool& shared = pool();
        std::unique_lock<std::mutex> mine(shared.one_job, std::try_to_lock);
        if (mine.owns_lock())
            shared.run(job, helpers);
        else
            job.work();
    }
    if (job.error) std::rethrow_exception(job.error);
}

}  // namespace platonic
