#include "cpu/heun.inl"
