// Where a block keeps a problem in its memory.
#pragma once

#include <cstdint>

#include "../sinkhorn_block.h"
#include "problem.h"

namespace fewstep::resident {

// Where things are in the memory of a block of up to kWarps warps, in elements: all offsets are known at compile time,
// and costs [rows, m] come last.
template <int R, int Q, int kLanes, int kWarps>
struct Layout {
  static constexpr int kRows = kWarps * R, kColumns = Q * kLanes;
  static constexpr int kA = 0, kShift = kRows, kF = 2 * kRows, kU = 4 * kRows;  // f and u twice: now and next
  static constexpr int kLogs = 6 * kRows;                                       // f + log2 a, for log-sum-exps
  static constexpr int kB = 7 * kRows, kH = kB + kColumns, kV = kH + kColumns, kLse = kV + kColumns;
  static constexpr int kScalar = kLse + kColumns;                               // [2, kScalars, kWarps]
  static constexpr int kScale = kScalar + (2 * kScalars * kWarps + 3) / 4 * 4;  // of the points of the columns
  static constexpr int kBack = kScale + kColumns;                               // [kMostStacked, kRows]
  static constexpr int kPartial = kBack + kMostStacked * kRows;                 // [2, kWarps, kColumns]
  // In the same place, points that are being measured: [kColumns + kRows, kStageStride].
  static constexpr int kPoints = (kColumns + kRows) * kStageStride;
  static constexpr int kTwo = 2 * (kWarps < 2 ? 2 : kWarps) * kColumns;
  static constexpr int kSpace = kTwo > kPoints ? kTwo : kPoints;
  static constexpr int kCost = (kPartial + kSpace + 3) / 4 * 4;

  // Columns in whole tiles of tensor cores, and two stages of points, and the origin, on their way to them.
  static FEWSTEP_HD int64_t tiled(int64_t m) { return (m + 15) & ~int64_t{15}; }
  static FEWSTEP_HD int64_t stages(int64_t points) { return 2 * (points + 1) * kMmaStride; }
  // Where they are: before there are costs, and after the weights of a drift have been read.
  static FEWSTEP_HD int64_t behind_costs(int64_t rows, int64_t m) { return kCost + (rows * m + 3) / 4 * 4; }

  // `matrices` of weights, one per temperature of a drift, follow the costs. Four neighbours of a row fall into banks
  // of their own.
  static FEWSTEP_HD int64_t weight_stride(int64_t m) { return tiled(m) + 8; }
  static FEWSTEP_HD int64_t elements(int64_t rows, int64_t m, int matrices) {
    const int64_t measured = kPartial + stages(tiled(m) + rows);
    const int64_t kept = behind_costs(rows, m) + matrices * rows * weight_stride(m);
    const int64_t combined = matrices == 0 ? 0 : behind_costs(rows, m) + stages(tiled(m));
    return block::largest(block::largest(measured, kept), combined);
  }
};

// Tiles of 16 columns on tensor cores, of up to Q kLanes columns: of 160 only 144, in 64 x 144 problems of which a
// thread keeps the weights of three temperatures.
constexpr int tiles_of(int q) { return q == 5 ? 9 : 2 * q; }

}  // namespace fewstep::resident
