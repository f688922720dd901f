#include "cpu/drift.inl"
