// What RMSNorm needs of a row, for norm, rope and pool. Included once for each instruction set,
// after vector.h.

namespace gen_fast::GEN_FAST_ISA {

// r = (mean(x²) + eps)^(-1/2).
template <class T>
static inline float inverse_rms(const T* x, int64_t size, float eps) {
  vf squares = {};
  float tail = 0;
  const int64_t whole = size - size % W;
  for (int64_t i = 0; i < whole; i += W) {
    const vf v = load(x + i);
    squares += v * v;
  }
  for (int64_t i = whole; i < size; ++i) tail += to_float(x[i]) * to_float(x[i]);
  return 1.0f / std::sqrt((sum(squares) + tail) / (float)size + eps);
}

// The gradient of x·r·w by x is r · (g·w − x·shared), with shared = r²·mean(g·w·x).
struct RmsGradient {
  float scale, shared;
};

template <class T, class G>
static inline RmsGradient rms_gradient(const T* x, const G* grad, const T* weight, int64_t size,
                                       float eps) {
  vf squares = {}, products = {};
  float tail_squares = 0, tail_products = 0;
  const int64_t whole = size - size % W;
  for (int64_t i = 0; i < whole; i += W) {
    const vf v = load(x + i);
    squares += v * v;
    products += v * (load(grad + i) * load(weight + i));
  }
  for (int64_t i = whole; i < size; ++i) {
    const float v = to_float(x[i]);
    tail_squares += v * v;
    tail_products += v * to_float(grad[i]) * to_float(weight[i]);
  }
  const float scale = 1.0f / std::sqrt((sum(squares) + tail_squares) / (float)size + eps);
  return {scale, scale * scale * (sum(products) + tail_products) / (float)size};
}

}  // namespace gen_fast::GEN_FAST_ISA
