// Thread blocks on the host, for the Team of csrc/shared/sinkhorn_block.h, resident/solver.h and halves.h: one thread
// alone, or threads with real barriers, in one block or a cluster of blocks; or, for warps of 32, which have tensor
// cores, fibers that take turns from barrier to barrier: what is read without one has not been written yet.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

struct Single {
  static constexpr int kLanes = 1;
  static constexpr bool kTensor = false;
  int rank() const { return 0; }
  int size() const { return 1; }
  int lane() const { return 0; }
  int warp() const { return 0; }
  int warps() const { return 1; }
  int ranks() const { return 1; }
  int block() const { return 0; }
  int opaque(int value) const { return value; }
  void sync() const {}
  void sync_all() const {}
  void sync_lanes() const {}
  bool any(bool flag) const { return flag; }
  bool lane_any(bool flag) const { return flag; }
  template <typename T>
  T* peer(T* own, int) const {
    return own;
  }
  template <typename T>
  T lane_sum(T value) const {
    return value;
  }
  template <typename T>
  T lane_max(T value) const {
    return value;
  }
  template <typename T, int R, typename Combine>
  void combine_rows(const T (&values)[R], T (&own)[R], Combine) const {
    std::copy_n(values, R, own);
  }
  template <typename T, int R>
  void spread(const T (&own)[R], T (&values)[R]) const {
    std::copy_n(own, R, values);
  }
};

constexpr int kMmaLanes = 32;

// Fibers of one thread. One at a time runs, up to a barrier at which others are missing.
class Fibers {
 public:
  // run(index) in each of `count` fibers.
  static void run(int count, const std::function<void(int)>& run) {
    Fibers fibers(count, run);
    active_ = &fibers;
    swapcontext(&fibers.main_, &fibers.fibers_[0].context);
    active_ = nullptr;
  }

  // Lets the next one run.
  static void yield() {
    Fibers& own = *active_;
    const size_t before = own.current_;
    own.advance();
    if (own.current_ != before) swapcontext(&own.fibers_[before].context, &own.fibers_[own.current_].context);
  }

 private:
  static constexpr size_t kStack = size_t{1} << 18;
  struct Fiber {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStack);
    bool done = false;
  };

  Fibers(int count, const std::function<void(int)>& run) : run_(run), fibers_(count), left_(count) {
    for (Fiber& fiber : fibers_) prepare(fiber.context, fiber.stack.data());
  }

  // By itself, since getcontext may return twice.
  [[gnu::noinline]] static void prepare(ucontext_t& context, char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStack;
    makecontext(&context, &Fibers::enter, 0);
  }

  static void enter() {
    Fibers& own = *active_;
    const size_t index = own.current_;
    own.run_(static_cast<int>(index));
    own.fibers_[index].done = true;
    if (--own.left_ == 0) setcontext(&own.main_);
    own.advance();
    setcontext(&own.fibers_[own.current_].context);
  }

  // To any of the others, so that warps drift apart; in the same order every time.
  void advance() {
    do {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      current_ = (state_ >> 33) % fibers_.size();
    } while (fibers_[current_].done);
  }

  static inline Fibers* active_ = nullptr;
  const std::function<void(int)>& run_;
  std::vector<Fiber> fibers_;
  ucontext_t main_;
  uint64_t state_ = 1;
  size_t current_ = 0;
  int left_;
};

class FiberBarrier {
 public:
  explicit FiberBarrier(int count) : count_(count) {}
  void arrive_and_wait() {
    const int64_t own = generation_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++generation_;
    }
    while (generation_ == own) Fibers::yield();
  }

 private:
  int count_, arrived_ = 0;
  int64_t generation_ = 0;
};

template <int kLanes>
using Barrier = std::conditional_t<kLanes == kMmaLanes, FiberBarrier, std::barrier<>>;

template <int kLanes>
struct Warp {
  Barrier<kLanes> barrier{kLanes};
  double slot[kLanes];
  uint32_t a[kLanes][4], b[kLanes][2];  // what the lanes hand to a tensor core
  const uint16_t* row[kLanes];          // and of four matrices
};

// A copy that has not arrived.
struct Copy {
  float* to;
  const float* from;
  int count, group;
  bool inside;
};

struct Copies {
  std::vector<Copy> pending;
  int group = 0;
};

