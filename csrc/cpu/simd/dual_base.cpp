#include <cmath>

#include "cpu/dual.h"
#include "shared/philox.h"

#define FEWSTEP_ISA base
#define FEWSTEP_VECTOR_BYTES 16
#include "cpu/dual.inl"
