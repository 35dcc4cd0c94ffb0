// Deformable convolution, backward: gradients of input, offset, weight, bias and mask, in one pass without a column
// buffer.  Symbols as in deform_conv2d.h; `grad` is the gradient of the output, `column` what a tap samples at a pixel,
// times the mask.
//
//   grad_column[c, tap, p] = sum over o of weight[o, c, tap] * grad[o, p]
//   grad_weight[o, c, tap] = sum over p of grad[o, p] * column[c, tap, p]
//   grad_mask[tap, p]      = sum over c of grad_column * bilinear(input[c], y, x)
//   grad_offset[tap, p]    = sum over c of grad_column * mask * its derivatives by y and x
//   grad_input[c]         += grad_column * mask, shared among the four corners
//   grad_bias[o]           = sum over p of grad[o, p]
//
// The channels are cut into slabs, of as many as fill a panel (gemm.h), that one thread does at a time: what is added
// to the gradients of its channels is added by it alone, in the order of the pixels.  It holds its part of an image and
// of the image's gradient with neighbouring channels and a border of zeros, and works in tiles of pixels: a matrix
// product makes the tile's grad_column, which is scattered while the tile is sampled again, and a second one adds the
// samples times grad to its part of grad_weight.  Where a group of the weight has fewer channels than a panel (and in a
// depthwise convolution) both products are vectors instead, with a channel in each lane.
//
// What sums over channels, grad_offset and grad_mask, each slab has for itself.  They are added up, slab by slab, after
// a phase: the most pixels for which all that is kept.  Where there are few slabs several images are done at a time;
// each has its own sum of grad_weight.  How the work is cut depends on the shape alone, so every sum has one order: the
// result is the same, to the bit, for any number of threads.
#ifndef INDUCTOR_VISION_DEFORM_CONV2D_BACKWARD_H
#define INDUCTOR_VISION_DEFORM_CONV2D_BACKWARD_H

#include "deform_conv2d.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// What is computed; bits of a number.
enum DeformGradient : int {
  kGradInput = 1,
  kGradOffset = 2,
  kGradWeight = 4,
  kGradBias = 8,
  kGradMask = 16,
};

// The tensors beside those of the forward pass; those that are not computed are not looked at.  The gradient of the
// input has neighbouring channels or neighbouring columns.
template <typename scalar_t>
struct DeformGradients {
  View4d<scalar_t> output;
  View4d<scalar_t> weight;  // the weight itself, [O, Cg, kH, kW]
  Output4d<scalar_t> input, offset, grad_weight;
  scalar_t* bias;
  Output4d<scalar_t> mask;
};

// Sizes that are tuned; see lowering/deform_conv2d.py.
struct DeformBackwardBlocking {
  int64_t pixels;       // in a tile, at most; no more than kMaxDepth
  int64_t phase_bytes;  // of what all slabs share, and of their sums over channels, unless a tile needs more
  int64_t image_bytes;  // of the images done at a time and their gradients, unless one needs more
};

// Channels that one thread does at a time: of one offset group, and of one group of the weight unless both matrix
// products are vectors.
struct DeformSlab {
  int64_t begin, count;
  int64_t group, offset_group;
};

// One channel slab of an image with a border of zeros, so that all four corners of a point in the image exist: two rows
// above, one below and a column that ends one row and begins the next.
struct PaddedSlab {
  int64_t height, width;

  int64_t row_distance() const {
    return width + 1;
  }
  // Pixels.
  int64_t size() const {
    return (height + 3) * row_distance() + 1;
  }
  int64_t index(int64_t row, int64_t column) const {
    return (row + 2) * row_distance() + column + 1;
  }
};

// Where a tap samples: the first of its four corners, as an element of a slab, and how far the point is from it.
// Points outside the image are in the border, with four corners there.
template <typename acc_t>
struct DeformPoint {
  int64_t corner;
  acc_t y, x;
  acc_t mask;
  bool inside;  // not so at exactly -1, where the sample is zero and its derivative is not
};

