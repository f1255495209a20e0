#include "emulation.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <csetjmp>
#include <csignal>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

extern char __start_emulated_shared[], __stop_emulated_shared[];

namespace emulation {

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace {

constexpr int warp = 32;
constexpr size_t stack_bytes = 64 * 1024;

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t start;
    jmp_buf place;
    bool started = false;
    State state = State::done;
    bool predicate = false;
    Collective kind = Collective::sync;
    uint32_t mask = 0;
    uint64_t value = 0, result = 0;
    int argument = 0;
};

std::vector<Fiber> fibers;  // kept from launch to launch
int current = 0;
bool backwards = false;
const std::function<void()>* work = nullptr;
jmp_buf scheduler;
std::string assertion;  // the one that failed
sigjmp_buf touched;     // where a fault of memory leads
void* address = nullptr;

// What a launch asked for, against a page that cannot be touched.
class DynamicShared {
public:
    explicit DynamicShared(size_t size) : size_(size), memory_(size > 0 ? allocate(size, true) : nullptr) {
        now = memory_;
    }
    ~DynamicShared() {
        if (memory_ != nullptr) release(memory_, size_, true);
        now = nullptr;
    }
    DynamicShared(const DynamicShared&) = delete;
    DynamicShared& operator=(const DynamicShared&) = delete;
    void spoil() const {
        if (memory_ != nullptr) memset(memory_, 0xa5, size_);
    }
    static void* now;

private:
    size_t size_;
    void* memory_;
};
void* DynamicShared::now = nullptr;

// Changing places with setjmp costs no system call, unlike swapcontext.
void wait_for_others() {
    if (_setjmp(fibers[current].place) == 0) _longjmp(scheduler, 1);
}

void live() {
    for (;;) {
        (*work)();
        fibers[current].state = State::done;
        wait_for_others();
    }
}

void resume(int i) {
    current = i;
    const unsigned n = static_cast<unsigned>(i), row = n / blockDim.x;
    threadIdx = dim3(n % blockDim.x, row % blockDim.y, row / blockDim.y);
    Fiber& fiber = fibers[i];
    if (_setjmp(scheduler) != 0) {
        if (!assertion.empty()) throw std::runtime_error(std::exchange(assertion, ""));
        return;
    }
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = stack_bytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, live, 0);
    setcontext(&fiber.start);
}

std::string where(int i) {
    std::string block = std::to_string(blockIdx.x);
    if (gridDim.y * gridDim.z > 1) block += " " + std::to_string(blockIdx.y) + " " + std::to_string(blockIdx.z);
    return "block " + block + " thread " + std::to_string(i);
}

// Runs the threads of a warp that can; whether any could.
bool run_warp(int first, int last) {
    bool any = false;
    for (bool more = true; more;) {
        more = false;
        for (int k = first; k < last; ++k) {
            const int i = backwards ? first + last - 1 - k : k;
            if (fibers[i].state != State::ready) continue;
            resume(i);
            more = any = true;
        }
    }
    return any;
}

void run_block(int threads) {
    memset(__start_emulated_shared, 0xa5, __stop_emulated_shared - __start_emulated_shared);
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
    const int warps = (threads + warp - 1) / warp;
    for (;;) {
        bool any = false;
        for (int k = 0; k < warps; ++k) {
            const int w = backwards ? warps - 1 - k : k;
            any |= run_warp(w * warp, w * warp + warp < threads ? w * warp + warp : threads);
        }
        if (any) continue;
        int waiting = 0, done = 0;
        bool predicate = false;
        for (int i = 0; i < threads; ++i) {
            done += fibers[i].state == State::done;
            waiting += fibers[i].state == State::at_barrier;
            if (fibers[i].state == State::in_warp)
                throw std::runtime_error(where(i) + " waits for lanes of its warp that do not come");
            predicate |= fibers[i].state == State::at_barrier && fibers[i].predicate;
        }
        if (done == threads) return;
        if (done > 0) throw std::runtime_error(where(0) + " and others: some wait at a barrier, some have returned");
        for (int i = 0; i < threads; ++i) {
            fibers[i].predicate = predicate;
            fibers[i].state = State::ready;
        }
    }
}

void on_fault(int, siginfo_t* info, void*) {
    address = info->si_addr;
    siglongjmp(touched, 1);
}

