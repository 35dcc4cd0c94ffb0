// Deformable convolution, forward: sampling fused with the matrix product, no column buffer.
//
//   B, C, H, W     batch, channels, height, width of the input         Cg, Og   input, output channels of a weight group
//   O, Ho, Wo      channels, height, width of the output               tap      a position (i, j) in the kernel
//   pixel          a position in (B, Ho, Wo), flattened                depth    the axis that is summed over: (tap, Cg)
//
//   out[b, o, p] = bias[o] + sum over tap, c of weight[o, c, tap] * mask[b, tap, p] * bilinear(input[b, c], y, x)
//   y = ho * stride - padding + i * dilation + offset[b, 2 * tap, p],  x likewise with offset[b, 2 * tap + 1, p]
//
// A tile of pixels is done at a time.  For a block of the depth it is sampled, vectorized over channels, into a buffer
// that stays in cache, which is multiplied at once by that block of the packed weight into the tile's sums.  So that
// the channels of a pixel are neighbours, an input that is not channels_last is transposed first, a few images at a
// time.  A depthwise convolution (C = O = groups) keeps its sums in registers and needs no buffer at all.
//
// Tiles are shared among the threads.  The depth blocks depend on the shape alone, so every sum has one order: the
// result is the same, to the bit, for any number of threads.
#ifndef INDUCTOR_VISION_DEFORM_CONV2D_H
#define INDUCTOR_VISION_DEFORM_CONV2D_H

#include <cmath>

#include "base.h"
#include "gemm.h"

namespace inductor_vision {

// A [B, channels, height, width] tensor with any strides, in elements.
template <typename scalar_t>
struct View4d {
  const scalar_t* data;
  int64_t image, channel, row, column;
};

template <typename scalar_t>
struct DeformConv2d {
  View4d<scalar_t> input;
  View4d<scalar_t> offset;
  View4d<scalar_t> mask;  // data is null: no mask
  const scalar_t* bias;   // null: no bias
  int64_t batch, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t groups, offset_groups;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
  int64_t pixels() const {
    return batch * out_height * out_width;
  }
};

// Sizes that are tuned; see lowering/deform_conv2d.py.
struct DeformBlocking {
  int64_t pixels;  // in a tile, at most
  int64_t depth;   // samples of a pixel that are buffered, at most; no more than kMaxDepth
  int64_t bytes;   // an input that is not channels_last is transposed in whole images of at most so many, or one
};

// The depth is cut into equal numbers of taps with all channels, or, if the channels of one tap are too many, into
// equal numbers of channels of one tap.
struct DeformBlocks {
  int64_t taps;
  int64_t channels;

  template <typename scalar_t>
  DeformBlocks(const DeformConv2d<scalar_t>& op, const DeformBlocking& blocking) : taps(1), channels(op.channels) {
    const int64_t depth = std::clamp<int64_t>(round_down(blocking.depth, kPanel<float>), kPanel<float>, kMaxDepth);
    if (channels > depth) {
      channels = round_up(divide_up(channels, divide_up(channels, depth)), kPanel<float>);
    } else {
      taps = divide_up(op.taps(), divide_up(op.taps(), depth / channels));
    }
  }
};

// Where a tap samples one pixel: four corners, their weights, the mask.  A corner that is not in the image points to
// zeros, never to a value times zero: 0 * NaN is NaN.
template <typename scalar_t>
struct DeformSample {
  const scalar_t* corner[4];
  accumulate_t<scalar_t> weight[4];
  accumulate_t<scalar_t> mask;
};

// One output pixel: its image, where its offsets and masks begin, and the point that tap (0, 0) samples undisplaced.
template <typename scalar_t>
struct DeformPixel {
  const scalar_t* image;
  const scalar_t* offset;
  const scalar_t* mask;
  accumulate_t<scalar_t> y, x;
};

// Steps through output pixels in memory order.
struct PixelCursor {
  int64_t image, row, column;
  int64_t rows, columns;