template <DeformKernel kKernel, int kWanted, typename scalar_t>
class DeformBackward {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();
  static constexpr int64_t kSlab = kPanel<acc_t>;
  static constexpr int kVec = static_cast<int>(kSlab / kLanes);
  static constexpr bool kGemm = kKernel == DeformKernel::gemm;
  static constexpr bool wanted(int gradient) {
    return (kWanted & gradient) != 0;
  }
  // Sums over channels: of the gradient of the mask, then of the offset's y and x.
  static constexpr int64_t kSums = (kWanted & kGradMask ? 1 : 0) + (kWanted & kGradOffset ? 2 : 0);
  static constexpr bool kGradColumn = (kWanted & kGradInput) != 0 || kSums > 0;
  static constexpr bool kReadsImage = (kWanted & kGradWeight) != 0 || kSums > 0;
  static constexpr bool kSamples = kGradColumn || kReadsImage;

  DeformBackward(
      const DeformConv2d<scalar_t>& op, const DeformGradients<scalar_t>& gradients,
      const DeformBackwardBlocking& blocking)
      : op_(op),
        gradients_(gradients),
        threads_(omp_get_max_threads()),
        slabs_(list_slabs(op)),
        padded_{op.height, op.width},
        outputs_(op.out_channels / op.groups),
        rows_(kGemm ? round_up(outputs_, kRowStep) : outputs_),
        columns_(op.taps() * kSlab),
        images_(images_at_a_time(op, blocking, static_cast<int64_t>(slabs_.size()))),
        chunk_(divide_up(op.batch, images_)),
        tile_(std::min(tile_limit(blocking), round_up(op.out_height * op.out_width, kMicroRows))),
        tiles_(divide_up(op.out_height * op.out_width, tile_)),
        phase_(tiles_in_phase(blocking)),
        weights_(slab_count() * weight_size()),
        grad_weights_(wanted(kGradWeight) ? images_ * slab_count() * grad_weight_size() : 0),
        grad_bias_(wanted(kGradBias) ? images_ * op.out_channels : 0),
        input_slabs_(kReadsImage ? images_ * slab_count() * slab_size() : 0),
        grad_slabs_(wanted(kGradInput) ? images_ * slab_count() * slab_size() : 0),
        grads_(images_ * phase_ * grad_tile_size()),
        points_(kSamples ? images_ * op.offset_groups * phase_pixels() * op.taps() : 0),
        sums_(images_ * slab_count() * phase_pixels() * op.taps() * kSums),
        buffers_(threads_ * buffer_size()) {
  }

