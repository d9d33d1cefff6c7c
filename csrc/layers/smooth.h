// Derivatives of the smooth activation functions, written once for floats (CUDA) and for vectors of them (CPU): the same float32
// operations in the same order. They are off by a few units of 1e-7, a ten-thousandth of the finest step that they are packed with.
//
// A type V has + - * /, at_most_else(a, b, yes, no) (a <= b ? yes : no; NaN: no) and exp2_near.
#pragma once

#include "../core/exp2.h"

namespace quantize::layers {

enum class Smooth { silu = 0, hardswish = 1, mish = 2, gelu = 3, gelu_tanh = 4 };

QUANTIZE_HOST_DEVICE float at_most_else(float a, float b, float yes, float no) { return a <= b ? yes : no; }

// Between -end and high; NaN is -end.
template <typename V>
QUANTIZE_HOST_DEVICE V bounded(V x, float end, float high) {
  const V above = at_most_else(V(-end), x, x, V(-end));
  return at_most_else(above, V(high), above, V(high));
}

template <typename V>
QUANTIZE_HOST_DEVICE V exp_of(V x) {  // |x| <= 87
  return exp2_near(x * 1.44269504f);
}

// s (1 + x (1 - s)), s = sigmoid(x)
template <typename V>
QUANTIZE_HOST_DEVICE V silu_derivative(V x) {
  const V z = bounded(x, 87.f, 87.f), e = exp_of(V(0.f) - z), s = V(1.f) / (e + 1.f);
  return s * (z * (e * s) + 1.f);
}

template <typename V>
QUANTIZE_HOST_DEVICE V hardswish_derivative(V x) {
  return at_most_else(V(-3.f), x, at_most_else(x, V(3.f), x / V(3.f) + 0.5f, V(1.f)), V(0.f));
}

// t + x s (1 - t^2), t = tanh(log(1 + e^x)) = n / (n + 2), n = e^x (e^x + 2)
template <typename V>
QUANTIZE_HOST_DEVICE V mish_derivative(V x) {
  const V z = bounded(x, 87.f, 20.f), e = exp_of(z), n = e * (e + 2.f), whole = n + 2.f, s = e / (e + 1.f);
  return n / whole + z * s * ((n + 1.f) / whole * (V(4.f) / whole));
}

// P(x) + x p(x), P and p the normal distribution's; P by Abramowitz and Stegun 7.1.26, off by 1e-7 at most
template <typename V>
QUANTIZE_HOST_DEVICE V gelu_derivative(V x) {
  const V z = bounded(x, 13.f, 13.f), size = at_most_else(V(0.f), z, z, V(0.f) - z), e = exp_of(z * z * -0.5f);
  const V t = V(1.f) / (V(1.f) + size * 0.23164189f);
  V p = V(1.061405429f) * t - 1.453152027f;
  p = p * t + 1.421413741f, p = p * t - 0.284496736f, p = (p * t + 0.254829592f) * t;
  const V tail = p * e * 0.5f;
  return at_most_else(V(0.f), z, V(1.f) - tail, tail) + z * e * 0.39894228f;
}

// s + 2 x s (1 - s) u', s = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <typename V>
QUANTIZE_HOST_DEVICE V gelu_tanh_derivative(V x) {
  const V z = bounded(x, 9.f, 9.f), square = z * z, e = exp_of(z * (square * 0.0713548163f + 1.59576912f)), rest = V(1.f) / (e + 1.f);
  const V s = e * rest;
  return s + z * (s * rest) * (square * 0.214064449f + 1.59576912f);
}

template <Smooth function, typename V>
QUANTIZE_HOST_DEVICE V smooth_derivative(V x) {
  V y;
  if constexpr (function == Smooth::silu) y = silu_derivative(x);
  if constexpr (function == Smooth::hardswish) y = hardswish_derivative(x);
  if constexpr (function == Smooth::mish) y = mish_derivative(x);
  if constexpr (function == Smooth::gelu) y = gelu_derivative(x);
  if constexpr (function == Smooth::gelu_tanh) y = gelu_tanh_derivative(x);
  return at_most_else(x, x, y, x);  // NaN
}

}  // namespace quantize::layers