  PixelCursor(int64_t pixel, int64_t rows, int64_t columns)
      : image(pixel / (rows * columns)),
        row(pixel / columns % rows),
        column(pixel % columns),
        rows(rows),
        columns(columns) {}
  void advance(int64_t count) {  // count does not leave the row, except to the beginning of the next
    column += count;
    if (column == columns) {
      column = 0;
      if (++row == rows) {
        row = 0;
        ++image;
      }
    }
  }
};

// The output pixels [begin, end) into `pixels`.  `input` is channels_last and holds the images from `first_image` on.
template <typename scalar_t>
inline void list_pixels(
    const DeformConv2d<scalar_t>& op, const View4d<scalar_t>& input, int64_t first_image, int64_t begin, int64_t end,
    DeformPixel<scalar_t>* pixels) {
  using acc_t = accumulate_t<scalar_t>;
  PixelCursor at(begin, op.out_height, op.out_width);
  for (int64_t p = begin; p < end; ++p, at.advance(1)) {
    DeformPixel<scalar_t>& pixel = *pixels++;
    pixel.image = input.data + (at.image - first_image) * input.image;
    pixel.offset = op.offset.data + at.image * op.offset.image + at.row * op.offset.row + at.column * op.offset.column;
    pixel.mask = op.mask.data == nullptr
        ? nullptr
        : op.mask.data + at.image * op.mask.image + at.row * op.mask.row + at.column * op.mask.column;
    pixel.y = static_cast<acc_t>(at.row * op.stride_height - op.padding_height);
    pixel.x = static_cast<acc_t>(at.column * op.stride_width - op.padding_width);
  }
}

// Where one tap samples each of `count` pixels; empty samples from there up to `padded`.
//
// A point is in the image where -1 < y < H and -1 < x < W.  NaN fails that test, and it is made before the conversion
// to an integer: no offset can lead out of bounds.
template <typename scalar_t>
inline void locate(
    const DeformConv2d<scalar_t>& op, const View4d<scalar_t>& input, const DeformPixel<scalar_t>* pixels,
    int64_t count, int64_t padded, int64_t offset_group, int64_t tap, const scalar_t* zeros,
    DeformSample<scalar_t>* samples) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  using index_t = ::at::vec::int_same_size_t<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t channel = offset_group * op.taps() + tap;
  const int64_t mask_at = channel * op.mask.channel;
  const int64_t offset_y_at = 2 * channel * op.offset.channel;
  const int64_t offset_x_at = offset_y_at + op.offset.channel;
  const acc_t tap_y = static_cast<acc_t>(tap / op.kernel_width * op.dilation_height);
  const acc_t tap_x = static_cast<acc_t>(tap % op.kernel_width * op.dilation_width);
  const Vec lowest(-1), height(static_cast<acc_t>(op.height)), width(static_cast<acc_t>(op.width));
  const Vec zero(0), one(1), outside(-2);
  const uint64_t last_row = static_cast<uint64_t>(op.height - 1), last_column = static_cast<uint64_t>(op.width - 1);

  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t n = std::min(kLanes, count - first);
    alignas(kCacheLine) acc_t ys[kLanes] = {}, xs[kLanes] = {};
    for (int64_t i = 0; i < n; ++i) {
      const DeformPixel<scalar_t>& pixel = pixels[first + i];
      ys[i] = pixel.y + tap_y + static_cast<acc_t>(pixel.offset[offset_y_at]);
      xs[i] = pixel.x + tap_x + static_cast<acc_t>(pixel.offset[offset_x_at]);
    }

    const Vec y = Vec::loadu(ys), x = Vec::loadu(xs);
    const Vec inside = (y > lowest) & (y < height) & (x > lowest) & (x < width);
    const Vec y0 = y.floor(), x0 = x.floor();
    const Vec bottom = Vec::blendv(zero, y - y0, inside), right = Vec::blendv(zero, x - x0, inside);
    const Vec top = one - bottom, left = one - right;
    alignas(kCacheLine) acc_t weights[4][kLanes];
    (top * left).store(weights[0]);
    (top * right).store(weights[1]);
    (bottom * left).store(weights[2]);
    (bottom * right).store(weights[3]);
    alignas(kCacheLine) index_t y_index[kLanes], x_index[kLanes];
    ::at::vec::convert_to_int_of_same_size(Vec::blendv(outside, y0, inside)).store(y_index);
    ::at::vec::convert_to_int_of_same_size(Vec::blendv(outside, x0, inside)).store(x_index);

