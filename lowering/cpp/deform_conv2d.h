// Deformable convolution, forward: sampling fused with the matrix product, no column buffer.
//
//   B, C, H, W     batch, channels, height, width of the input         Cg, Og   input, output channels of a weight
//   group O, Ho, Wo      channels, height, width of the output               tap      a position (i, j) in the kernel
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
#include <vector>

#include "base.h"
#include "gemm.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

template <typename scalar_t>
struct DeformConv2d {
  View4d<scalar_t> input;  // its channels or its columns are neighbours
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
  // An input that is not channels_last is transposed in whole images of at most so many, or one.
  int64_t transposed_bytes;
};

// The depth is cut into equal numbers of taps with all channels, or, if the channels of one tap are too many, into
// equal numbers of channels of one tap.
struct DeformBlocks {
  int64_t taps;
  int64_t channels;

  template <typename scalar_t>
  DeformBlocks(const DeformConv2d<scalar_t>& op, const DeformBlocking& blocking) : taps(1),
                                                                                   channels(op.channels) {
    const int64_t depth = std::clamp<int64_t>(round_down(blocking.depth, kPanel<float>), kPanel<float>, kMaxDepth);
    if (channels > depth) {
      channels = round_up(divide_up(channels, divide_up(channels, depth)), kPanel<float>);
    } else {
      taps = divide_up(op.taps(), divide_up(op.taps(), depth / channels));
    }
  }
};

// Where a tap samples kLanes pixels: four corners each, their weights, the mask.  A corner that is not in the image
// points to zeros, never to a value times zero: 0 * NaN is NaN.
template <typename scalar_t>
struct DeformSamples {
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int64_t kLanes = Vectorized<acc_t>::size();
  const scalar_t* corner[4][kLanes];
  alignas(kCacheLine) acc_t weight[4][kLanes];
  alignas(kCacheLine) acc_t mask[kLanes];
};

// Output pixels: their image, where their offsets and masks are, and the point that tap (0, 0) samples undisplaced.
template <typename scalar_t>
struct DeformPixels {
  // Where some number of each pixel is, and for each vector of pixels whether those are neighbours in memory.
  struct Places {
    Scratch<const scalar_t*> at;
    Scratch<bool> consecutive;
  };
  static constexpr int64_t kLanes = Vectorized<accumulate_t<scalar_t>>::size();
  Scratch<const scalar_t*> image;
  Places offset, mask;
  Scratch<accumulate_t<scalar_t>> y, x;
  Scratch<accumulate_t<scalar_t>> tap_y, tap_x;  // how far each tap is from the first

  DeformPixels(const DeformConv2d<scalar_t>& op, int64_t count)
      : image(count),
        offset{Scratch<const scalar_t*>(count), Scratch<bool>(divide_up(count, kLanes))},
        mask{Scratch<const scalar_t*>(count), Scratch<bool>(divide_up(count, kLanes))},
        y(count),
        x(count),
        tap_y(op.taps()),
        tap_x(op.taps()) {
    using acc_t = accumulate_t<scalar_t>;
    for (int64_t tap = 0; tap < op.taps(); ++tap) {
      tap_y[tap] = static_cast<acc_t>(tap / op.kernel_width * op.dilation_height);
      tap_x[tap] = static_cast<acc_t>(tap % op.kernel_width * op.dilation_width);
    }
  }
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
        columns(columns) {
  }
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
    DeformPixels<scalar_t>& pixels) {
  using acc_t = accumulate_t<scalar_t>;
  PixelCursor at(begin, op.out_height, op.out_width);
  for (int64_t p = 0; p < end - begin; ++p, at.advance(1)) {
    pixels.image[p] = input.data + (at.image - first_image) * input.image;
    pixels.offset.at[p] = op.offset.at(at.image, at.row, at.column);
    pixels.mask.at[p] = op.mask.data == nullptr ? nullptr : op.mask.at(at.image, at.row, at.column);
    pixels.y[p] = static_cast<acc_t>(at.row * op.stride_height - op.padding_height);
    pixels.x[p] = static_cast<acc_t>(at.column * op.stride_width - op.padding_width);
  }
  constexpr int64_t kLanes = DeformPixels<scalar_t>::kLanes;
  for (int64_t first = 0; first < end - begin; first += kLanes) {
    for (auto* places : {&pixels.offset, &pixels.mask}) {
      const scalar_t* const* of = places->at.get() + first;
      bool consecutive = first + kLanes <= end - begin && of[0] != nullptr;
      for (int64_t i = 1; consecutive && i < kLanes; ++i) {
        consecutive = of[i] == of[0] + i;
      }
      places->consecutive[first / kLanes] = consecutive;
    }
  }
}

