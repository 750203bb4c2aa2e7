#include "evict/projections.h"

#include <algorithm>
#include <cmath>

namespace lacuna {
namespace {

// Two doubles; the compiler maps them to whatever the target has.
typedef double Lanes __attribute__((vector_size(16)));

Lanes load(const double* from) {
  Lanes lanes;
  __builtin_memcpy(&lanes, from, sizeof lanes);
  return lanes;
}

double dot(const double* a, const double* b, int64_t n) {
  // Four partial sums: without them the additions wait for each other.
  Lanes s0{}, s1{}, s2{}, s3{};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    s0 += load(a + i) * load(b + i);
    s1 += load(a + i + 2) * load(b + i + 2);
    s2 += load(a + i + 4) * load(b + i + 4);
    s3 += load(a + i + 6) * load(b + i + 6);
  }
  s0 = (s0 + s1) + (s2 + s3);
  double sum = s0[0] + s0[1];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// y -= f x
void subtract_scaled(const double* __restrict x, double f, int64_t n, double* __restrict y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; ++j) y[i + j] -= f * x[i + j];
  for (; i < n; ++i) y[i] -= f * x[i];
}

// R [d, d] of the Householder QR of `columns` (d columns of length n, overwritten). Rows past n are zero.
void householder_factor(std::vector<double>& columns, int64_t n, int d, float* r) {
  std::fill(r, r + static_cast<int64_t>(d) * d, 0.0f);
  for (int k = 0; k < d && k < n; ++k) {
    double* x = columns.data() + k * n;
    const double length = std::sqrt(dot(x + k, x + k, n - k));
    r[static_cast<int64_t>(k) * d + k] = static_cast<float>(length);
    if (length == 0) {  // nothing to reflect: the rest of this row is zero as it stands
      for (int j = k + 1; j < d; ++j) r[static_cast<int64_t>(k) * d + j] = static_cast<float>(columns[static_cast<size_t>(j) * n + k]);
      continue;
    }
    // The reflection takes x to (-sign(x_k) * length, 0, …): no cancellation in x_k. Signs of R's rows
    // do not matter to a norm, so the diagonal is written positive and the row turned with it.
    const double sign = x[k] < 0 ? -1.0 : 1.0;
    x[k] += sign * length;
    const double scale = 2.0 / dot(x + k, x + k, n - k);
    for (int j = k + 1; j < d; ++j) {
      double* y = columns.data() + static_cast<int64_t>(j) * n;
      const double f = scale * dot(x + k, y + k, n - k);
      subtract_scaled(x + k, f, n - k, y + k);
      r[static_cast<int64_t>(k) * d + j] = static_cast<float>(-sign * y[k]);
    }
  }
}

}  // namespace

OutputProjections::OutputProjections(const Model& model)
    : model_(model), factors_(static_cast<size_t>(model.info().layers)), products_(static_cast<size_t>(model.info().layers)) {}

void OutputProjections::block(int layer, int head, float* out) const {
  const AttentionLayer& a = *model_.attention(layer);
  const LinearWeight& w = a.output;
  const int64_t rows = w.out(), columns = w.in(), d = a.head_dim;
  for (int64_t o = 0; o < rows; ++o) {
    const int64_t from = o * columns + head * d;
    float* to = out + o * d;
    switch (w.weight.dtype) {
      case DType::kF32:
        for (int64_t j = 0; j < d; ++j) to[j] = w.weight.as<float>()[from + j];
        break;
      case DType::kBF16:
        for (int64_t j = 0; j < d; ++j) to[j] = to_float(w.weight.as<BF16>()[from + j]);
        break;
      case DType::kF16:
        for (int64_t j = 0; j < d; ++j) to[j] = to_float(w.weight.as<F16>()[from + j]);
        break;
      case DType::kI8:
        for (int64_t j = 0; j < d; ++j) to[j] = static_cast<float>(w.weight.as<int8_t>()[from + j]) * w.row_scale[o];
        break;
      default:
        throw Unsupported("layer {}: the output projection has dtype {}; f32, f16, bf16 or int8 can be scored", layer,
                          dtype_name(w.weight.dtype));
    }
  }
}

