// Which instruction set the CPU kernels run on: detected once, overridable for tests and benchmarks. And the kernels
// that were compiled for it.
#pragma once

namespace fewstep::cpu {

enum class Isa { base = 0, avx2 = 1, avx512 = 2 };

// The best one this CPU has.
Isa detected_isa();

// The one in use: FEWSTEP_CPU_CAPABILITY if set to a supported name, else the detected one.
Isa current_isa();

// Returns false, and changes nothing, where this CPU lacks it.
bool force_isa(Isa isa);

const char* name(Isa isa);

// A family of kernels is a table of pointers to functions, for the numbers that it computes with. FEWSTEP_KERNELS says
// that there is one for each instruction set; the units in simd/ define them.
#define FEWSTEP_KERNELS(...)                        \
  namespace base {                                  \
  template <>                                       \
  const __VA_ARGS__ Compiled<__VA_ARGS__>::kernels; \
  }                                                 \
  namespace avx2 {                                  \
  template <>                                       \
  const __VA_ARGS__ Compiled<__VA_ARGS__>::kernels; \
  }                                                 \
  namespace avx512 {                                \
  template <>                                       \
  const __VA_ARGS__ Compiled<__VA_ARGS__>::kernels; \
  }

namespace base {
template <class Kernels>
struct Compiled {
  static const Kernels kernels;
};
}  // namespace base
namespace avx2 {
template <class Kernels>
struct Compiled {
  static const Kernels kernels;
};
}  // namespace avx2
namespace avx512 {
template <class Kernels>
struct Compiled {
  static const Kernels kernels;
};
}  // namespace avx512

// The kernels of a family for the numbers T on the instruction set in use.
template <template <class...> class Family, class... T>
const Family<T...>& kernels() {
  static constexpr const Family<T...>* kByIsa[] = {
      &base::Compiled<Family<T...>>::kernels,
#if defined(__x86_64__)
      &avx2::Compiled<Family<T...>>::kernels,
      &avx512::Compiled<Family<T...>>::kernels,
#endif
  };
  return *kByIsa[static_cast<int>(current_isa())];
}

}  // namespace fewstep::cpu