// One number of each of the n <= kLanes pixels from `first` on, `at` elements behind their place.
template <typename scalar_t>
inline Vectorized<accumulate_t<scalar_t>> load_pixels(
    const typename DeformPixels<scalar_t>::Places& places, int64_t first, int64_t n, int64_t at) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kLanes = DeformPixels<scalar_t>::kLanes;
  const scalar_t* const* of = places.at.get() + first;
  if (places.consecutive[first / kLanes]) {
    // Few numbers are read of each plane at a time, and many planes in turn: too many streams for the hardware.
    __builtin_prefetch(of[0] + at + kLanes);
    return load_vector(of[0] + at);
  }
  alignas(kCacheLine) acc_t values[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    values[i] = static_cast<acc_t>(of[i][at]);
  }
  return Vectorized<acc_t>::loadu(values);
}

// Where one tap samples the n <= Vec::size() pixels from `first` on.
//
// A point is in the image where -1 < y < H and -1 < x < W.  NaN fails that test, and it is made before the conversion
// to an integer: no offset can lead out of bounds.
template <typename scalar_t>
inline void locate(
    const DeformConv2d<scalar_t>& op, const View4d<scalar_t>& input, const DeformPixels<scalar_t>& pixels,
    int64_t first, int64_t n, int64_t offset_group, int64_t tap, const scalar_t* zeros,
    DeformSamples<scalar_t>& samples) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  using index_t = ::at::vec::int_same_size_t<acc_t>;
  constexpr int64_t kLanes = Vec::size();
  const int64_t channel = offset_group * op.taps() + tap;
  const int64_t offset_at = 2 * channel * op.offset.channel;
  const Vec tap_y(pixels.tap_y[tap]), tap_x(pixels.tap_x[tap]);

  const Vec y = Vec::loadu(pixels.y.get() + first) + tap_y + load_pixels<scalar_t>(pixels.offset, first, n, offset_at);
  const Vec x = Vec::loadu(pixels.x.get() + first) + tap_x +
                load_pixels<scalar_t>(pixels.offset, first, n, offset_at + op.offset.channel);
  const Vec lowest(-1), height(static_cast<acc_t>(op.height)), width(static_cast<acc_t>(op.width));
  const Vec inside = (y > lowest) & (y < height) & (x > lowest) & (x < width);
  const Vec zero(0), one(1), outside(-2);
  const Vec y0 = y.floor(), x0 = x.floor();
  const Vec bottom = Vec::blendv(zero, y - y0, inside), right = Vec::blendv(zero, x - x0, inside);
  const Vec top = one - bottom, left = one - right;
  (top * left).store(samples.weight[0]);
  (top * right).store(samples.weight[1]);
  (bottom * left).store(samples.weight[2]);
  (bottom * right).store(samples.weight[3]);
  const Vec mask =
      op.mask.data == nullptr ? one : load_pixels<scalar_t>(pixels.mask, first, n, channel * op.mask.channel);
  mask.store(samples.mask);
  alignas(kCacheLine) index_t rows[kLanes], columns[kLanes];
  ::at::vec::convert_to_int_of_same_size(Vec::blendv(outside, y0, inside)).store(rows);
  ::at::vec::convert_to_int_of_same_size(Vec::blendv(outside, x0, inside)).store(columns);

  const uint64_t last_row = static_cast<uint64_t>(op.height - 1), last_column = static_cast<uint64_t>(op.width - 1);
  for (int64_t i = 0; i < n; ++i) {
    const scalar_t* image = pixels.image[first + i];
    const int64_t row = rows[i], column = columns[i];
    const int64_t corner = row * input.row + column * input.column;
    // One unsigned comparison tests both ends of a range; `outside` fails it for both rows and both columns.
    if (static_cast<uint64_t>(row) < last_row && static_cast<uint64_t>(column) < last_column) {
      samples.corner[0][i] = image + corner;
      samples.corner[1][i] = image + (corner + input.column);
      samples.corner[2][i] = image + (corner + input.row);
      samples.corner[3][i] = image + (corner + input.row + input.column);
    } else {
      const bool has_top = static_cast<uint64_t>(row) <= last_row;
      const bool has_bottom = static_cast<uint64_t>(row + 1) <= last_row;
      const bool has_left = static_cast<uint64_t>(column) <= last_column;
      const bool has_right = static_cast<uint64_t>(column + 1) <= last_column;
      samples.corner[0][i] = has_top && has_left ? image + corner : zeros;
      samples.corner[1][i] = has_top && has_right ? image + (corner + input.column) : zeros;
      samples.corner[2][i] = has_bottom && has_left ? image + (corner + input.row) : zeros;
      samples.corner[3][i] = has_bottom && has_right ? image + (corner + input.row + input.column) : zeros;
    }
  }
}