const float* OutputProjections::factors(Context& ctx, int layer, int kv_head) {
  const std::lock_guard lock(mutex_);
  Buffer& buffer = factors_[static_cast<size_t>(layer)];
  const AttentionLayer& a = *model_.attention(layer);
  const int64_t rows = a.output.out(), d = a.head_dim, size = packed_triangle(a.head_dim);
  if (!buffer) {
    Buffer made(ctx.memory, MemoryTag::kWeights, static_cast<size_t>(a.query_heads * size) * sizeof(float));
    ctx.pool.parallel_for(a.query_heads, [&](int64_t h, int) {
      std::vector<float> w(static_cast<size_t>(rows * d)), r(static_cast<size_t>(d * d));
      block(layer, static_cast<int>(h), w.data());
      std::vector<double> columns(w.size());
      for (int64_t o = 0; o < rows; ++o)
        for (int64_t j = 0; j < d; ++j) columns[static_cast<size_t>(j * rows + o)] = w[static_cast<size_t>(o * d + j)];
      householder_factor(columns, rows, a.head_dim, r.data());
      pack_triangle(r.data(), a.head_dim, made.as<float>() + h * size);
    });
    buffer = std::move(made);
  }
  return buffer.as<float>() + kv_head * (a.query_heads / a.kv_heads) * size;
}

const float* OutputProjections::products(Context& ctx, int layer, int kv_head) {
  const std::lock_guard lock(mutex_);
  Buffer& buffer = products_[static_cast<size_t>(layer)];
  const AttentionLayer& a = *model_.attention(layer);
  const int64_t rows = a.output.out(), d = a.head_dim;
  const int group = a.query_heads / a.kv_heads;
  const int64_t size = packed_triangle(a.head_dim), all = int64_t{group} * (group + 1) / 2 * size;
  if (!buffer) {
    Buffer made(ctx.memory, MemoryTag::kWeights, static_cast<size_t>(a.kv_heads * all) * sizeof(float));
    ctx.pool.parallel_for(a.kv_heads, [&](int64_t g, int) {
      std::vector<std::vector<float>> w(static_cast<size_t>(group), std::vector<float>(static_cast<size_t>(rows * d)));
      for (int h = 0; h < group; ++h) block(layer, static_cast<int>(g) * group + h, w[static_cast<size_t>(h)].data());
      std::vector<double> sum(static_cast<size_t>(d * d)), row(static_cast<size_t>(d));
      std::vector<float> triangle(static_cast<size_t>(d * d));
      float* out = made.as<float>() + g * all;
      for (int h = 0; h < group; ++h)
        for (int other = h; other < group; ++other, out += size) {
          std::fill(sum.begin(), sum.end(), 0.0);
          for (int64_t o = 0; o < rows; ++o) {
            const float* x = w[static_cast<size_t>(h)].data() + o * d;
            const float* y = w[static_cast<size_t>(other)].data() + o * d;
            for (int64_t j = 0; j < d; ++j) row[static_cast<size_t>(j)] = y[j];
            for (int64_t i = 0; i < d; ++i)
              subtract_scaled(row.data(), -static_cast<double>(x[i]), d, sum.data() + i * d);
          }
          for (int64_t i = 0; i < d; ++i)
            for (int64_t j = i; j < d; ++j) {
              const double twice = sum[static_cast<size_t>(i * d + j)] + sum[static_cast<size_t>(j * d + i)];
              triangle[static_cast<size_t>(i * d + j)] = static_cast<float>(i == j ? 0.5 * twice : twice);
            }
          pack_triangle(triangle.data(), a.head_dim, out);
        }
    });
    buffer = std::move(made);
  }
  return buffer.as<float>() + kv_head * all;
}

}  // namespace lacuna
