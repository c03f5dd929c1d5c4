// What is remembered about a frame between the steps of its fit, and where its cells lie in the workspace.
#pragma once

#include <cstdint>

namespace u4d::rays_to_cameras_detail {

// The constants of u4d_fast/reference/rays_to_cameras.py.
constexpr int kRegressionRounds = 4, kLinearRounds = 3, kRefineStages = 2, kRefineRounds = 6, kCentreRounds = 6;
constexpr double kRegressionFloor = 0.01, kErrorFloor = 1e-7, kRobustWidth = 3.0;
constexpr double kDampingStart = 1e-4, kDampingMin = 1e-10, kDampingMax = 1e8;
constexpr double kFallbackHalfFovTan = 0.57735026918962576;
constexpr double kMinHalfFovTan = 0.005, kMaxHalfFovTan = 100.0, kMaxCentreOffset = 3.0;
constexpr double kMinCells = 4, kMinSpread = 1e-7;

// Where the cost falls by less than this share, further steps would change nothing that a float can hold.
constexpr double kConverged = 1e-12;

constexpr double kNoLevelYet = -1.0;  // FrameState::importance before the first stage

constexpr int kCell = 8;    // pixels
constexpr int kLanes = 16;  // cells are padded to a multiple of this; padding has weight 0

enum Field { kDx, kDy, kDz, kMx, kMy, kMz, kX, kY, kValid, kTrust, kError, kLength, kFields };

// Sums over cells that make up the normal equations: see refine_terms.
enum Normal {
  kTurnSquares = 0,
  kTurnRay = 6,
  kRaySquares = 18,
  kTurnDown = 28,
  kRayDown = 31,
  kCost = 35,
  kNormals = 36
};

// A camera: rotation to world, and the ray (ax x + b y - gx, ay y - gy, 1) of a cell at (x, y).
struct Camera {
  double r[9];
  double ax, gx, ay, gy, b;
};

struct FrameState {
  Camera fit, candidate;
  double normal[kNormals], candidate_normal[kNormals];
  double sums[48];
  double matrix[9];
  double centre[3];
  double inverse_width2;  // 1 / width^2 of the robust weights; 0: all cells count alike
  double importance;      // of this frame in its group: inverse_width2, 1 if not robust, 0 if failed
  double damping;         // of the group, kept in its first frame
  double converged;       // likewise, 0 or 1
  double failed;          // 0 or 1
};

struct Problem {
  const float* directions;
  const float* moments;
  const float* known_intrinsics;
  float* intrinsics;
  float* cam_to_world;
  float* residual;
  FrameState* states;  // [batch * frames]
  double* fields;      // [batch * frames][kFields][padded]
  std::int64_t all_frames;
  std::int64_t group;  // frames that share their intrinsics
  std::int64_t rows, columns, padded;
  double image_height, image_width;
  bool robust, square;
};

}  // namespace u4d::rays_to_cameras_detail
