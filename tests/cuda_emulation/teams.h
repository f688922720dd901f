// Thread blocks on the host, for the Team of csrc/shared/sinkhorn_block.h and sinkhorn_resident.h: one thread alone, or
// threads with real barriers, in one block or a cluster of blocks.
#pragma once

#include <barrier>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

struct Single {
  static constexpr int kLanes = 1;
  int rank() const { return 0; }
  int size() const { return 1; }
  int lane() const { return 0; }
  int warp() const { return 0; }
  int warps() const { return 1; }
  int ranks() const { return 1; }
  int block() const { return 0; }
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
  template <typename T, int R>
  void lane_sums(T (&)[R]) const {}
};

constexpr int kTeamLanes = 2, kTeamWarps = 3, kTeamThreads = kTeamLanes * kTeamWarps;

struct Warp {
  std::barrier<> barrier{kTeamLanes};
  double slot[kTeamLanes];
};

struct BlockState {
  std::barrier<> barrier{kTeamThreads};
  Warp warp[kTeamWarps];
  bool flag[kTeamThreads];
  char* memory = nullptr;  // what stands for shared memory, alike in all blocks
};

struct ClusterState {
  explicit ClusterState(int ranks) : barrier(ranks * kTeamThreads), block(ranks) {}
  std::barrier<> barrier;
  std::vector<BlockState> block;
};

struct Threads {
  static constexpr int kLanes = kTeamLanes;
  ClusterState* cluster;
  int own_block, index;
  BlockState& state() const { return cluster->block[own_block]; }
  int rank() const { return index; }
  int size() const { return kTeamThreads; }
  int lane() const { return index % kTeamLanes; }
  int warp() const { return index / kTeamLanes; }
  int warps() const { return kTeamWarps; }
  int ranks() const { return static_cast<int>(cluster->block.size()); }
  int block() const { return own_block; }
  void sync() const { state().barrier.arrive_and_wait(); }
  void sync_all() const { cluster->barrier.arrive_and_wait(); }
  void sync_lanes() const { state().warp[warp()].barrier.arrive_and_wait(); }
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
    Warp& w = state().warp[warp()];
    w.slot[lane()] = value;
    w.barrier.arrive_and_wait();
    T result = static_cast<T>(w.slot[0]);
    for (int l = 1; l < kTeamLanes; ++l) result = combine(result, static_cast<T>(w.slot[l]));
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
  template <typename T, int R>
  void lane_sums(T (&values)[R]) const {
    for (T& value : values) value = lane_sum(value);
  }
};

// run(team) in every thread of a cluster whose blocks have `bytes` of memory each, on the heap and filled with NaN.
template <typename T, typename Run>
void run_cluster(int ranks, int64_t count, Run run) {
  ClusterState cluster(ranks);
  std::vector<std::unique_ptr<std::vector<T>>> memories;
  for (BlockState& block : cluster.block) {
    memories.push_back(std::make_unique<std::vector<T>>(count, std::numeric_limits<T>::quiet_NaN()));
    block.memory = reinterpret_cast<char*>(memories.back()->data());
  }
  std::vector<std::jthread> threads;
  for (int b = 0; b < ranks; ++b) {
    for (int i = 0; i < kTeamThreads; ++i) {
      threads.emplace_back([&, b, i] { run(Threads{&cluster, b, i}, memories[b]->data()); });
    }
  }
}
