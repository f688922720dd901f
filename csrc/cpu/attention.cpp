// Heads and blocks of rows to threads.
#include "cpu/attention.h"

#include <algorithm>
#include <cstdint>

#include "cpu/driver.h"

namespace fewstep::cpu {
namespace {

template <class T>
struct Workspace {
  int64_t cloud;  // unused
  Buffer<T> packed, scratch, sums;

  void release_above(int64_t bytes) { cpu::release_above(bytes, {&packed, &scratch, &sums}); }
};

// A task has the keys and values of one group, packed for it, and a part of the rows of the heads that share them.
struct Tasks {
  int64_t groups, heads, per_head, rows, blocks, parts;

  // By shapes alone, so that sums over parts, and with them every bit, do not depend on threads.
  template <class T>
  Tasks(const Attention<T>& in, int64_t most) {
    constexpr int64_t kWanted = 8, kLeast = 2;  // tasks that keep threads busy; blocks that are worth packing for
    groups = in.batch * in.groups;
    heads = in.heads / in.groups;
    per_head = std::max<int64_t>((in.n + most - 1) / most, 1);
    rows = (in.n + per_head - 1) / per_head;
    blocks = heads * per_head;
    parts = std::clamp<int64_t>(kWanted / std::max<int64_t>(groups, 1), 1, std::max<int64_t>(blocks / kLeast, 1));
  }

  int64_t count() const { return groups * parts; }

  // body(head, first row, end) for each block of a task.
  template <class F>
  void over(int64_t task, int64_t n, const F& body) const {
    const int64_t group = task / parts, part = task % parts;
    for (int64_t i = blocks * part / parts; i < blocks * (part + 1) / parts; ++i) {
      const int64_t begin = i % per_head * rows;
      if (begin < n) body(group * heads + i / per_head, begin, std::min(begin + rows, n));
    }
  }
};

// Runs body(task) for every task on the threads, if there is enough to do.
template <class F>
void over_tasks(int64_t count, double work, int64_t threads, const F& body) {
  if (threads == 1 || count == 1 || work < kWorthATeam) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  with_team(threads, [&] { parallel_for(count, threads, body); });
}

template <class T>
double work(const Attention<T>& in) {
  return double(in.batch * in.heads) * in.n * in.m * (in.d + in.dv) * (1 + 2 * in.tangents);
}

}  // namespace

template <class T>
void attention(const Attention<T>& in, const Attended<T>& out, int64_t threads) {
  const AttentionKernels<T>& run = kernels<AttentionKernels, T>();
  const AttentionPanels panels = run.panels(in, false);
  const Tasks tasks(in, run.rows);
  over_tasks(tasks.count(), work(in), threads, [&](int64_t task) {
    Borrowed<Workspace<T>> borrowed;
    T* packed = (*borrowed).packed.get(panels.per_total);
    T* scratch = (*borrowed).scratch.get(run.scratch(in, false));
    run.pack(in, panels, false, task / tasks.parts, packed);
    tasks.over(task, in.n, [&](int64_t head, int64_t begin, int64_t end) {
      run.forward(in, panels, packed, head, begin, end, out, scratch);
    });
  });
}

template <class T>
void attention_backward(const Attention<T>& in, const AttentionGrads<T>& grads, int64_t threads) {
  const AttentionKernels<T>& run = kernels<AttentionKernels, T>();
  const AttentionPanels panels = run.panels(in, true);
  const Tasks tasks(in, run.rows);
  const int64_t wide = round_up(in.d, run.panel), wide_v = round_up(in.dv, run.panel), copies = in.tangents + 1;
  const int64_t own = copies * in.m * (wide + wide_v);
  Buffer<T> shared;
  T* sums = tasks.parts > 1 ? shared.get(tasks.count() * own) : nullptr;
  // Of all parts of a group, to rows of d or dv.
  auto finish = [&](int64_t group, const T* from, int64_t parts) {
    for (int64_t k = 0; k < copies; ++k) {
      T* gk = k == 0 ? grads.k : grads.tk;
      T* gv = k == 0 ? grads.v : grads.tv;
      const int64_t at = ((k == 0 ? 0 : (k - 1) * tasks.groups) + group) * in.m;
      const T* first = from + k * in.m * wide;
      auto add = [&](T* to, const T* row, int64_t n) {
        for (int64_t c = 0; c < n; ++c) {
          T total = row[c];
          for (int64_t p = 1; p < parts; ++p) total += row[p * own + c];
          to[c] = total;
        }
      };
      for (int64_t j = 0; j < in.m && gk != nullptr; ++j) add(gk + (at + j) * in.d, first + j * wide, in.d);
      first = from + copies * in.m * wide + k * in.m * wide_v;
      for (int64_t j = 0; j < in.m && gv != nullptr; ++j) add(gv + (at + j) * in.dv, first + j * wide_v, in.dv);
    }
  };
  over_tasks(tasks.count(), 2.5 * work(in), threads, [&](int64_t task) {
    Borrowed<Workspace<T>> borrowed;
    T* packed = (*borrowed).packed.get(panels.per_total);
    T* scratch = (*borrowed).scratch.get(run.scratch(in, true));
    T* to = sums != nullptr ? sums + task * own : (*borrowed).sums.get(own);
    std::fill(to, to + own, T(0));
    run.pack(in, panels, true, task / tasks.parts, packed);
    tasks.over(task, in.n, [&](int64_t head, int64_t begin, int64_t end) {
      run.backward(in, panels, packed, head, begin, end, grads, to, to + copies * in.m * wide, scratch);
    });
    if (sums == nullptr) finish(task, to, 1);
  });
  if (sums == nullptr) return;
  over_tasks(tasks.groups, double(tasks.count()) * own, threads,
             [&](int64_t group) { finish(group, sums + group * tasks.parts * own, tasks.parts); });
}

#define FEWSTEP_DEFINE(T)                                                       \
  template void attention<T>(const Attention<T>&, const Attended<T>&, int64_t); \
  template void attention_backward<T>(const Attention<T>&, const AttentionGrads<T>&, int64_t);
FEWSTEP_DEFINE(float)
FEWSTEP_DEFINE(double)
#undef FEWSTEP_DEFINE

}  // namespace fewstep::cpu
