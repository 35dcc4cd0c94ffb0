// Calls of the kernels of deformable convolutions: shapes, layouts, and tensors whose points lie everywhere.
#ifndef INDUCTOR_VISION_TEST_DEFORM_CONVOLUTIONS_H
#define INDUCTOR_VISION_TEST_DEFORM_CONVOLUTIONS_H

#include "deform_conv2d.h"
#include "harness.h"

#include <cinttypes>
#include <cstdio>
#include <string>
#include <vector>

namespace harness {

using inductor_vision::accumulate_t;
using inductor_vision::DeformConv2d;
using inductor_vision::DeformKernel;
using inductor_vision::View4d;

struct Call {
  int64_t batch, channels, height, width, out_channels;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
  int64_t groups, offset_groups;
  bool mask, bias;
  Layout input, offset;
  bool hostile;

  int64_t out(int axis) const {
    const int64_t size = axis == 0 ? height : width;
    return (size + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1) / stride[axis] + 1;
  }
  bool fits() const {
    return height + 2 * padding[0] > dilation[0] * (kernel[0] - 1) &&
           width + 2 * padding[1] > dilation[1] * (kernel[1] - 1);
  }
  int64_t taps() const {
    return kernel[0] * kernel[1];
  }
  std::string describe() const {
    char text[400];
    std::snprintf(
        text, sizeof text,
        "batch %" PRId64 ", channels %" PRId64 " -> %" PRId64 ", size %" PRId64 "x%" PRId64 ", kernel %" PRId64
        "x%" PRId64 ", stride %" PRId64 "x%" PRId64 ", padding %" PRId64 "x%" PRId64 ", dilation %" PRId64 "x%" PRId64
        ", groups %" PRId64 ", offset groups %" PRId64
        ", mask %d, bias %d, input layout %d, offset layout %d, hostile %d",
        batch, channels, out_channels, height, width, kernel[0], kernel[1], stride[0], stride[1], padding[0],
        padding[1], dilation[0], dilation[1], groups, offset_groups, mask, bias, static_cast<int>(input),
        static_cast<int>(offset), hostile);
    return text;
  }
};

// The tensors of a call.
template <typename scalar_t>
struct Tensors {
  Tensor<scalar_t> input, offset, mask;
  std::vector<scalar_t> weight;  // [O, Cg, kH, kW]
  std::vector<scalar_t> bias;

