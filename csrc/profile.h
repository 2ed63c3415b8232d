// Where the time of the calling thread goes, by kind of operation: what `pronk bench --profile`
// shows. Always on: reading the clock costs less than waking a thread.
#pragma once

#include <array>
#include <chrono>

namespace pronk {

enum class Op { Round, Qkv, Rope, Attention, Output, GateUp, Down, Other };
constexpr int kOps = 8;
constexpr const char* kOpNames[kOps] = {"norm and rounding", "q, k, v",      "rotation", "attention",
                                        "attention output",  "gate and up", "down",     "other linear"};

inline std::array<double, kOps>& profile() {
    static thread_local std::array<double, kOps> seconds{};
    return seconds;
}

// Adds its lifetime to an operation, less what the Timed inside it have taken.
class Timed {
  public:
    explicit Timed(Op op) : op_(op), outer_(current()) { current() = this; }
    Timed(const Timed&) = delete;
    ~Timed() {
        const double spent = std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
        profile()[int(op_)] += spent - inner_;
        if (outer_) outer_->inner_ += spent;
        current() = outer_;
    }

  private:
    static Timed*& current() {
        static thread_local Timed* innermost = nullptr;
        return innermost;
    }

    Op op_;
    Timed* outer_;
    double inner_ = 0;
    std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace pronk