// A sample held in registers, to be taken at many channels.
template <typename scalar_t>
struct Interpolation {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  const scalar_t *corner0, *corner1, *corner2, *corner3;
  Vec weight0, weight1, weight2, weight3, mask;

  Interpolation(const DeformSamples<scalar_t>& s, int64_t i)
      : corner0(s.corner[0][i]),
        corner1(s.corner[1][i]),
        corner2(s.corner[2][i]),
        corner3(s.corner[3][i]),
        weight0(s.weight[0][i]),
        weight1(s.weight[1][i]),
        weight2(s.weight[2][i]),
        weight3(s.weight[3][i]),
        mask(s.mask[i]) {
  }

  // At `count` channels from c on.
  Vec at(int64_t c, int64_t count = Vec::size()) const {
    Vec value = weight0 * load_vector(corner0 + c, count);
    value = ::at::vec::fmadd(weight1, load_vector(corner1 + c, count), value);
    value = ::at::vec::fmadd(weight2, load_vector(corner2 + c, count), value);
    value = ::at::vec::fmadd(weight3, load_vector(corner3 + c, count), value);
    return value * mask;
  }
};

// out[c - begin] = sample i at channels [begin, end), in the type that the matrix product takes.
template <typename scalar_t, typename value_t>
inline void interpolate(const DeformSamples<scalar_t>& samples, int64_t i, int64_t begin, int64_t end, value_t* out) {
  constexpr int64_t kLanes = DeformSamples<scalar_t>::kLanes;
  const Interpolation<scalar_t> interpolation(samples, i);
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) {
    store_vector(interpolation.at(c), out + (c - begin));
  }
  if (c < end) {
    store_vector(interpolation.at(c, end - c), out + (c - begin), end - c);
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
  static constexpr int64_t kLanes = Vectorized<acc_t>::size();
  static constexpr bool kShared = kKernel == DeformKernel::shared;

  DeformTile(const DeformConv2d<scalar_t>& op, const weight_t* weight, const DeformBlocks& blocks, int64_t pixels)
      : op_(op),
        weight_(weight),
        blocks_(blocks),
        padded_(round_up(round_up(pixels, kMicroRows), kLanes)),
        pixels_(op, padded_),
        samples_(kKernel == DeformKernel::gemm ? 1 : padded_ / kLanes * op.taps()),
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
    list_pixels(op_, input, first_image, begin, end, pixels_);
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
          const Sums<acc_t> c(sums_.get() + g * group_columns(), columns());
          gemm(a, b, group_columns() / kPanel<acc_t>, c, rows);
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

  // depth[p][tap - t][channel - c].  A few pixels at a time for all taps, whose corners overlap and so stay in cache.
  void sample_block(const View4d<scalar_t>& input, int64_t rows, int64_t t, int64_t t_end, int64_t c, int64_t c_end) {
    const int64_t offset_channels = op_.channels / op_.offset_groups;
    for (int64_t first = 0; first < count_; first += kLanes) {
      const int64_t n = std::min(kLanes, count_ - first);
      for (int64_t tap = t; tap < t_end; ++tap) {
        for (int64_t g = c / offset_channels; g * offset_channels < c_end; ++g) {
          const int64_t from = std::max(c, g * offset_channels), to = std::min(c_end, (g + 1) * offset_channels);
          locate(op_, input, pixels_, first, n, g, tap, zeros_.get(), samples_[0]);
          weight_t* out = depth_.get() + first * kRowDistance + (tap - t) * (c_end - c) + (from - c);
          for (int64_t i = 0; i < n; ++i) {
            interpolate(samples_[0], i, from, to, out + i * kRowDistance);
          }
        }
      }
    }
    for (int64_t p = count_; p < rows; ++p) {  // multiplied with the others, and ignored
      std::fill_n(depth_.get() + p * kRowDistance, (t_end - t) * (c_end - c), weight_t(0));
    }
  }

  void run_depthwise(const View4d<scalar_t>& input) {
    const int64_t offset_channels = op_.channels / op_.offset_groups;
    begin_sums(count_, op_.channels, 0);
    for (int64_t g = 0; g < op_.offset_groups; ++g) {
      for (int64_t first = 0; first < count_; first += kLanes) {
        const int64_t n = std::min(kLanes, count_ - first);
        for (int64_t tap = 0; tap < op_.taps(); ++tap) {
          locate(op_, input, pixels_, first, n, g, tap, zeros_.get(), samples(tap, first));
        }
      }
      // All pixels for a few channels at a time: the corners of neighbours overlap, and so stay in cache.
      int64_t c = g * offset_channels;
      const int64_t end = c + offset_channels;
      for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
        depthwise_vectors<4>(c);
      }
      for (; c < end; c += kLanes) {
        depthwise_vectors<1>(c, std::min(kLanes, end - c));
      }
    }
  }

  // The samples that a tap takes around pixel p of the tile.
  DeformSamples<scalar_t>& samples(int64_t tap, int64_t p) const {
    return samples_[tap * (padded_ / kLanes) + p / kLanes];
  }

  // U vectors of channels from c on, or `count` channels, for all pixels; sums stay in registers.
  template <int U>
  void depthwise_vectors(int64_t c, int64_t count = kLanes) {
    using Vec = Vectorized<acc_t>;
    const bool part = U == 1 && count < kLanes;
    const auto load = [&](const acc_t* from) { return part ? load_vector(from, count) : load_vector(from); };
    for (int64_t p = 0; p < count_; ++p) {
      acc_t* sum = sums_.get() + p * op_.channels + c;
      auto total = generate<U>([&](int u) { return load(sum + u * kLanes); });
      for (int64_t tap = 0; tap < op_.taps(); ++tap) {
        const Interpolation<scalar_t> interpolation(samples(tap, p), p % kLanes);
        const acc_t* weight = weight_ + (kShared ? tap : tap * op_.channels + c);
        ForcedUnroll<U>{}([&](auto u) {
          const Vec w = kShared ? Vec(*weight) : load(weight + u * kLanes);
          const Vec value = part ? interpolation.at(c, count) : interpolation.at(c + u * kLanes);
          total[u] = ::at::vec::fmadd(w, value, total[u]);
        });
      }
      ForcedUnroll<U>{}([&](auto u) { store_vector(total[u], sum + u * kLanes, part ? count : kLanes); });
    }
  }

  const DeformConv2d<scalar_t>& op_;
  const weight_t* weight_;
  const DeformBlocks& blocks_;
  int64_t padded_;
  int64_t count_ = 0;
  DeformPixels<scalar_t> pixels_;
  Scratch<DeformSamples<scalar_t>> samples_;
  Scratch<weight_t> depth_;
  Scratch<scalar_t> zeros_;
  Scratch<acc_t> sums_;
};