// Faults of memory go to on_fault for as long as it lives.
class FaultHandler {
public:
    FaultHandler() {
        stack_t own = {};
        own.ss_sp = stack_;
        own.ss_size = sizeof stack_;
        sigaltstack(&own, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_fault;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigaction(SIGSEGV, &action, &old_segv_);
        sigaction(SIGBUS, &action, &old_bus_);
    }
    ~FaultHandler() {
        sigaction(SIGSEGV, &old_segv_, nullptr);
        sigaction(SIGBUS, &old_bus_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    alignas(16) char stack_[64 * 1024];
    stack_t old_stack_ = {};
    struct sigaction old_segv_, old_bus_;
};

}  // namespace

void set_backwards(bool value) { backwards = value; }

void* dynamic_shared() { return DynamicShared::now; }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
    const size_t threads = size_t{block.x} * block.y * block.z, blocks = size_t{grid.x} * grid.y * grid.z;
    while (fibers.size() < threads) {
        fibers.emplace_back();
        fibers.back().stack.reset(new char[stack_bytes]);
    }
    gridDim = grid;
    blockDim = block;
    work = &thread;
    const auto handler = std::make_unique<FaultHandler>();
    const auto shared = std::make_unique<const DynamicShared>(shared_bytes);
    const auto start_anew = [] {  // fibers that stopped somewhere in the middle
        for (Fiber& fiber : fibers) fiber.started = false;
    };
    if (sigsetjmp(touched, 1) != 0) {
        start_anew();
        throw std::runtime_error(where(current) + " left its memory at " +
                                 std::to_string(reinterpret_cast<uintptr_t>(address)));
    }
    for (size_t i = 0; i < blocks; ++i) {
        const size_t b = backwards ? blocks - 1 - i : i, row = b / grid.x;
        blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(row % grid.y),
                        static_cast<unsigned>(row / grid.y));
        shared->spoil();
        try {
            run_block(static_cast<int>(threads));
        } catch (...) {
            start_anew();
            throw;
        }
    }
}

bool barrier(bool x) {
    Fiber& fiber = fibers[current];
    fiber.predicate = x;
    fiber.state = State::at_barrier;
    wait_for_others();
    return fibers[current].predicate;
}

uint64_t exchange(Collective kind, uint32_t mask, uint64_t value, int argument) {
    const int first = current / warp * warp, lane = current % warp;
    Fiber& mine = fibers[current];
    mine.kind = kind;
    mine.mask = (mask >> lane & 1) != 0 ? mask : 0;  // a lane outside of its mask waits for ever
    mine.value = value;
    mine.argument = argument;
    mine.state = State::in_warp;
    bool all = mine.mask != 0;
    for (int l = 0; l < warp && all; ++l) {
        if ((mask >> l & 1) == 0) continue;
        const Fiber& other = fibers[first + l];
        all = other.state == State::in_warp && other.kind == kind && other.mask == mask;
    }
    if (!all) {
        wait_for_others();
        return fibers[current].result;
    }
    uint64_t ballot = 0;
    for (int l = 0; l < warp; ++l)
        if ((mask >> l & 1) != 0 && fibers[first + l].value != 0) ballot |= uint64_t{1} << l;
    for (int l = 0; l < warp; ++l) {
        if ((mask >> l & 1) == 0) continue;
        Fiber& fiber = fibers[first + l];
        const int from = kind == Collective::shuffle_xor  ? l ^ fiber.argument
                         : kind == Collective::shuffle_up ? l - fiber.argument
                                                          : l + fiber.argument;
        switch (kind) {
            case Collective::sync:
                break;
            case Collective::ballot:
                fiber.result = ballot;
                break;
            case Collective::shuffle_xor:
            case Collective::shuffle_up:
            case Collective::shuffle_down:
                fiber.result = from < 0 || from >= warp ? fiber.value : fibers[first + from].value;
                break;
            case Collective::match:
                fiber.result = 0;
                for (int o = 0; o < warp; ++o)
                    if ((mask >> o & 1) != 0 && fibers[first + o].value == fiber.value)
                        fiber.result |= uint64_t{1} << o;
                break;
        }
        fiber.state = State::ready;
    }
    return mine.result;
}

namespace {

size_t whole_pages(size_t size) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return (size + page - 1) / page * page;
}

}  // namespace

void* allocate(size_t size, bool at_end) {
    const size_t page = whole_pages(1), inner = whole_pages(size);
    char* all = static_cast<char*>(
        mmap(nullptr, inner + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (all == MAP_FAILED || mprotect(all + page, inner, PROT_READ | PROT_WRITE) != 0)
        throw std::runtime_error("no memory");
    return all + page + (at_end ? inner - size : 0);
}

void release(void* memory, size_t size, bool at_end) {
    const size_t page = whole_pages(1), inner = whole_pages(size);
    munmap(static_cast<char*>(memory) - (at_end ? inner - size : 0) - page, inner + 2 * page);
}

}  // namespace emulation

// assert() of a kernel ends here, since the library's symbols come before those of others (-Bsymbolic).
extern "C" void __assert_fail(const char* text, const char*, unsigned, const char*) noexcept {
    emulation::assertion = emulation::where(emulation::current) + " fails an assertion: " + text;
    _longjmp(emulation::scheduler, 1);
}
