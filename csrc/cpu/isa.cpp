#include "cpu/isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace fewstep::cpu {
namespace {

constexpr Isa kAll[] = {Isa::base, Isa::avx2, Isa::avx512};

Isa initial_isa() {
  const Isa best = detected_isa();
  const char* wanted = std::getenv("FEWSTEP_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (Isa isa : kAll) {
    if (std::strcmp(wanted, name(isa)) == 0 && isa <= best) return isa;
  }
  std::fprintf(stderr, "fewstep: FEWSTEP_CPU_CAPABILITY=%s is unknown or not on this CPU; using %s\n", wanted,
               name(best));
  return best;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa detected_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::base;
}

Isa current_isa() { return active().load(std::memory_order_relaxed); }

bool force_isa(Isa isa) {
  if (isa > detected_isa()) return false;
  active().store(isa, std::memory_order_relaxed);
  return true;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

}  // namespace fewstep::cpu
