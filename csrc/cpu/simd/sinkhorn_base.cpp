#include <limits>

#include "cpu/sinkhorn.h"

#define FEWSTEP_ISA base
#define FEWSTEP_VECTOR_BYTES 16
#define FEWSTEP_ROWS 4
#include "cpu/sinkhorn.inl"
