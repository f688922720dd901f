#include "cpu/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu {
namespace {

using Body = std::function<void(int64_t)>;

// Waits a moment; gives the core to others after many.
class Wait {
 public:
  void operator()() {
    if (++spins_ > 10000) return std::this_thread::yield();
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

 private:
  int64_t spins_ = 0;
};

// The untaken items of a loop. Its number changes with every loop, so that taking an item, one compare-and-swap of the
// whole word, fails for a member that looked at an older loop.
struct alignas(8) Range {
  uint32_t loop;
  uint16_t front, back;  // items [front, back)

  static constexpr int64_t kMax = UINT16_MAX;
  bool empty() const { return front >= back; }
};

class Team {
 public:
  // Of the member that leads.
  void run(int64_t count, const Body& body) {
    const uint32_t loop = range_.load(std::memory_order_relaxed).loop + 1;
    range_.store({loop, 0, 0});
    body_.store(&body, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    range_.store({loop, 0, static_cast<uint16_t>(count)});
    while (take(true)) {
    }
    for (Wait wait; done_.load(std::memory_order_acquire) < count;) wait();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void dismiss() { dismissed_.store(true); }

  // Of the others.
  void help() {
    Wait wait;
    while (!dismissed_.load(std::memory_order_relaxed)) {
      if (take(false)) {
        wait = {};
      } else {
        wait();
      }
    }
  }

 private:
  // The leader takes items from the front and the others from the back, so that over many loops each meets the same
  // memory again.
  bool take(bool front) {
    Range range = range_.load(std::memory_order_acquire);
    for (;;) {
      if (range.empty()) return false;
      const Body* body = body_.load(std::memory_order_relaxed);
      const int64_t item = front ? range.front : range.back - 1;
      Range rest = range;
      front ? ++rest.front : --rest.back;
      if (range_.compare_exchange_weak(range, rest, std::memory_order_acq_rel, std::memory_order_acquire)) {
        try {
          (*body)(item);
        } catch (...) {
          const std::lock_guard lock(error_mutex_);
          error_ = std::current_exception();
        }
        done_.fetch_add(1, std::memory_order_release);
        return true;
      }
    }
  }

  std::mutex error_mutex_;
  std::exception_ptr error_;
  alignas(64) std::atomic<Range> range_{Range{0, 0, 0}};
  std::atomic<const Body*> body_{nullptr};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<bool> dismissed_{false};
};

thread_local Team* led = nullptr;  // by this thread

std::atomic<bool> forked{false};
[[maybe_unused]] const int kWatchesForks = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

void with_team(int64_t threads, const std::function<void()>& lead) {
  if (threads <= 1 || led != nullptr || forked) return lead();
  Team team;
  std::exception_ptr error;
  launch(threads, [&](int64_t member) {
    if (member > 0) return team.help();
    led = &team;
    try {
      lead();
    } catch (...) {
      error = std::current_exception();
    }
    led = nullptr;
    team.dismiss();
  });
  if (error) std::rethrow_exception(error);
}

void parallel_for(int64_t count, int64_t threads, const Body& body) {
  Team* const team = threads > 1 && count > 1 ? std::exchange(led, nullptr) : nullptr;  // items run loops serially
  for (int64_t begin = 0; begin < count; begin += Range::kMax) {
    const int64_t size = std::min(Range::kMax, count - begin);
    const Body part = [&](int64_t i) { body(begin + i); };
    if (team != nullptr && size > 1) {
      team->run(size, part);
    } else {
      for (int64_t i = 0; i < size; ++i) part(i);
    }
  }
  if (team != nullptr) led = team;
}

}  // namespace fewstep::cpu
