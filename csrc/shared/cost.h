// The costs of a pair of points, and all that depends on the cost alone. An op's argument `cost` is an index into this
// list, which Python's table repeats in the same order.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fewstep {

enum class Cost : int { sqeuclidean, half_sqeuclidean, euclidean, dot, l1, matrix };

// Costs that GPU kernels have: functions of the distance |x - y|.
FEWSTEP_HD constexpr bool on_gpu(Cost cost) { return cost >= Cost::sqeuclidean && cost <= Cost::euclidean; }

// Whether it grows with the square of the distance.
FEWSTEP_HD constexpr bool is_squared(Cost cost) { return cost == Cost::sqeuclidean || cost == Cost::half_sqeuclidean; }

// CPU kernels sum squares, absolute values or products over coordinates: the cost is this factor times the sum, and
// the root of the sum if euclidean.
FEWSTEP_HD constexpr double unit(Cost cost) { return cost == Cost::half_sqeuclidean ? 0.5 : 1.0; }

// dc/dx is this factor times x - y, over |x - y| if euclidean; times y for dot, and the signs of x - y for l1.
FEWSTEP_HD constexpr double slope(Cost cost) {
  return cost == Cost::sqeuclidean ? 2.0 : cost == Cost::dot ? -1.0 : 1.0;
}

// The cost of a pair from its squared distance, where GPU kernels have it.
template <typename T>
FEWSTEP_HD T finish_cost(T squared, Cost cost) {
  return cost == Cost::sqeuclidean ? squared : cost == Cost::half_sqeuclidean ? squared / 2 : std::sqrt(squared);
}

// A cost of points as far from each other as `length`, but for `unit`.
FEWSTEP_HD double power(Cost cost, double length) { return is_squared(cost) ? length * length : length; }

// The length that a mean of such costs stands for.
FEWSTEP_HD double root(Cost cost, double mean) { return is_squared(cost) ? std::sqrt(mean) : mean; }

}  // namespace fewstep