    for (int64_t i = 0; i < n; ++i) {
      const DeformPixel<scalar_t>& pixel = pixels[first + i];
      DeformSample<scalar_t>& sample = samples[first + i];
      const int64_t row = y_index[i], column = x_index[i];
      const int64_t corner = row * input.row + column * input.column;
      // One unsigned comparison tests both ends of a range; `outside` fails it for both rows and both columns.
      if (static_cast<uint64_t>(row) < last_row && static_cast<uint64_t>(column) < last_column) {
        sample.corner[0] = pixel.image + corner;
        sample.corner[1] = pixel.image + (corner + input.column);
        sample.corner[2] = pixel.image + (corner + input.row);
        sample.corner[3] = pixel.image + (corner + input.row + input.column);
      } else {
        const bool has_top = static_cast<uint64_t>(row) <= last_row;
        const bool has_bottom = static_cast<uint64_t>(row + 1) <= last_row;
        const bool has_left = static_cast<uint64_t>(column) <= last_column;
        const bool has_right = static_cast<uint64_t>(column + 1) <= last_column;
        sample.corner[0] = has_top && has_left ? pixel.image + corner : zeros;
        sample.corner[1] = has_top && has_right ? pixel.image + (corner + input.column) : zeros;
        sample.corner[2] = has_bottom && has_left ? pixel.image + (corner + input.row) : zeros;
        sample.corner[3] = has_bottom && has_right ? pixel.image + (corner + input.row + input.column) : zeros;
      }
      for (int k = 0; k < 4; ++k) {
        sample.weight[k] = weights[k][i];
      }
      sample.mask = pixel.mask == nullptr ? acc_t(1) : static_cast<acc_t>(pixel.mask[mask_at]);
    }
  }
  for (int64_t p = count; p < padded; ++p) {
    samples[p] = {{zeros, zeros, zeros, zeros}, {0, 0, 0, 0}, 0};
  }
}

// A sample held in registers, to be taken at many channels.
template <typename scalar_t>
struct Interpolation {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  const scalar_t *corner0, *corner1, *corner2, *corner3;
  Vec weight0, weight1, weight2, weight3, mask;

  explicit Interpolation(const DeformSample<scalar_t>& s)
      : corner0(s.corner[0]),
        corner1(s.corner[1]),
        corner2(s.corner[2]),
        corner3(s.corner[3]),
        weight0(s.weight[0]),
        weight1(s.weight[1]),
        weight2(s.weight[2]),
        weight3(s.weight[3]),
        mask(s.mask) {}

  // At Vec::size() channels from c on.
  Vec at(int64_t c) const {
    Vec value = weight0 * load_vector(corner0 + c);
    value = ::at::vec::fmadd(weight1, load_vector(corner1 + c), value);
    value = ::at::vec::fmadd(weight2, load_vector(corner2 + c), value);
    value = ::at::vec::fmadd(weight3, load_vector(corner3 + c), value);
    return value * mask;
  }
};

// The same at one channel.
template <typename scalar_t>
inline accumulate_t<scalar_t> interpolate_channel(const DeformSample<scalar_t>& sample, int64_t c) {
  using acc_t = accumulate_t<scalar_t>;
  acc_t value = sample.weight[0] * static_cast<acc_t>(sample.corner[0][c]);
  for (int k = 1; k < 4; ++k) {
    value = std::fma(sample.weight[k], static_cast<acc_t>(sample.corner[k][c]), value);
  }
  return value * sample.mask;
}

// out[c - begin] = the sample at channels [begin, end), in the type that the matrix product takes.
template <typename scalar_t, typename value_t>
inline void interpolate(const DeformSample<scalar_t>& sample, int64_t begin, int64_t end, value_t* out) {
  using acc_t = accumulate_t<scalar_t>;
  const Interpolation<scalar_t> interpolation(sample);
  int64_t c = begin;
  for (; c + Vectorized<acc_t>::size() <= end; c += Vectorized<acc_t>::size()) {
    store_vector(interpolation.at(c), out + (c - begin));
  }
  for (; c < end; ++c) {
    out[c - begin] = static_cast<value_t>(interpolate_channel(sample, c));
  }
}

