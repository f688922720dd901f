// Requests on stdin and answers on stdout until stdin ends, each after its length in bytes. Arrays are heap blocks of
// the exact size, for the sanitizers to watch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

inline std::vector<char> request, answer;
inline size_t taken = 0;

inline void read(void* target, size_t bytes) {
  if (bytes > request.size() - taken) std::exit(2);
  if (bytes > 0) std::memcpy(target, request.data() + taken, bytes);
  taken += bytes;
}

template <typename T>
std::vector<T> input(int64_t count) {
  std::vector<T> values(count);
  read(values.data(), count * sizeof(T));
  return values;
}

template <typename T>
void output(const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const char*>(values.data());
  answer.insert(answer.end(), bytes, bytes + values.size() * sizeof(T));
}

template <typename T>
std::vector<T> poisoned(int64_t count) {
  return std::vector<T>(count, std::numeric_limits<T>::quiet_NaN());
}

template <typename Request, typename Serve>
int serve_all(Serve serve) {
  int64_t length;
  while (std::fread(&length, sizeof length, 1, stdin) == 1) {
    request.resize(length), answer.clear(), taken = 0;
    if (std::fread(request.data(), 1, length, stdin) != request.size()) return 2;
    Request q;
    read(&q, sizeof q);
    serve(q);
    if (taken != request.size()) return 2;
    length = answer.size();
    std::fwrite(&length, sizeof length, 1, stdout);
    std::fwrite(answer.data(), 1, answer.size(), stdout);
    if (std::fflush(stdout) != 0) return 3;
  }
  return 0;
}
