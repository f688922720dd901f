#include "cpu/attention.inl"
