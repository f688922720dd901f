// What the drivers share: aligned memory that is grown and reused, and problems handed to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/parallel.h"

namespace fewstep::cpu {

constexpr double kLog2E = 1.4426950408889634074;

// Memory grown when asked for more and never initialised, on huge pages where large: the first touch of a small page
// costs as much as a hundred passes over it, and where small pages lie decides which of them share sets of the
// second-level cache (measured: 0.46 to 0.64 ms for the same 512 x 512 solve). A cache line is the least alignment.
template <class T>
class Buffer {
 public:
  T* get(int64_t count) {
    if (count > capacity_) {
      const size_t align = count * sizeof(T) < kHugePage / 4 ? 64 : kHugePage;
      const size_t bytes = (count * sizeof(T) + align - 1) / align * align;
      release();
      data_.reset(static_cast<T*>(std::aligned_alloc(align, bytes)));
      if (!data_) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      if (align == kHugePage) madvise(data_.get(), bytes, MADV_HUGEPAGE);
#endif
      capacity_ = static_cast<int64_t>(bytes / sizeof(T));
    }
    return data_.get();
  }

  void release() {
    data_.reset();
    capacity_ = 0;
  }
  int64_t bytes() const { return capacity_ * static_cast<int64_t>(sizeof(T)); }

 private:
  static constexpr size_t kHugePage = 2 << 20;
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t capacity_ = 0;
};

// Frees them all where together they hold more than `bytes`.
template <class T>
void release_above(int64_t bytes, std::initializer_list<Buffer<T>*> buffers) {
  int64_t total = 0;
  for (const Buffer<T>* buffer : buffers) total += buffer->bytes();
  if (total <= bytes) return;
  for (Buffer<T>* buffer : buffers) buffer->release();
}

// A thread's workspace, kept between calls while it is small: new pages would cost a small problem more than its work.
template <class Workspace>
class Borrowed {
 public:
  Borrowed() { workspace_.cloud = -1; }
  ~Borrowed() { workspace_.release_above(kKept); }
  Workspace& operator*() { return workspace_; }

 private:
  static constexpr int64_t kKept = 16 << 20;
  static Workspace& mine() {
    static thread_local Workspace workspace;
    return workspace;
  }
  Workspace& workspace_ = mine();
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Rows cut by their number alone, so that sums, and with them every bit, do not depend on threads.
struct Chunks {
  int64_t count, rows;

  static Chunks of(int64_t n, int64_t step) {
    const int64_t wanted = std::clamp<int64_t>(n / 64, 1, 16);
    const int64_t rows = round_up((n + wanted - 1) / wanted, step);
    return {(n + rows - 1) / rows, rows};
  }
};

// Multiply-adds that are worth a team, some 40 us: sleeping threads take as long to come.
constexpr double kWorthATeam = 2e6;

// Runs problem(q, workspace, threads) for every q. Many problems: a task per thread takes them one by one, serial
// inside. Few: one after the other, with all threads inside. `work` is that of one problem in multiply-adds.
template <class Workspace, class Problem>
void for_each_problem(int64_t count, double work, int64_t threads, const Problem& problem) {
  constexpr double kWorthSharing = 5e5;  // some 10 us
  std::atomic<int64_t> next{0};
  auto serially = [&](int64_t) {
    Borrowed<Workspace> workspace;
    for (int64_t q = next++; q < count; q = next++) problem(q, *workspace, 1);
  };
  if (threads == 1 || count * work < kWorthATeam) return serially(0);
  with_team(threads, [&] {
    if (count >= 2 * threads || work < kWorthSharing) return parallel_for(std::min(threads, count), threads, serially);
    Borrowed<Workspace> workspace;
    for (int64_t q = 0; q < count; ++q) problem(q, *workspace, threads);
  });
}

}  // namespace fewstep::cpu
