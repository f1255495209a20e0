// What entry points for ctypes share.
#pragma once

#include <exception>
#include <string>

namespace emulation {

inline std::string& message() {
    static std::string last;
    return last;
}

// 0, or 1 and a message.
template <class F>
int guarded(const F& run) {
    try {
        run();
        return 0;
    } catch (const std::exception& e) {
        message() = e.what();
        return 1;
    }
}

}  // namespace emulation