  Tensors(const Call& call, bool shared, uint64_t seed)
      : input(call.batch, call.channels, call.height, call.width, call.input),
        offset(call.batch, 2 * call.offset_groups * call.taps(), call.out(0), call.out(1), call.offset),
        mask(call.batch, call.mask ? call.offset_groups * call.taps() : 0, call.out(0), call.out(1), call.offset),
        weight(call.out_channels * (call.channels / call.groups) * call.taps()),
        bias(call.bias ? call.out_channels : 0) {
    Random random(seed);
    input.fill([&](auto...) { return random.uniform(-1, 1); });
    mask.fill([&](auto...) { return random.uniform(0, 2); });
    offset.fill([&](int64_t, int64_t c, int64_t y, int64_t x) {
      const int axis = c % 2;
      const int64_t tap = c / 2 % call.taps(), size = axis == 0 ? call.height : call.width;
      const int64_t i = axis == 0 ? tap / call.kernel[1] : tap % call.kernel[1], p = axis == 0 ? y : x;
      const double here = static_cast<double>(p * call.stride[axis] - call.padding[axis] + i * call.dilation[axis]);
      const double border[] = {-2.0, -1.0, -0.75, 0.0, size - 1.0, size - 0.25, size + 0.0, size + 1.0};
      const double hostile[] = {kNaN, kInf, -kInf, 1e30, -1e30, 3e9, -3e9, 1e19, -1e19};
      switch (random.integer(0, 3)) {
        case 0:
          return random.pick(border) - here;
        case 1:
          return call.hostile ? random.pick(hostile) : random.uniform(-9, 9);
        default:
          return random.uniform(-2, 2);
      }
    });
    for (scalar_t& w : weight) {
      w = static_cast<scalar_t>(static_cast<float>(random.uniform(-1, 1)));
    }
    for (size_t i = call.taps(); shared && i < weight.size(); ++i) {
      weight[i] = weight[i - call.taps()];
    }
    for (scalar_t& b : bias) {
      b = static_cast<scalar_t>(static_cast<float>(random.uniform(-1, 1)));
    }
  }
};

template <typename scalar_t>
inline DeformConv2d<scalar_t> operation(const Call& call, const Tensors<scalar_t>& tensors) {
  return {
      tensors.input.view(),
      tensors.offset.view(),
      call.mask ? tensors.mask.view() : View4d<scalar_t>{nullptr, 0, 0, 0, 0},
      call.bias ? tensors.bias.data() : nullptr,
      call.batch,
      call.channels,
      call.height,
      call.width,
      call.out_channels,
      call.out(0),
      call.out(1),
      call.kernel[0],
      call.kernel[1],
      call.stride[0],
      call.stride[1],
      call.padding[0],
      call.padding[1],
      call.dilation[0],
      call.dilation[1],
      call.groups,
      call.offset_groups,
  };
}

template <typename AnyCall>
[[noreturn]] inline void fail(const AnyCall& call, const char* kind, const std::string& what) {
  std::printf("%s: %s\n  in %s\n", kind, what.c_str(), call.describe().c_str());
  std::exit(1);
}

// Calls whose shapes sit at the edges of blocks, panels, vectors and micro-tiles.
const Call kCalls[] = {
    {2, 64, 5, 6, 40, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, false},
    {1,
     37,
     7,
     9,
     19,
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     1,
     true,
     true,
     Layout::channels_last,
     Layout::contiguous,
     true},
    {2, 520, 3, 4, 5, {2, 2}, {1, 1}, {0, 1}, {1, 1}, 1, 4, true, false, Layout::contiguous, Layout::contiguous, false},
    {1, 600, 3, 4, 8, {1, 2}, {1, 1}, {0, 0}, {1, 1}, 4, 1, false, true, Layout::sliced, Layout::contiguous, false},
    {2, 256, 3, 3, 34, {3, 1}, {1, 1}, {1, 0}, {1, 1}, 2, 2, true, true, Layout::channels_last, Layout::sliced, false},
    {1, 1, 1, 1, 1, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 1, false, false, Layout::contiguous, Layout::contiguous, true},
    {3, 3, 1, 1, 16, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, true},
    {0, 8, 4, 4, 8, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::contiguous, false},
    {1, 4, 9, 200, 6, {1, 3}, {2, 1}, {0, 1}, {1, 2}, 2, 2, true, true, Layout::sliced, Layout::channels_last, true},
    {2, 8, 4, 4, 6, {2, 2}, {1, 1}, {1, 1}, {2, 2}, 1, 1, true, true, Layout::contiguous, Layout::transposed, false},
    {2, 8, 4, 2, 6, {1, 1}, {1, 1}, {0, 0}, {1, 1}, 1, 1, true, true, Layout::contiguous, Layout::transposed, false},
    {2,
     8,
     2,
     4,
     6,
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     1,
     true,
     true,
     Layout::contiguous,
     Layout::images_in_rows,
     false},
    {2,
     8,
     2,
     2,
     6,
     {3, 3},
     {1, 1},
     {1, 1},
     {1, 1},
     1,
     1,
     true,
     true,
     Layout::images_in_rows,
     Layout::images_in_rows,
     false},
    {4, 8, 4, 4, 6, {3, 3}, {1, 1}, {1, 1}, {1, 1}, 1, 1, true, true, Layout::expanded, Layout::expanded, false},
};

inline Call random_call(Random& random) {
  const int64_t few[] = {1, 1, 1, 2, 3, 4, 8};
  const int64_t most[] = {3, 3, 3, 40};
  const Layout layouts[] = {Layout::contiguous,           Layout::channels_last,  Layout::sliced,
                            Layout::sliced_channels_last, Layout::images_in_rows, Layout::expanded};
  const Layout offset_layouts[] = {
      Layout::contiguous, Layout::channels_last,  Layout::sliced,  Layout::sliced_channels_last,
      Layout::transposed, Layout::images_in_rows, Layout::expanded};
  Call call{};
  do {
    call.batch = random.integer(1, 4);
    call.groups = random.pick(few);
    call.offset_groups = random.pick(few);
    call.channels = call.groups * call.offset_groups * random.integer(1, random.pick(most));
    call.out_channels = call.groups * random.integer(1, random.pick(most));
    call.height = random.integer(1, 9);
    call.width = random.integer(1, 9);
    for (int axis = 0; axis < 2; ++axis) {
      call.kernel[axis] = random.integer(1, 3);
      call.stride[axis] = random.integer(1, 3);
      call.padding[axis] = random.integer(0, 3);
      call.dilation[axis] = random.integer(1, 3);
    }
    call.mask = random.integer(0, 2) != 0;
    call.bias = random.integer(0, 2) != 0;
    call.input = random.pick(layouts);
    call.offset = random.pick(offset_layouts);
    call.hostile = random.integer(0, 1) == 0;
  } while (!call.fits() || call.channels > 300);
  return call;
}

}  // namespace harness

#endif  // INDUCTOR_VISION_TEST_DEFORM_CONVOLUTIONS_H
