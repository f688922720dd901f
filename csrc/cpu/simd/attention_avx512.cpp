#ifdef __x86_64__
#define FEWSTEP_AVX512
#include "cpu/attention.inl"
#endif