// The same, summed over taps with depthwise weights, for U vectors of channels: sums stay in registers.
// `weight` holds [taps][channels], or [taps] where one kernel serves all channels.
template <int U, bool kShared, typename scalar_t>
inline void depthwise_vectors(
    const DeformSample<scalar_t>* samples, int64_t sample_stride, int64_t taps, int64_t c,
    const accumulate_t<scalar_t>* weight, int64_t channels, accumulate_t<scalar_t>* sum) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  Vec total[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    total[u] = Vec::loadu(sum + c + u * Vec::size());
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const Interpolation<scalar_t> interpolation(samples[tap * sample_stride]);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const int64_t at = c + u * Vec::size();
      const Vec w = kShared ? Vec(weight[tap]) : Vec::loadu(weight + tap * channels + at);
      total[u] = ::at::vec::fmadd(w, interpolation.at(at), total[u]);
    }
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    total[u].store(sum + c + u * Vec::size());
  }
}

template <bool kShared, typename scalar_t>
inline void depthwise_pixel(
    const DeformSample<scalar_t>* samples, int64_t sample_stride, int64_t taps, int64_t begin, int64_t end,
    const accumulate_t<scalar_t>* weight, int64_t channels, accumulate_t<scalar_t>* sum) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kLanes = Vectorized<acc_t>::size();
  int64_t c = begin;
  for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
    depthwise_vectors<4, kShared>(samples, sample_stride, taps, c, weight, channels, sum);
  }
  for (; c + kLanes <= end; c += kLanes) {
    depthwise_vectors<1, kShared>(samples, sample_stride, taps, c, weight, channels, sum);
  }
  for (; c < end; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const acc_t w = kShared ? weight[tap] : weight[tap * channels + c];
      sum[c] = std::fma(w, interpolate_channel(samples[tap * sample_stride], c), sum[c]);
    }
  }
}

// Images [first, first + count) as [count, H, W, C] into `out`, shared among the threads of a parallel region.
template <typename scalar_t>
inline void transpose_images(const DeformConv2d<scalar_t>& op, int64_t first, int64_t count, scalar_t* out) {
  constexpr int64_t kStrip = 128;  // pixels
  const View4d<scalar_t>& input = op.input;
  const bool flat = input.row == op.width;  // rows follow each other
  const int64_t rows = flat ? 1 : op.height, width = flat ? op.height * op.width : op.width;
  const int64_t strips = divide_up(width, kStrip);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < count * rows * strips; ++task) {
    const int64_t image = task / (rows * strips), row = task / strips % rows, column = task % strips * kStrip;
    const scalar_t* from = input.data + (first + image) * input.image + row * input.row + column;
    scalar_t* to = out + ((image * rows + row) * width + column) * op.channels;
    transpose(from, input.channel, to, op.channels, op.channels, std::min(kStrip, width - column));
  }
}

// How weights are packed and which loop nest uses them.
enum class DeformKernel {
  gemm,       // [groups][panels][taps][Cg][kPanel], bf16 dot products: [groups][panels][taps][Cg / 2][kPanel][2]
  depthwise,  // [taps][C]
  shared,     // [taps]: one depthwise kernel for all channels
};

// One thread's buffers, and what it does with a tile of pixels.
template <DeformKernel kKernel, typename scalar_t, typename weight_t>
class DeformTile {
 public:
  using acc_t = accumulate_t<scalar_t>;

  DeformTile(const DeformConv2d<scalar_t>& op, const weight_t* weight, const DeformBlocks& blocks, int64_t pixels)
      : op_(op),
        weight_(weight),
        blocks_(blocks),
        padded_(round_up(pixels, kMicroRows)),
        pixels_(padded_),
        samples_(padded_ * (kKernel == DeformKernel::gemm ? 1 : op.taps())),
        depth_(kKernel == DeformKernel::gemm ? padded_ * kRowDistance : 0),
        zeros_(op.channels),
        sums_(padded_ * columns()) {
    std::fill_n(zeros_.get(), op.channels, scalar_t(0));
  }

  // Sums are kept `columns()` apart; in the GEMM the channels of each group are padded to whole panels.
  int64_t columns() const {
    return kKernel == DeformKernel::gemm ? op_.groups * group_columns() : op_.channels;
  }