template <int kLanes, int kWarps>
struct BlockState {
  static constexpr int kThreads = kLanes * kWarps;
  Barrier<kLanes> barrier{kThreads};
  Warp<kLanes> warp[kWarps];
  bool flag[kThreads];
  Copies copies[kThreads];
  char* memory = nullptr;  // what stands for shared memory, alike in all blocks
};

template <int kLanes, int kWarps>
struct ClusterState {
  explicit ClusterState(int ranks) : barrier(ranks * kLanes * kWarps), block(ranks) {}
  Barrier<kLanes> barrier;
  std::vector<BlockState<kLanes, kWarps>> block;
};

// A float as the nearest half, ties to even, and back.
inline uint16_t to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value == 0 || std::isnan(value)) return sign | (value == 0 ? 0 : 0x7e00);
  int exponent;
  std::frexp(value, &exponent);
  const int last = std::max(exponent - 11, -24);  // of the last bit
  const double digits = std::nearbyint(std::ldexp(std::abs(double(value)), -last));
  if (std::isinf(value) || std::ldexp(digits, last) > 65504) return sign | 0x7c00;
  // Digits from 2^10 on carry into the exponent.
  return static_cast<uint16_t>(sign | (static_cast<int>(digits) + ((last + 24) << 10)));
}

inline float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 0x3ff;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) {
    return digits > 0 ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
  }
  return sign * std::ldexp(float(exponent > 0 ? digits + 1024 : digits), std::max(exponent, 1) - 25);
}

inline float towards_zero(double value) {
  const auto nearest = static_cast<float>(value);
  return std::abs(double(nearest)) > std::abs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

template <int kLanes_, int kWarps_>
struct ThreadsOf {
  static constexpr int kLanes = kLanes_, kWarps = kWarps_;
  static constexpr bool kTensor = kLanes == kMmaLanes;
  ClusterState<kLanes, kWarps>* cluster;
  int own_block, index;
  BlockState<kLanes, kWarps>& state() const { return cluster->block[own_block]; }
  int rank() const { return index; }
  int size() const { return kLanes * kWarps; }
  int lane() const { return index % kLanes; }
  int warp() const { return index / kLanes; }
  int warps() const { return kWarps; }
  int opaque(int value) const { return value; }
  int ranks() const { return static_cast<int>(cluster->block.size()); }
  int block() const { return own_block; }
  void sync() const { state().barrier.arrive_and_wait(); }
  void sync_all() const { cluster->barrier.arrive_and_wait(); }
  void sync_lanes() const { own_warp().barrier.arrive_and_wait(); }
  bool any(bool flag) const {
    state().flag[index] = flag;
    sync();
    bool result = false;
    for (bool f : state().flag) result = result || f;
    sync();
    return result;
  }
  template <typename T>
  T* peer(T* own, int rank) const {
    return reinterpret_cast<T*>(cluster->block[rank].memory + (reinterpret_cast<char*>(own) - state().memory));
  }
  template <typename T, typename Combine>
  T exchange(T value, Combine combine) const {
    Warp<kLanes>& w = own_warp();
    w.slot[lane()] = value;
    w.barrier.arrive_and_wait();
    T result = static_cast<T>(w.slot[0]);
    for (int l = 1; l < kLanes; ++l) result = combine(result, static_cast<T>(w.slot[l]));
    w.barrier.arrive_and_wait();
    return result;
  }
  template <typename T>
  T lane_sum(T value) const {
    return exchange(value, [](T p, T q) { return p + q; });
  }
  template <typename T>
  T lane_max(T value) const {
    return exchange(value, [](T p, T q) { return q > p ? q : p; });
  }
  bool lane_any(bool flag) const { return lane_max(flag ? 1.0 : 0.0) > 0; }
  // Lane l has the kOwn rows from l R / kLanes on.
  template <typename T, int R, int kOwn, typename Combine>
  void combine_rows(const T (&values)[R], T (&own)[kOwn], Combine combine) const {
    std::fill_n(own, kOwn, T(0));
    for (int r = 0; r < R; ++r) {
      const T all = exchange(values[r], combine);
      if (r / kOwn == lane() * R / kLanes / kOwn) own[r % kOwn] = all;
    }
  }
  template <typename T, int R, int kOwn>
  void spread(const T (&own)[kOwn], T (&values)[R]) const {
    Warp<kLanes>& w = own_warp();
    for (int r = 0; r < R; ++r) {
      w.slot[lane()] = own[r % kOwn];
      w.barrier.arrive_and_wait();
      values[r] = static_cast<T>(w.slot[r * kLanes / R]);
      w.barrier.arrive_and_wait();
    }
  }

  void split(float p, float q, uint32_t& high, uint32_t& low) const {
    const uint16_t first = to_half(p), second = to_half(q);
    high = first | uint32_t{second} << 16;
    low = to_half(p - from_half(first)) | uint32_t{to_half(q - from_half(second))} << 16;
  }

  using Place = const float*;
  Place place(const float* pointer) const { return pointer; }

  template <bool kTransposed>
  void load(uint32_t (&to)[4], Place base, int elements) const {
    Warp<kLanes>& w = own_warp();
    w.row[lane()] = reinterpret_cast<const uint16_t*>(base + elements);
    w.barrier.arrive_and_wait();
    const int g = lane() / 4, t = lane() % 4;
    for (int m = 0; m < 4; ++m) {
      const uint16_t* const* const rows = w.row + 8 * m;
      const uint16_t first = kTransposed ? rows[2 * t][g] : rows[g][2 * t];
      const uint16_t second = kTransposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      to[m] = first | uint32_t{second} << 16;
    }
    w.barrier.arrive_and_wait();
  }

  // mma.m16n8k16: element (row, k) of a is with lane row % 8 * 4 + k / 2 % 4, and so on. What is added is rounded
  // towards 0.
  void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    Warp<kLanes>& w = own_warp();
    for (int e = 0; e < 4; ++e) w.a[lane()][e] = a[e];
    for (int e = 0; e < 2; ++e) w.b[lane()][e] = b[e];
    w.barrier.arrive_and_wait();
    for (int e = 0; e < 4; ++e) {
      const int row = lane() / 4 + e / 2 * 8, column = lane() % 4 * 2 + e % 2;
      double sum = c[e];
      for (int k = 0; k < 16; ++k) {
        const int from = k / 2 % 4, half = k % 2 * 16;
        const uint32_t left = w.a[row % 8 * 4 + from][row / 8 + k / 8 * 2] >> half;
        const uint32_t right = w.b[column * 4 + from][k / 8] >> half;
        sum += double(from_half(left & 0xffff)) * double(from_half(right & 0xffff));
      }
      c[e] = towards_zero(sum);
    }
    w.barrier.arrive_and_wait();
  }

  template <int kCount>
  void copy(float* to, const float* from, bool inside) const {
    Copies& own = state().copies[index];
    own.pending.push_back({to, from, kCount, own.group, inside});
    // It may be written at any time from now on.
    for (int i = 0; i < kCount; ++i) to[i] = std::numeric_limits<float>::quiet_NaN();
  }
  void commit() const { ++state().copies[index].group; }
  template <int kGroups>
  void arrived() const {
    Copies& own = state().copies[index];
    std::erase_if(own.pending, [&](const Copy& copy) {
      if (copy.group >= own.group - kGroups) return false;
      for (int i = 0; i < copy.count; ++i) copy.to[i] = copy.inside ? copy.from[i] : 0.0f;
      return true;
    });
  }

 private:
  Warp<kLanes>& own_warp() const { return state().warp[warp()]; }
};

