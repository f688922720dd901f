// Requests on stdin and answers on stdout, in heap blocks of the exact size, for the sanitizers to watch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

inline void read(void* target, size_t bytes) {
  if (std::fread(target, 1, bytes, stdin) != bytes) std::exit(2);
}

template <typename T>
std::vector<T> input(int64_t count) {
  std::vector<T> values(count);
  read(values.data(), count * sizeof(T));
  return values;
}

template <typename T>
void output(const std::vector<T>& values) {
  std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

template <typename T>
std::vector<T> poisoned(int64_t count) {
  return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}