  // sums()[p * columns() + o] for the pixels [begin, end).
  void run(const View4d<scalar_t>& input, int64_t first_image, int64_t begin, int64_t end) {
    count_ = end - begin;
    list_pixels(op_, input, first_image, begin, end, pixels_.get());
    if constexpr (kKernel == DeformKernel::gemm) {
      run_gemm(input);
    } else {
      run_depthwise(input);
    }
  }
  const acc_t* sums() const {
    return sums_.get();
  }

 private:
  int64_t group_columns() const {
    return round_up(op_.out_channels / op_.groups, kPanel<acc_t>);
  }

  void begin_sums(int64_t rows, int64_t group_outputs, int64_t group_stride) {
    acc_t* first = sums_.get();
    std::fill_n(first, columns(), acc_t(0));
    if (op_.bias != nullptr) {
      for (int64_t o = 0; o < op_.out_channels; ++o) {
        first[o / group_outputs * group_stride + o % group_outputs] = static_cast<acc_t>(op_.bias[o]);
      }
    }
    for (int64_t p = 1; p < rows; ++p) {
      std::copy_n(first, columns(), first + p * columns());
    }
  }

  void run_gemm(const View4d<scalar_t>& input) {
    const int64_t rows = round_up(count_, kRowStep);
    const int64_t group_inputs = op_.channels / op_.groups, group_outputs = op_.out_channels / op_.groups;
    begin_sums(rows, group_outputs, group_columns());
    for (int64_t t = 0; t < op_.taps(); t += blocks_.taps) {
      const int64_t t_end = std::min(t + blocks_.taps, op_.taps());
      for (int64_t c = 0; c < op_.channels; c += blocks_.channels) {
        const int64_t c_end = std::min(c + blocks_.channels, op_.channels);
        sample_block(input, rows, t, t_end, c, c_end);
        for (int64_t g = c / group_inputs; g * group_inputs < c_end; ++g) {
          // The channels of this group that are in the block; all of them, unless the block is a single tap.
          const int64_t from = std::max(c, g * group_inputs), to = std::min(c_end, (g + 1) * group_inputs);
          const int64_t panel = op_.taps() * group_inputs * kPanel<acc_t>;
          const Rows<weight_t> a{depth_.get() + (from - c), t_end - t, to - from, c_end - c};
          const Panels<weight_t> b{
              weight_ + g * (group_columns() / kPanel<acc_t>)*panel +
                  (t * group_inputs + from - g * group_inputs) * kPanel<acc_t>,
              panel};
          gemm(a, b, group_columns() / kPanel<acc_t>, sums_.get() + g * group_columns(), columns(), rows);
        }
      }
    }
    if (group_columns() != group_outputs) {  // close the gaps between groups
      for (int64_t p = 0; p < count_; ++p) {
        acc_t* sum = sums_.get() + p * columns();
        for (int64_t g = 1; g < op_.groups; ++g) {
          std::copy_n(sum + g * group_columns(), group_outputs, sum + g * group_outputs);
        }
      }
    }
  }

  // depth[p][tap - t][channel - c]
  void sample_block(const View4d<scalar_t>& input, int64_t rows, int64_t t, int64_t t_end, int64_t c, int64_t c_end) {
    const int64_t offset_channels = op_.channels / op_.offset_groups;
    for (int64_t tap = t; tap < t_end; ++tap) {
      for (int64_t g = c / offset_channels; g * offset_channels < c_end; ++g) {
        const int64_t from = std::max(c, g * offset_channels), to = std::min(c_end, (g + 1) * offset_channels);
        locate(op_, input, pixels_.get(), count_, rows, g, tap, zeros_.get(), samples_.get());
        weight_t* out = depth_.get() + (tap - t) * (c_end - c) + (from - c);
        for (int64_t p = 0; p < rows; ++p) {
          interpolate(samples_.get()[p], from, to, out + p * kRowDistance);
        }
      }
    }
  }

