#ifdef __x86_64__
#define FEWSTEP_AVX2
#include "cpu/attention.inl"
#endif
