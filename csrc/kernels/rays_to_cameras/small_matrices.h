// Dense algebra of a few rows, in double, for one thread. Matrices are row-major.
#pragma once

#include <cmath>

#include "kernels/common/host_device.h"

namespace u4d::small {

// Eigenvalues (on the diagonal of `a`) and eigenvectors (columns of `v`) of a symmetric matrix by cyclic Jacobi
// rotations; Golub and Van Loan, "Matrix Computations", 8.5. Slow beside QR, but accurate for the small eigenvalues
// too.
template <int N>
U4D_HD_CALL void jacobi(double (&a)[N][N], double (&v)[N][N]) {
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < N; ++j) v[i][j] = i == j ? 1.0 : 0.0;
  }
  constexpr int kMaxSweeps = 12;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    double off = 0.0, on = 0.0;
    for (int i = 0; i < N; ++i) {
      on += a[i][i] * a[i][i];
      for (int j = i + 1; j < N; ++j) off += a[i][j] * a[i][j];
    }
    if (off <= 1e-32 * on) return;
    for (int p = 0; p < N - 1; ++p) {
      for (int q = p + 1; q < N; ++q) {
        if (a[p][q] == 0.0) continue;
        const double theta = (a[q][q] - a[p][p]) / (2.0 * a[p][q]);
        const double t = std::copysign(1.0, theta) / (std::fabs(theta) + std::sqrt(theta * theta + 1.0));
        const double c = 1.0 / std::sqrt(t * t + 1.0), s = t * c;
        const double change = t * a[p][q];
        a[p][p] -= change;
        a[q][q] += change;
        a[p][q] = a[q][p] = 0.0;
        for (int i = 0; i < N; ++i) {
          if (i != p && i != q) {
            const double ip = a[i][p], iq = a[i][q];
            a[i][p] = a[p][i] = c * ip - s * iq;
            a[i][q] = a[q][i] = s * ip + c * iq;
          }
          const double vp = v[i][p], vq = v[i][q];
          v[i][p] = c * vp - s * vq;
          v[i][q] = s * vp + c * vq;
        }
      }
    }
  }
}

// Solves a x = b for M right-hand sides, in place, by elimination with row pivoting. A singular matrix gives inf or
// NaN.
template <int N, int M>
U4D_HD_CALL void solve(double (&a)[N][N], double (&b)[N][M]) {
  for (int p = 0; p < N; ++p) {
    int pivot = p;
    for (int i = p + 1; i < N; ++i) {
      if (std::fabs(a[i][p]) > std::fabs(a[pivot][p])) pivot = i;
    }
    for (int j = 0; j < N; ++j) {
      const double value = a[p][j];
      a[p][j] = a[pivot][j];
      a[pivot][j] = value;
    }
    for (int j = 0; j < M; ++j) {
      const double value = b[p][j];
      b[p][j] = b[pivot][j];
      b[pivot][j] = value;
    }
    for (int i = 0; i < N; ++i) {
      if (i == p) continue;
      const double factor = a[i][p] / a[p][p];
      for (int j = p; j < N; ++j) a[i][j] -= factor * a[p][j];
      for (int j = 0; j < M; ++j) b[i][j] -= factor * b[p][j];
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < M; ++j) b[i][j] /= a[i][i];
  }
}

// a = q u with orthonormal q and an upper triangular u of positive diagonal. Returns det q: +1 or -1.
U4D_HD_CALL double split(const double (&a)[9], double (&q)[9], double (&u)[9]) {
  for (int j = 0; j < 3; ++j) {
    double column[3] = {a[j], a[3 + j], a[6 + j]};
    for (int k = 0; k < 3; ++k) u[3 * k + j] = 0.0;
    for (int pass = 0; pass < 2; ++pass) {  // twice is enough for orthogonality to rounding
      for (int k = 0; k < j; ++k) {
        const double along = column[0] * q[k] + column[1] * q[3 + k] + column[2] * q[6 + k];
        u[3 * k + j] += along;
        for (int i = 0; i < 3; ++i) column[i] -= along * q[3 * i + k];
      }
    }
    const double length = std::sqrt(column[0] * column[0] + column[1] * column[1] + column[2] * column[2]);
    u[3 * j + j] = length;
    for (int i = 0; i < 3; ++i) q[3 * i + j] = column[i] / length;
  }
  return q[0] * (q[4] * q[8] - q[5] * q[7]) - q[1] * (q[3] * q[8] - q[5] * q[6]) + q[2] * (q[3] * q[7] - q[4] * q[6]);
}

U4D_HD_CALL void rotation_of_quaternion(double w, double x, double y, double z, double (&r)[9]) {
  const double n = 1.0 / std::sqrt(w * w + x * x + y * y + z * z);
  w *= n, x *= n, y *= n, z *= n;
  r[0] = 1 - 2 * (y * y + z * z), r[1] = 2 * (x * y - w * z), r[2] = 2 * (x * z + w * y);
  r[3] = 2 * (x * y + w * z), r[4] = 1 - 2 * (x * x + z * z), r[5] = 2 * (y * z - w * x);
  r[6] = 2 * (x * z - w * y), r[7] = 2 * (y * z + w * x), r[8] = 1 - 2 * (x * x + y * y);
}

// The rotation r that makes sum of w d . (r c) largest, from b[3 i + j] = sum of w d_i c_j; Horn, "Closed-form solution
// of absolute orientation using unit quaternions", 1987.
U4D_HD_CALL void best_rotation(const double* b, double (&r)[9]) {
  const double xx = b[0], yx = b[1], zx = b[2], xy = b[3], yy = b[4], zy = b[5], xz = b[6], yz = b[7], zz = b[8];
  double n[4][4] = {{xx + yy + zz, yz - zy, zx - xz, xy - yx},
                    {yz - zy, xx - yy - zz, xy + yx, zx + xz},
                    {zx - xz, xy + yx, yy - xx - zz, yz + zy},
                    {xy - yx, zx + xz, yz + zy, zz - xx - yy}};
  double v[4][4];
  jacobi(n, v);
  int best = 0;
  for (int i = 1; i < 4; ++i) {
    if (n[i][i] > n[best][best]) best = i;
  }
  rotation_of_quaternion(v[0][best], v[1][best], v[2][best], v[3][best], r);
}

}  // namespace u4d::small