using Threads = ThreadsOf<2, 3>;
template <int kWarps>
using WideTeam = ThreadsOf<kMmaLanes, kWarps>;
constexpr int kTeamLanes = Threads::kLanes, kTeamWarps = Threads::kWarps, kTeamThreads = kTeamLanes * kTeamWarps;

// run(team) in every thread of a cluster whose blocks have `count` elements of memory each, on the heap and filled with
// NaN.
template <typename T, typename Team = Threads, typename Run>
void run_cluster(int ranks, int64_t count, Run run) {
  ClusterState<Team::kLanes, Team::kWarps> cluster(ranks);
  std::vector<std::unique_ptr<std::vector<T>>> memories;
  for (auto& block : cluster.block) {
    memories.push_back(std::make_unique<std::vector<T>>(count, std::numeric_limits<T>::quiet_NaN()));
    block.memory = reinterpret_cast<char*>(memories.back()->data());
  }
  constexpr int kThreads = Team::kLanes * Team::kWarps;
  auto one = [&](int index) {
    const int b = index / kThreads;
    run(Team{&cluster, b, index % kThreads}, memories[b]->data());
  };
  if constexpr (Team::kTensor) return Fibers::run(ranks * kThreads, one);
  std::vector<std::jthread> threads;
  for (int index = 0; index < ranks * kThreads; ++index) threads.emplace_back([&, index] { one(index); });
}
