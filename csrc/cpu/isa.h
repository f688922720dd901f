// Which instruction set the CPU kernels run on: detected once, overridable for tests and benchmarks.
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

}  // namespace fewstep::cpu
