#include "cpu/dual.inl"
