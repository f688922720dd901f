// Parallel loops for passes of some 10 us, which an OpenMP barrier would ruin: on a busy machine a barrier waits a
// scheduler's time slice for a thread that has nothing to do. Here the caller waits only for work that has been taken.
#pragma once

#include <cstdint>
#include <functional>

namespace fewstep::cpu {

// Runs body(i) for every i in [0, count), in any order, on the caller and up to threads - 1 helpers that are awake.
// Serial where another caller has the helpers, and in a forked child, which has none.
void parallel_for(int64_t count, int64_t threads, const std::function<void(int64_t)>& body);

}  // namespace fewstep::cpu
