// Packed layers for the checks of their kernels: a few of everything, and sizes that no vector and no tile divides.
#pragma once

namespace cuda_on_host {

struct Layer {
  int batch, inputs, outputs, kernel[2], stride, padding, dilation, groups, height, width;
};

inline int size(int in, int kernel, const Layer& l) { return (in + 2 * l.padding - l.dilation * (kernel - 1) - 1) / l.stride + 1; }

// batch, inputs, outputs, kernel, stride, padding, dilation, groups, height, width
inline constexpr Layer kLayers[] = {
    {1, 1, 8, {3, 3}, 1, 1, 1, 1, 12, 12},   {1, 3, 16, {3, 3}, 2, 1, 1, 1, 9, 7},    {1, 16, 33, {3, 3}, 1, 1, 1, 1, 6, 6},
    {1, 17, 70, {1, 1}, 2, 0, 1, 1, 6, 5},   {1, 63, 9, {3, 3}, 1, 0, 2, 1, 7, 8},    {1, 64, 64, {3, 3}, 1, 1, 1, 1, 7, 7},
    {1, 65, 8, {3, 3}, 1, 1, 2, 1, 5, 6},    {2, 128, 40, {3, 3}, 2, 1, 1, 1, 5, 5},  {1, 128, 128, {1, 1}, 1, 1, 1, 2, 3, 4},
    {1, 34, 6, {3, 3}, 1, 1, 1, 2, 4, 4},    {1, 64, 64, {3, 3}, 1, 1, 1, 64, 4, 5},  {1, 128, 20, {1, 3}, 1, 2, 1, 2, 1, 9},
    {1, 256, 65, {1, 1}, 1, 0, 1, 1, 1, 1},  {7, 65, 3, {1, 1}, 1, 0, 1, 1, 1, 1},    {3, 200, 40, {1, 1}, 1, 0, 1, 1, 1, 1},
    {5, 1100, 33, {1, 1}, 1, 0, 1, 1, 1, 1}, {9, 1700, 66, {1, 1}, 1, 0, 1, 1, 1, 1}, {1, 16, 8, {1, 1}, 3, 1, 1, 1, 1, 1},
    {2, 24, 40, {3, 3}, 2, 1, 1, 1, 5, 5},   {1, 16, 8, {1, 1}, 1, 1, 1, 1, 0, 5}};

}  // namespace cuda_on_host
