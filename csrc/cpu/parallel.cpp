#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
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

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// The untaken items of a loop. Its number changes with every loop, so that taking an item, one compare-and-swap of the
// whole word, fails for a helper that looked at an older loop.
struct alignas(8) Range {
  uint32_t loop;
  uint16_t front, back;  // items [front, back)

  static constexpr int64_t kMax = UINT16_MAX;
  bool empty() const { return front >= back; }
};

class Helpers {
 public:
  bool run(int64_t count, int64_t threads, const Body& body) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    start(threads - 1);
    const uint32_t loop = range_.load(std::memory_order_relaxed).loop + 1;
    range_.store({loop, 0, 0});
    body_.store(&body, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    range_.store({loop, 0, static_cast<uint16_t>(count)});
    wake_.fetch_add(1);
    wake_.notify_all();
    while (take(true)) {
    }
    for (int64_t spins = 0; done_.load(std::memory_order_acquire) < count; ++spins) {
      spins < 10000 ? pause() : std::this_thread::yield();
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    return true;
  }

 private:
  void start(int64_t wanted) {
    for (; started_ < wanted; ++started_) {
      std::thread([this, id = started_] { help(id); }).detach();
    }
  }

  // The caller takes items from the front and helpers from the back, so that over many loops each meets the same
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

  void help(int64_t id) {
    using Clock = std::chrono::steady_clock;
    constexpr auto kPatience = std::chrono::microseconds(200);  // bridges the serial part between passes and calls
    for (;;) {
      const uint32_t seen = wake_.load();
      const auto deadline = Clock::now() + kPatience;
      do {
        while (id < helpers_.load(std::memory_order_relaxed) && take(false)) {
        }
        for (int i = 0; i < 64 && wake_.load(std::memory_order_relaxed) == seen; ++i) pause();
      } while (wake_.load(std::memory_order_relaxed) == seen && Clock::now() < deadline);
      wake_.wait(seen);
    }
  }

  std::mutex mutex_, error_mutex_;
  std::exception_ptr error_;
  int64_t started_ = 0;
  alignas(64) std::atomic<Range> range_{Range{0, 0, 0}};
  std::atomic<const Body*> body_{nullptr};
  std::atomic<int64_t> helpers_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> wake_{0};
};

}  // namespace

void parallel_for(int64_t count, int64_t threads, const Body& body) {
  static Helpers* helpers = new Helpers;  // never destroyed: helpers outlive static destructors
  for (int64_t begin = 0; begin < count; begin += Range::kMax) {
    const int64_t size = std::min(Range::kMax, count - begin);
    const Body part = [&](int64_t i) { body(begin + i); };
    if (threads > 1 && size > 1 && helpers->run(size, threads, part)) continue;
    for (int64_t i = 0; i < size; ++i) part(i);
  }
}

}  // namespace fewstep::cpu