  void run_depthwise(const View4d<scalar_t>& input) {
    constexpr bool kShared = kKernel == DeformKernel::shared;
    const int64_t offset_channels = op_.channels / op_.offset_groups;
    begin_sums(count_, op_.channels, 0);
    for (int64_t g = 0; g < op_.offset_groups; ++g) {
      for (int64_t tap = 0; tap < op_.taps(); ++tap) {
        locate(
            op_, input, pixels_.get(), count_, count_, g, tap, zeros_.get(), samples_.get() + tap * padded_);
      }
      for (int64_t p = 0; p < count_; ++p) {
        depthwise_pixel<kShared>(
            samples_.get() + p, padded_, op_.taps(), g * offset_channels, (g + 1) * offset_channels, weight_,
            op_.channels, sums_.get() + p * op_.channels);
      }
    }
  }

  const DeformConv2d<scalar_t>& op_;
  const weight_t* weight_;
  const DeformBlocks& blocks_;
  int64_t padded_;
  int64_t count_ = 0;
  Scratch<DeformPixel<scalar_t>> pixels_;
  Scratch<DeformSample<scalar_t>> samples_;
  Scratch<weight_t> depth_;
  Scratch<scalar_t> zeros_;
  Scratch<acc_t> sums_;
};

// store(image, row, column, columns, sums, distance): the results of `columns` neighbours in an output row, for all
// output channels.  With kChannelsLast, channel o of pixel i is sums[i * distance + o], otherwise
// sums[o * distance + i].
template <bool kChannelsLast, DeformKernel kKernel, typename scalar_t, typename weight_t, typename Store>
inline void deform_conv2d(
    const DeformConv2d<scalar_t>& op, const weight_t* weight, const DeformBlocking& blocking, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  if (op.pixels() == 0 || op.out_channels == 0) {
    return;
  }
  const DeformBlocks blocks(op, blocking);
  const int threads = omp_get_max_threads();
  const bool transposed = op.input.channel != 1;
  const int64_t image_pixels = op.height * op.width;
  const int64_t images = transposed
      ? std::clamp<int64_t>(blocking.bytes / std::max<int64_t>(1, image_pixels * op.channels * sizeof(scalar_t)), 1, op.batch)
      : op.batch;
  const Scratch<scalar_t> channels_last(transposed ? images * image_pixels * op.channels : 0);
  View4d<scalar_t> input = op.input;
  if (transposed) {
    input = {channels_last.get(), image_pixels * op.channels, 1, op.width * op.channels, op.channels};
  }
  const int64_t out_pixels = op.out_height * op.out_width;
  const Tiling largest(divide_up(images * out_pixels, kMicroRows), divide_up(blocking.pixels, kMicroRows), threads);

#pragma omp parallel num_threads(threads)
  {
    DeformTile<kKernel, scalar_t, weight_t> tile(op, weight, blocks, largest.largest() * kMicroRows);
    const Scratch<acc_t> by_channel(kChannelsLast ? 0 : largest.largest() * kMicroRows * op.out_channels);
    for (int64_t image = 0; image < op.batch; image += images) {
      const int64_t pixels = std::min(images, op.batch - image) * out_pixels;
      if (transposed) {
        transpose_images(op, image, std::min(images, op.batch - image), channels_last.get());
      }
      const int64_t first = image * out_pixels;
      const Tiling tiling(divide_up(pixels, kMicroRows), divide_up(blocking.pixels, kMicroRows), threads);
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < tiling.tiles; ++t) {
        const int64_t begin = first + tiling.begin(t) * kMicroRows;
        const int64_t end = first + std::min(tiling.begin(t + 1) * kMicroRows, pixels);
        tile.run(input, image, begin, end);
        const acc_t* sums = tile.sums();
        int64_t pixel_distance = tile.columns(), distance = tile.columns();
        if constexpr (!kChannelsLast) {
          pixel_distance = 1;
          distance = end - begin;
          transpose(tile.sums(), tile.columns(), by_channel.get(), distance, end - begin, op.out_channels);
          sums = by_channel.get();
        }
        PixelCursor at(begin, op.out_height, op.out_width);
        for (int64_t p = begin; p < end;) {
          const int64_t columns = std::min(op.out_width - at.column, end - p);
          store(at.image, at.row, at.column, columns, sums + (p - begin) * pixel_distance, distance);
          at.advance(columns);
          p += columns;
        }
      }
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEFORM_CONV2D_H
