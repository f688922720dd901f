#include <limits>

#include "cpu/drift.h"

#define FEWSTEP_ISA base
#define FEWSTEP_VECTOR_BYTES 16
#include "cpu/drift.inl"