  void run() {
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for schedule(static) nowait
      for (int64_t s = 0; s < slab_count(); ++s) {
        pack_weight(s);
      }
      begin_sums();
      for (int64_t round = 0; round < chunk_; ++round) {
        for (int64_t first = 0; first < tiles_; first += phase_) {
          const int64_t last = std::min(first + phase_, tiles_);
#pragma omp for schedule(dynamic)
          for (int64_t i = 0; i < images_ * (last - first); ++i) {
            const int64_t m = i % images_, t = i / images_;
            if (exists(m, round)) {
              load_grad(m, image(m, round), first + t, t);
              if constexpr (kSamples) {
                for (int64_t g = 0; g < op_.offset_groups; ++g) {
                  locate(m, image(m, round), g, first + t, t);
                }
              }
            }
          }
#pragma omp for schedule(dynamic)
          for (int64_t i = 0; i < images_ * (work_slabs() + 1); ++i) {
            const int64_t m = i % images_, s = i / images_;
            if (!exists(m, round)) {
              continue;
            }
            if (s < work_slabs()) {
              run_slab(m, s, image(m, round), first, last);
            } else {
              add_bias(m, first, last);
            }
          }
          if constexpr (kSums > 0) {  // while others go on to the next phase, whose sums wait for all to be there
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < images_ * op_.offset_groups * (last - first); ++i) {
              const int64_t m = i % images_, g = i / images_ % op_.offset_groups, t = i / images_ / op_.offset_groups;
              if (exists(m, round)) {
                store_sums(m, image(m, round), g, first + t, t);
              }
            }
          }
        }
      }
      store_weight_and_bias();
    }
  }

 private:
  // ---- how the work is cut

  static std::vector<DeformSlab> list_slabs(const DeformConv2d<scalar_t>& op) {
    const int64_t group = op.channels / op.groups, offset_group = op.channels / op.offset_groups;
    std::vector<DeformSlab> slabs;
    for (int64_t c = 0; c < op.channels;) {
      int64_t end = std::min(c + kSlab, (c / offset_group + 1) * offset_group);
      if (kGemm) {
        end = std::min(end, (c / group + 1) * group);
      }
      slabs.push_back({c, end - c, c / group, c / offset_group});
      c = end;
    }
    return slabs;
  }
  // So many that there is work for many threads, and no more than memory allows.
  static int64_t images_at_a_time(
      const DeformConv2d<scalar_t>& op, const DeformBackwardBlocking& blocking, int64_t slabs) {
    constexpr int64_t kEnough = 32;  // slabs
    const int64_t bytes = 2 * slabs * PaddedSlab{op.height, op.width}.size() * kCacheLine;
    const int64_t images = std::min(divide_up(kEnough, slabs), blocking.image_bytes / bytes);
    const int64_t rounds = divide_up(op.batch, std::max<int64_t>(images, 1));
    return op.batch == 0 ? 1 : divide_up(op.batch, rounds);
  }
  // Whole micro-tiles: a row of grad is a row of A in one of the matrix products, of columns in the other.
  static int64_t tile_limit(const DeformBackwardBlocking& blocking) {
    return std::clamp<int64_t>(round_down(blocking.pixels, kMicroRows), kMicroRows, round_down(kMaxDepth, kMicroRows));
  }
  int64_t tiles_in_phase(const DeformBackwardBlocking& blocking) const {
    const int64_t bytes = static_cast<int64_t>(sizeof(acc_t)) * grad_tile_size() +
                          static_cast<int64_t>(sizeof(DeformPoint<acc_t>)) * op_.offset_groups * tile_ * op_.taps() +
                          static_cast<int64_t>(sizeof(acc_t)) * slab_count() * tile_ * op_.taps() * kSums;
    return std::clamp<int64_t>(blocking.phase_bytes / (images_ * bytes), 1, tiles_);
  }
  int64_t slab_count() const {
    return static_cast<int64_t>(slabs_.size());
  }
  int64_t work_slabs() const {
    return kSamples ? slab_count() : 0;
  }
  int64_t phase_pixels() const {
    return phase_ * tile_;
  }
  // The image that is done in a round, of the m-th part of the batch.
  int64_t image(int64_t m, int64_t round) const {
    return m * chunk_ + round;
  }
  bool exists(int64_t m, int64_t round) const {
    return image(m, round) < op_.batch;
  }
  int64_t pixel(int64_t tile) const {
    return std::min(tile * tile_, op_.out_height * op_.out_width);
  }

  // ---- sizes, in elements

  int64_t weight_size() const {
    return outputs_ * columns_;
  }
  int64_t grad_weight_size() const {
    return rows_ * columns_;
  }
  int64_t slab_size() const {
    return padded_.size() * kSlab;
  }
  int64_t grad_tile_size() const {
    return op_.groups * rows_ * kRowDistance;
  }
  int64_t buffer_size() const {
    const int64_t columns = tile_ * columns_;
    return kGemm ? (kGradColumn ? columns : 0) + (wanted(kGradWeight) ? columns : 0) : tile_ * outputs_ * kSlab;
  }

  // ---- places

  acc_t* input_slab(int64_t m, int64_t s) const {
    return input_slabs_.get() + (m * slab_count() + s) * slab_size();
  }
  acc_t* grad_slab(int64_t m, int64_t s) const {
    return grad_slabs_.get() + (m * slab_count() + s) * slab_size();
  }
  acc_t* grad_weight(int64_t m, int64_t s) const {
    return grad_weights_.get() + (m * slab_count() + s) * grad_weight_size();
  }
  // grad of the t-th tile of the phase: [group][output, padded][kRowDistance], a pixel a column.
  acc_t* grad_tile(int64_t m, int64_t t) const {
    return grads_.get() + (m * phase_ + t) * grad_tile_size();
  }
  // [pixel][tap]
  DeformPoint<acc_t>* points(int64_t m, int64_t g, int64_t t) const {
    return points_.get() + ((m * op_.offset_groups + g) * phase_pixels() + t * tile_) * op_.taps();
  }
  // [pixel][tap][kSums]
  acc_t* sums(int64_t m, int64_t s, int64_t t) const {
    return sums_.get() + ((m * slab_count() + s) * phase_pixels() + t * tile_) * op_.taps() * kSums;
  }

  // ---- weight and bias

  // weights_[slab][tap][output][lane]; lanes without a channel are zero.
  void pack_weight(int64_t s) {
    const DeformSlab& slab = slabs_[s];
    const View4d<scalar_t>& weight = gradients_.weight;
    const int64_t group_channels = op_.channels / op_.groups;
    acc_t* packed = weights_.get() + s * weight_size();
    std::fill_n(packed, weight_size(), acc_t(0));
    for (int64_t j = 0; j < outputs_; ++j) {
      for (int64_t lane = 0; lane < slab.count; ++lane) {
        const int64_t c = slab.begin + lane, o = c / group_channels * outputs_ + j;
        const scalar_t* from = weight.data + (o * weight.image + c % group_channels * weight.channel);
        for (int64_t tap = 0; tap < op_.taps(); ++tap) {
          const int64_t at = tap / op_.kernel_width * weight.row + tap % op_.kernel_width * weight.column;
          packed[(tap * outputs_ + j) * kSlab + lane] = static_cast<acc_t>(from[at]);
        }
      }
    }
  }

  void begin_sums() {
    if constexpr (wanted(kGradWeight)) {
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < images_ * slab_count(); ++i) {
        std::fill_n(grad_weights_.get() + i * grad_weight_size(), grad_weight_size(), acc_t(0));
      }
    }
