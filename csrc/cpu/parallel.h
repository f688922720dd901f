// Parallel loops for passes of some 10 us, which an OpenMP barrier would ruin: on a busy machine a barrier waits a
// scheduler's time slice for a thread that has nothing to do. Here an op borrows torch's threads once, as a team for
// all of its loops, and the caller waits only for work that has been taken. Threads of our own would share the cores
// with torch's, which spin for milliseconds after every op of torch.
#pragma once

#include <cstdint>
#include <functional>

namespace fewstep::cpu {

// Runs member(0) on the caller and member(1) .. member(threads - 1) on torch's threads, if it can; returns after all.
// Defined by ops_sinkhorn.cpp.
void launch(int64_t threads, const std::function<void(int64_t)>& member);

// Runs `lead` on the caller with a team of up to `threads` for its parallel loops. None in a forked child, where torch
// has no threads.
void with_team(int64_t threads, const std::function<void()>& lead);

// Runs body(i) for every i in [0, count), in any order, on the caller and its team. Serial without one.
void parallel_for(int64_t count, int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace fewstep::cpu
