#include <cmath>

#include "cpu/heun.h"
#include "shared/heun.h"

#define FEWSTEP_ISA base
#define FEWSTEP_VECTOR_BYTES 16
#include "cpu/heun.inl"
