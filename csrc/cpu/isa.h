// Which instruction set the CPU kernels run on: detected once, overridable for tests and benchmarks. And the kernels
// that were compiled for it.
#pragma once

#include <type_traits>

namespace fewstep::cpu {

enum class Isa { base = 0, avx2 = 1, avx512 = 2 };

// The best one this CPU has.
Isa detected_isa();

// The one in use: FEWSTEP_CPU_CAPABILITY if set to a supported name, else the detected one.
Isa current_isa();

// Returns false, and changes nothing, where this CPU lacks it.
bool force_isa(Isa isa);

const char* name(Isa isa);

// The kernels of one instruction set.
template <template <class> class Kernels>
struct Compiled {
  const Kernels<float>& single;
  const Kernels<double>& twice;
};

// Those for T of the instruction set in use, from what was compiled for each, in the order of Isa.
template <class T, template <class> class Kernels>
const Kernels<T>& in_use(const Compiled<Kernels>* by_isa) {
  const Compiled<Kernels>& compiled = by_isa[static_cast<int>(current_isa())];
  if constexpr (std::is_same_v<T, float>) {
    return compiled.single;
  } else {
    return compiled.twice;
  }
}

}  // namespace fewstep::cpu