// How the images of a batch are shared among threads.  An input that is not channels_last is transposed first: where
// the batch allows it each thread transposes images of its own, as many as fit its cache, and works on those alone; the
// images that remain, and images too large for that, are done one at a time by all threads together.
struct DeformSchedule {
  bool transposed;
  int64_t images;    // done at a time
  int64_t own;       // images, from the first on, that are done by one thread each
  int64_t distance;  // elements between two transposed pixels
  int64_t copies;    // of `images` transposed images

  template <typename scalar_t>
  DeformSchedule(const DeformConv2d<scalar_t>& op, int64_t transposed_bytes, int64_t threads)
      : transposed(op.channels > 1 && op.input.channel != 1),
        images(op.batch),
        own(0),
        distance(0),
        copies(0) {
    if (transposed) {
      // A cache line more than the channels need: pixels a power of two apart would share cache sets.
      distance = op.channels + kCacheLine / static_cast<int64_t>(sizeof(scalar_t));
      const int64_t fit = transposed_bytes / (op.height * op.width * distance * static_cast<int64_t>(sizeof(scalar_t)));
      images = std::clamp<int64_t>(op.batch / threads, 1, std::max<int64_t>(fit, 1));
      own = fit == 0 ? 0 : round_down(op.batch, images * threads);
      copies = own == 0 ? 1 : threads;
    }
  }
};

