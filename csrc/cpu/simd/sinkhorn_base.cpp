#include "cpu/sinkhorn.inl"