#pragma omp for schedule(static)
    for (int64_t m = 0; m < images_; ++m) {
      if constexpr (wanted(kGradBias)) {
        std::fill_n(grad_bias_.get() + m * op_.out_channels, op_.out_channels, acc_t(0));
      }
      if (rows_ > outputs_) {  // what pads a group is multiplied with the others, and ignored
        std::fill_n(grad_tile(m, 0), phase_ * grad_tile_size(), acc_t(0));
      }
    }
  }

  void add_bias(int64_t m, int64_t first, int64_t last) {
    if constexpr (wanted(kGradBias)) {
      for (int64_t o = 0; o < op_.out_channels; ++o) {
        for (int64_t t = 0; t < last - first; ++t) {  // a sum for each, so that it does not depend on the phases
          Vec total(0);
          const acc_t* row = grad_tile(m, t) + (o / outputs_ * rows_ + o % outputs_) * kRowDistance;
          const int64_t count = pixel(first + t + 1) - pixel(first + t);
          for (int64_t p = 0; p < count; p += kLanes) {
            total = total + load_vector(row + p, std::min(kLanes, count - p));
          }
          grad_bias_[m * op_.out_channels + o] += sum_of_lanes(total);
        }
      }
    }
  }

  void store_weight_and_bias() {
    if constexpr (wanted(kGradWeight)) {
      const int64_t group_channels = op_.channels / op_.groups;
      const int64_t output_distance = kGemm ? columns_ : kSlab, tap_distance = kGemm ? kSlab : outputs_ * kSlab;
#pragma omp for schedule(static) nowait
      for (int64_t s = 0; s < slab_count(); ++s) {
        acc_t* total = grad_weight(0, s);
        for (int64_t m = 1; m < images_; ++m) {
          add_to(total, grad_weight(m, s), grad_weight_size());
        }
        for (int64_t j = 0; j < outputs_; ++j) {
          for (int64_t lane = 0; lane < slabs_[s].count; ++lane) {
            const int64_t c = slabs_[s].begin + lane, o = c / group_channels * outputs_ + j;
            for (int64_t tap = 0; tap < op_.taps(); ++tap) {
              const acc_t value = total[j * output_distance + tap * tap_distance + lane];
              *gradients_.grad_weight.at(o, c % group_channels, tap / op_.kernel_width, tap % op_.kernel_width) =
                  static_cast<scalar_t>(value);
            }
          }
        }
      }
    }
    if constexpr (wanted(kGradBias)) {
#pragma omp for schedule(static) nowait
      for (int64_t o = 0; o < op_.out_channels; ++o) {
        acc_t total = 0;
        for (int64_t m = 0; m < images_; ++m) {
          total += grad_bias_[m * op_.out_channels + o];
        }
        gradients_.bias[o] = static_cast<scalar_t>(total);
      }
    }
  }

  // ---- what all slabs share

  // f(p, count, row, column) for the runs of output pixels [begin, end) that are `count` neighbours at equal distances
  // in a tensor; p counts from `begin`.
  template <typename F>
  void for_each_run(const View4d<scalar_t>& view, int64_t begin, int64_t end, const F& f) const {
    if (view.row == op_.out_width * view.column) {  // rows follow each other
      f(0, end - begin, begin / op_.out_width, begin % op_.out_width);
      return;
    }
    PixelCursor at(begin, op_.out_height, op_.out_width);
    for (int64_t p = begin; p < end;) {
      const int64_t count = std::min(op_.out_width - at.column, end - p);
      f(p - begin, count, at.row, at.column);
      at.advance(count);
      p += count;
    }
  }

  void load_grad(int64_t m, int64_t b, int64_t tile, int64_t t) const {
    const View4d<scalar_t>& grad = gradients_.output;
    for_each_run(grad, pixel(tile), pixel(tile + 1), [&](int64_t p, int64_t count, int64_t row, int64_t column) {
      const int64_t parts = rows_ > outputs_ ? op_.groups : 1, outputs = op_.out_channels / parts;
      for (int64_t i = 0; i < parts; ++i) {
        const scalar_t* from = grad.at(b, row, column) + i * outputs * grad.channel;
        acc_t* to = grad_tile(m, t) + i * rows_ * kRowDistance + p;
        load_block(from, grad.channel, grad.column, to, kRowDistance, outputs, count);
      }
    });
  }

  void load_plane(
      const View4d<scalar_t>& view, int64_t b, int64_t channel, int64_t begin, int64_t end, acc_t* to) const {
    for_each_run(view, begin, end, [&](int64_t p, int64_t count, int64_t row, int64_t column) {
      load_block(view.at(b, row, column) + channel * view.channel, 0, view.column, to + p, 0, 1, count);
    });
  }

  // The points that the taps of an offset group sample in a tile.
  //
  // A point is in the image where -1 < y < H and -1 < x < W.  NaN fails that test, and it is made before the conversion
  // to an integer: no offset can lead out of bounds.
  void locate(int64_t m, int64_t b, int64_t g, int64_t tile, int64_t t) const {
    using index_t = ::at::vec::int_same_size_t<acc_t>;
    const int64_t begin = pixel(tile), end = pixel(tile + 1);
    alignas(kCacheLine) acc_t base_y[kMaxDepth], base_x[kMaxDepth], y[kMaxDepth], x[kMaxDepth], mask[kMaxDepth];
    PixelCursor at(begin, op_.out_height, op_.out_width);
    for (int64_t p = 0; p < end - begin; ++p, at.advance(1)) {
      base_y[p] = static_cast<acc_t>(at.row * op_.stride_height - op_.padding_height);
      base_x[p] = static_cast<acc_t>(at.column * op_.stride_width - op_.padding_width);
    }
    std::fill_n(mask, end - begin, acc_t(1));
    DeformPoint<acc_t>* const points = this->points(m, g, t);
    for (int64_t tap = 0; tap < op_.taps(); ++tap) {
      const int64_t channel = g * op_.taps() + tap;
      load_plane(op_.offset, b, 2 * channel, begin, end, y);
      load_plane(op_.offset, b, 2 * channel + 1, begin, end, x);
      if (op_.mask.data != nullptr) {
        load_plane(op_.mask, b, channel, begin, end, mask);
      }
      const Vec tap_y(static_cast<acc_t>(tap / op_.kernel_width * op_.dilation_height));
      const Vec tap_x(static_cast<acc_t>(tap % op_.kernel_width * op_.dilation_width));
      for (int64_t first = 0; first < end - begin; first += kLanes) {
        const int64_t count = std::min(kLanes, end - begin - first);
        const Vec at_y = load_vector(base_y + first, count) + tap_y + load_vector(y + first, count);
        const Vec at_x = load_vector(base_x + first, count) + tap_x + load_vector(x + first, count);
        const Vec lowest(-1), height(static_cast<acc_t>(op_.height)), width(static_cast<acc_t>(op_.width));
        const Vec near = (at_y >= lowest) & (at_y < height) & (at_x >= lowest) & (at_x < width);
        const Vec zero(0), y0 = at_y.floor(), x0 = at_x.floor();
        alignas(kCacheLine) acc_t down[kLanes], right[kLanes];
        alignas(kCacheLine) index_t rows[kLanes], columns[kLanes];
        Vec::blendv(zero, at_y - y0, near).store(down);
        Vec::blendv(zero, at_x - x0, near).store(right);
        ::at::vec::convert_to_int_of_same_size(Vec::blendv(Vec(-2), y0, near)).store(rows);
        ::at::vec::convert_to_int_of_same_size(Vec::blendv(lowest, x0, near)).store(columns);
        for (int64_t i = 0; i < count; ++i) {
          const bool on_border = (rows[i] == -1 && down[i] == 0) || (columns[i] == -1 && right[i] == 0);
          points[(first + i) * op_.taps() + tap] = {
              padded_.index(rows[i], columns[i]) * kSlab, down[i], right[i], mask[first + i], !on_border};
        }
      }
    }
  }

  void store_sums(int64_t m, int64_t b, int64_t g, int64_t tile, int64_t t) const {
    const int64_t begin = pixel(tile), count = (pixel(tile + 1) - begin) * op_.taps() * kSums;
    int64_t s = 0;
    while (slabs_[s].offset_group != g) {
      ++s;
    }
    acc_t* total = sums(m, s, t);
    for (++s; s < slab_count() && slabs_[s].offset_group == g; ++s) {
      add_to(total, sums(m, s, t), count);
    }
    for (int64_t tap = 0; tap < op_.taps(); ++tap) {
      const int64_t channel = g * op_.taps() + tap;
      PixelCursor at(begin, op_.out_height, op_.out_width);
      for (const acc_t* sum = total + tap * kSums; sum < total + count; sum += op_.taps() * kSums, at.advance(1)) {
        const acc_t* of_offset = sum;
        if constexpr (wanted(kGradMask)) {
          *gradients_.mask.at(b, channel, at.row, at.column) = static_cast<scalar_t>(*of_offset++);
        }
        if constexpr (wanted(kGradOffset)) {
          *gradients_.offset.at(b, 2 * channel, at.row, at.column) = static_cast<scalar_t>(of_offset[0]);
          *gradients_.offset.at(b, 2 * channel + 1, at.row, at.column) = static_cast<scalar_t>(of_offset[1]);
        }
      }
    }
  }

  // ---- a slab

  void run_slab(int64_t m, int64_t s, int64_t b, int64_t first, int64_t last) const {
    if (first == 0) {
      begin_slab(m, s, b);
    }
    for (int64_t t = 0; t < last - first; ++t) {
      const int64_t count = pixel(first + t + 1) - pixel(first + t);
      if constexpr (kGemm) {
        run_gemm(m, s, t, count);
      } else {
        run_vectors(m, s, t, count);
      }
    }
    if (last == tiles_) {
      end_slab(m, s, b);
    }
  }

  void begin_slab(int64_t m, int64_t s, int64_t b) const {
    const DeformSlab& slab = slabs_[s];
    if constexpr (wanted(kGradInput)) {
      std::fill_n(grad_slab(m, s), slab_size(), acc_t(0));
    }
    if constexpr (kReadsImage) {
      acc_t* to = input_slab(m, s);
      if (slab.count < kSlab) {
        std::fill_n(to, slab_size(), acc_t(0));
      }
      const int64_t row = padded_.row_distance() * kSlab;
      std::fill_n(to, 2 * row, acc_t(0));
      for (int64_t y = 0; y <= op_.height; ++y) {
        std::fill_n(to + padded_.index(y, -1) * kSlab, kSlab, acc_t(0));
      }
      std::fill_n(to + padded_.index(op_.height, 0) * kSlab, row, acc_t(0));
      for (int64_t y = 0; y < op_.height; ++y) {
        const View4d<scalar_t>& input = op_.input;
        const scalar_t* from = input.at(b, y, 0) + slab.begin * input.channel;
        load_block(from, input.column, input.channel, to + padded_.index(y, 0) * kSlab, kSlab, op_.width, slab.count);
      }
    }
  }

  void end_slab(int64_t m, int64_t s, int64_t b) const {
    if constexpr (wanted(kGradInput)) {
      const DeformSlab& slab = slabs_[s];
      for (int64_t y = 0; y < op_.height; ++y) {
        const acc_t* from = grad_slab(m, s) + padded_.index(y, 0) * kSlab;
        store_pixels(from, kSlab, gradients_.input, b, slab.begin, y, 0, op_.width, slab.count);
      }
    }
  }

  void run_gemm(int64_t m, int64_t s, int64_t t, int64_t count) const {
    const DeformSlab& slab = slabs_[s];
    acc_t* grad_columns = buffers_.get() + omp_get_thread_num() * buffer_size();  // [pixel][tap][lane]
    acc_t* columns = grad_columns + (kGradColumn ? tile_ * columns_ : 0);         // [tap][pixel][lane]
    const acc_t* grad = grad_tile(m, t) + slab.group * rows_ * kRowDistance;
    if constexpr (kGradColumn) {
      const int64_t rows = round_up(count, kRowStep);
      std::fill_n(grad_columns, rows * columns_, acc_t(0));
      for (int64_t o = 0; o < outputs_; o += kMaxDepth) {  // so that a block of the weight stays in cache
        const TransposedRows<acc_t> a{{grad + o * kRowDistance, 1, std::min(kMaxDepth, outputs_ - o), 0}};
        const Panels<acc_t> b{weights_.get() + s * weight_size() + o * kSlab, outputs_ * kSlab};
        gemm(a, b, op_.taps(), Sums<acc_t>(grad_columns, columns_), rows);
      }
      for (int64_t i = 0; slab.count < kSlab && i < count * op_.taps(); ++i) {  // NaN, if it is 0 * infinity
        std::fill(grad_columns + i * kSlab + slab.count, grad_columns + (i + 1) * kSlab, acc_t(0));
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      sample_pixel(
          m, s, t, p,
          [&](int64_t tap, int u) { return Vec::loadu(grad_columns + (p * op_.taps() + tap) * kSlab + u * kLanes); },
          [&](int64_t tap, int u, const Vec& column) {
            column.store(columns + (tap * tile_ + p) * kSlab + u * kLanes);
          });
    }
    if constexpr (wanted(kGradWeight)) {
      const Rows<acc_t> a{grad, 1, count, 0};
      const Panels<acc_t> b{columns, tile_ * kSlab};
      gemm(a, b, op_.taps(), Sums<acc_t>(grad_weight(m, s), columns_), rows_);
    }
  }

  // Every lane has outputs of its own.
  void run_vectors(int64_t m, int64_t s, int64_t t, int64_t count) const {
    acc_t* grads = buffers_.get() + omp_get_thread_num() * buffer_size();  // [pixel][output][lane]
    spread_grad(m, s, t, count, grads);
    const acc_t* weights = weights_.get() + s * weight_size();
    acc_t* grad_weights = wanted(kGradWeight) ? grad_weight(m, s) : nullptr;
    for (int64_t p = 0; p < count; ++p) {
      const acc_t* grad = grads + p * outputs_ * kSlab;
      sample_pixel(
          m, s, t, p,
          [&](int64_t tap, int u) {
            Vec total(0);
            for (int64_t j = 0; j < outputs_; ++j) {
              const Vec weight = Vec::loadu(weights + (tap * outputs_ + j) * kSlab + u * kLanes);
              total = ::at::vec::fmadd(weight, Vec::loadu(grad + j * kSlab + u * kLanes), total);
            }
            return total;
          },
          [&](int64_t tap, int u, const Vec& column) {
            for (int64_t j = 0; j < outputs_; ++j) {
              acc_t* sum = grad_weights + (tap * outputs_ + j) * kSlab + u * kLanes;
              ::at::vec::fmadd(column, Vec::loadu(grad + j * kSlab + u * kLanes), Vec::loadu(sum)).store(sum);
            }
          });
    }
  }

  // grads[p][j][lane]: of the j-th output of the lane's group.
  void spread_grad(int64_t m, int64_t s, int64_t t, int64_t count, acc_t* grads) const {
    const DeformSlab& slab = slabs_[s];
    const int64_t group_channels = op_.channels / op_.groups, distance = outputs_ * kSlab;
    if (slab.count < kSlab) {
      std::fill_n(grads, count * distance, acc_t(0));
    }
    for (int64_t j = 0; j < outputs_; ++j) {
      const auto row = [&](int64_t lane) {
        return grad_tile(m, t) + ((slab.begin + lane) / group_channels * rows_ + j) * kRowDistance;
      };
      if (group_channels == 1) {  // groups follow each other
        transpose(row(0), rows_ * kRowDistance, grads + j * kSlab, distance, slab.count, count);
        continue;
      }
      for (int64_t lane = 0; lane < slab.count; ++lane) {
        const acc_t* from = row(lane);
        for (int64_t p = 0; p < count; ++p) {
          grads[p * distance + j * kSlab + lane] = from[p];
        }
      }
    }
  }

  static acc_t sum_of_lanes(const Vec& value) {
    return ::at::vec::vec_reduce_all<acc_t>([](const Vec& a, const Vec& b) { return a + b; }, value);
  }

  // All taps at one pixel.  grad_column(tap, u) is the u-th vector of the slab's grad_column; use_column(tap, u, value)
  // takes that of what is sampled.
  template <typename GradColumn, typename UseColumn>
  void sample_pixel(
      int64_t m, int64_t s, int64_t t, int64_t p, const GradColumn& grad_column, const UseColumn& use_column) const {
    const DeformPoint<acc_t>* point = points(m, slabs_[s].offset_group, t) + p * op_.taps();
    const acc_t* image = input_slab(m, s);
    acc_t* grad_image = grad_slab(m, s);
    acc_t* sum = sums(m, s, t) + p * op_.taps() * kSums;
    const int64_t row = padded_.row_distance() * kSlab;
    for (int64_t tap = 0; tap < op_.taps(); ++tap, ++point) {
      const Vec down(point->y), right(point->x), mask(point->mask);
      const Vec up = Vec(1) - down, left = Vec(1) - right;
      Vec by_mask(0), by_y(0), by_x(0);
      ForcedUnroll<kVec>{}([&](auto u) {
        Vec gradient(0);
        if constexpr (kGradColumn) {
          gradient = grad_column(tap, u);
        }
        if constexpr (kReadsImage) {
          const acc_t* corner = image + point->corner + u * kLanes;
          const Vec v00 = Vec::loadu(corner), v01 = Vec::loadu(corner + kSlab);
          const Vec v10 = Vec::loadu(corner + row), v11 = Vec::loadu(corner + row + kSlab);
          const Vec upper = ::at::vec::fmadd(v01, right, v00 * left);
          const Vec lower = ::at::vec::fmadd(v11, right, v10 * left);
          Vec value = ::at::vec::fmadd(lower, down, upper * up);
          if (!point->inside) {
            value = Vec(0);
          }
          if constexpr (wanted(kGradWeight)) {
            use_column(tap, u, value * mask);
          }
          if constexpr (wanted(kGradMask)) {
            by_mask = ::at::vec::fmadd(gradient, value, by_mask);
          }
          if constexpr (wanted(kGradOffset)) {
            const Vec slope_x = ::at::vec::fmadd(v11 - v10, down, (v01 - v00) * up);
            by_y = ::at::vec::fmadd(gradient, lower - upper, by_y);
            by_x = ::at::vec::fmadd(gradient, slope_x, by_x);
          }
        }
        if constexpr (wanted(kGradInput)) {
          acc_t* corner = grad_image + point->corner + u * kLanes;
          const auto add_share = [](acc_t* to, const Vec& part, const Vec& share) {
            ::at::vec::fmadd(part, share, Vec::loadu(to)).store(to);
          };
          const Vec scaled = gradient * mask, upper = scaled * up;
          add_share(corner, upper, left);
          if (point->x != 0) {  // a corner that has no share gets nothing, not even 0 * NaN
            add_share(corner + kSlab, upper, right);
          }
          if (point->y != 0) {
            const Vec lower = scaled * down;
            add_share(corner + row, lower, left);
            if (point->x != 0) {
              add_share(corner + row + kSlab, lower, right);
            }
          }
        }
      });
      if constexpr (wanted(kGradMask)) {
        *sum++ = sum_of_lanes(by_mask);
      }
      if constexpr (wanted(kGradOffset)) {
        *sum++ = sum_of_lanes(by_y) * point->mask;
        *sum++ = sum_of_lanes(by_x) * point->mask;
      }
    }
  }

  const DeformConv2d<scalar_t>& op_;
  const DeformGradients<scalar_t>& gradients_;
  const int threads_;
  const std::vector<DeformSlab> slabs_;
  const PaddedSlab padded_;
  const int64_t outputs_, rows_;  // of a group, and padded to what the matrix product wants
  const int64_t columns_;         // of a slab: taps, lanes
  const int64_t images_;          // done at a time
  const int64_t chunk_;           // images that each of them has in turn
  const int64_t tile_, tiles_;    // pixels in a tile, tiles of an image
  const int64_t phase_;           // tiles
  Scratch<acc_t> weights_, grad_weights_, grad_bias_, input_slabs_, grad_slabs_, grads_;
  Scratch<DeformPoint<acc_t>> points_;
  Scratch<acc_t> sums_, buffers_;
};

template <DeformKernel kKernel, int kWanted, typename scalar_t>
inline void deform_conv2d_backward(
    const DeformConv2d<scalar_t>& op, const DeformGradients<scalar_t>& gradients,
    const DeformBackwardBlocking& blocking) {
  DeformBackward<kKernel, kWanted, scalar_t>(op, gradients, blocking).run();
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_DEFORM_CONV2D_BACKWARD_H