// kChannelsLast: of the output that `store` is for, see OutputBlock.
template <bool kChannelsLast, DeformKernel kKernel, typename scalar_t, typename weight_t, typename Store>
inline void deform_conv2d(
    const DeformConv2d<scalar_t>& op, const weight_t* weight, const DeformBlocking& blocking, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  if (op.pixels() == 0 || op.out_channels == 0) {
    return;
  }
  const DeformBlocks blocks(op, blocking);
  const int threads = omp_get_max_threads();
  const DeformSchedule schedule(op, blocking.transposed_bytes, threads);
  const int64_t copy_size = schedule.images * op.height * op.width * schedule.distance;
  const Scratch<scalar_t> copies(schedule.copies * copy_size);
  const auto channels_last = [&](int64_t copy) {
    const int64_t column = schedule.distance, row = op.width * column;
    return View4d<scalar_t>{copies.get() + copy * copy_size, op.height * row, 1, row, column};
  };
  constexpr int64_t kStrip = 128;  // pixels that a thread transposes at a time
  const auto images = [&](int64_t first, int64_t count) {
    const View4d<scalar_t>& in = op.input;
    const View4d<scalar_t> from{in.at(first, 0, 0), in.image, in.channel, in.row, in.column};
    return Images<scalar_t>{from, count, op.channels, op.height, op.width};
  };
  const int64_t out_pixels = op.out_height * op.out_width;
  // Tiles are cut at multiples of kMicroRows, so that only the last has rows that do not fill a micro-tile.
  const int64_t limit =
      std::min(divide_up(blocking.pixels, kMicroRows), divide_up(schedule.images * out_pixels, kMicroRows));

  // Allocated here, because no exception may leave the parallel region.
  std::vector<DeformTile<kKernel, scalar_t, weight_t>> tiles;
  const int64_t results = kChannelsLast ? 0 : round_up(limit * kMicroRows * op.out_channels, kPanel<acc_t>);
  const Scratch<acc_t> results_by_channel(threads * results);
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, weight, blocks, limit * kMicroRows);
  }

#pragma omp parallel num_threads(threads)
  {
    auto& tile = tiles[omp_get_thread_num()];
    acc_t* by_channel = results_by_channel.get() + omp_get_thread_num() * results;

    // Tile t of the `count` images from `first` on.
    const auto run_tile = [&](const View4d<scalar_t>& input, int64_t first, int64_t count, const Tiling& tiling,
                              int64_t t) {
      const int64_t origin = first * out_pixels;
      const int64_t begin = origin + tiling.begin(t) * kMicroRows;
      const int64_t end = origin + std::min(tiling.begin(t + 1) * kMicroRows, count * out_pixels);
      tile.run(input, schedule.transposed ? first : 0, begin, end);
      const acc_t* sums = tile.sums();
      int64_t pixel_distance = tile.columns(), distance = tile.columns();
      if constexpr (!kChannelsLast) {
        pixel_distance = 1;
        distance = end - begin;
        transpose(tile.sums(), tile.columns(), by_channel, distance, end - begin, op.out_channels);
        sums = by_channel;
      }
      PixelCursor at(begin, op.out_height, op.out_width);
      for (int64_t p = begin; p < end;) {
        const int64_t columns = std::min(op.out_width - at.column, end - p);
        const OutputBlock block{at.image, 0, op.out_channels, at.row, 1, at.column, columns};
        store(block, sums + (p - begin) * pixel_distance, distance);
        at.advance(columns);
        p += columns;
      }
    };

#pragma omp for schedule(dynamic) nowait
    for (int64_t group = 0; group < schedule.own / schedule.images; ++group) {
      const int64_t first = group * schedule.images;
      const View4d<scalar_t> input = channels_last(omp_get_thread_num());
      const ImageTransposition<scalar_t> transposition(images(first, schedule.images), input, kStrip);
      for (int64_t strip = 0; strip < transposition.strips(); ++strip) {
        transposition.transpose_strip(strip);
      }
      const Tiling tiling(divide_up(schedule.images * out_pixels, kMicroRows), limit, 1);
      for (int64_t t = 0; t < tiling.tiles; ++t) {
        run_tile(input, first, schedule.images, tiling, t);
      }
    }

    for (int64_t first = schedule.own; first < op.batch; first += schedule.images) {
      const int64_t count = std::min(schedule.images, op.batch - first);
      View4d<scalar_t> input = op.input;
      if (schedule.transposed) {
        input = channels_last(0);
        const ImageTransposition<scalar_t> transposition(images(first, count), input, kStrip);
#pragma omp barrier  // the copy may still be in use
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < transposition.strips(); ++strip) {
          transposition.transpose_strip(strip);
        }
      }
      const Tiling tiling(divide_up(count * out_pixels, kMicroRows), limit, threads);
#pragma omp for schedule(dynamic) nowait
      for (int64_t t = 0; t < tiling.tiles; ++t) {
        run_tile(input, first, count, tiling, t);
      }
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEFORM_CONV2D_H
