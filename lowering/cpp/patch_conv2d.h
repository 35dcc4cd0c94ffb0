// One filter bank over many small patches, each padded with zeros by itself; and the gradient of its input.
//
//   B, N         batch, patches of an image
//   C, H, W      channels, height, width of a patch
//   O, Ho, Wo    channels, height, width of its result
//   Cg, Og       channels of a group of the weight, in and out
//   tap          a position (i, j) in the kernel
//   pixel        a position in the result of a patch
//   group        kPatches patches that are done together
//
//   out[b, n, o, y, x] = bias[o] + sum over taps and c of weight[o, c, i, j] * input[b, n, c, sy, sx]
//   sy = y * stride - padding + i * dilation, sx likewise; terms whose (sy, sx) is not in the patch are none
//
// As a matrix product for each pixel: its rows are patches, of which all have the same taps in the padding at one
// pixel, so that these are left out and nothing is masked.  A group of patches is brought into cache with the numbers
// of the same place side by side (pixel, c, patch), which serves every memory layout and precision.  From there a row
// of the product is read wherever a tap looks: no column buffer.  The result of some channels is stored as soon as it
// is summed.
//
// The gradient of the input is the same sum with another list of taps for each pixel.
#ifndef INDUCTOR_VISION_PATCH_CONV2D_H
#define INDUCTOR_VISION_PATCH_CONV2D_H

#include <vector>

#include "axis.h"
#include "base.h"
#include "gemm.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// [B, N, channels, height, width] with any strides, in elements.
template <typename scalar_t>
struct PatchView {
  const scalar_t* data;
  int64_t image, patch, channel, row, column;
};

// What is convolved, whether patches or their gradients: sizes are those of what is read and of what is computed.
template <typename scalar_t>
struct PatchConv2d {
  PatchView<scalar_t> input;
  const scalar_t* bias;  // null: no bias
  int64_t batch, patches, channels, height, width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t groups;

  int64_t taps() const {
    return kernel_height * kernel_width;
  }
  int64_t out_pixels() const {
    return out_height * out_width;
  }
};

// How the results of patches lie in memory.
enum class PatchOrder {
  patches_first,   // [B, N, O, Ho, Wo]
  channels_first,  // [B, O, N, Ho, Wo]
  channels_last,   // [B, N, Ho, Wo, O]
};

// Sizes that are chosen; see lowering/patch_conv2d.py.
struct PatchBlocking {
  int64_t group_bytes;  // of a group of patches in cache and its sums, or of some rows and channels of it
};

// The taps that meet each place of the output, along one axis.
class AxisTaps {
 public:
  explicit AxisTaps(const Axis& axis) : taps_(axis.out_size) {
    for (int64_t out = 0; out < axis.out_size; ++out) {
      axis.for_taps(out, [&](const AxisTap& tap) { taps_[out].push_back(tap); });
    }
  }
  const std::vector<AxisTap>& operator[](int64_t out) const {
    return taps_[out];
  }
  // The sources of the places [begin, end) are in [first, second).
  std::pair<int64_t, int64_t> sources(int64_t begin, int64_t end) const {
    int64_t first = INT64_MAX, last = -1;
    for (int64_t out = begin; out < end; ++out) {
      for (const AxisTap& tap : taps_[out]) {
        first = std::min(first, tap.source);
        last = std::max(last, tap.source);
      }
    }
    return last < 0 ? std::make_pair(int64_t{0}, int64_t{0}) : std::make_pair(first, last + 1);
  }

 private:
  std::vector<std::vector<AxisTap>> taps_;
};

// For each pixel of the output, the pixels of the input and the taps they are multiplied with.
template <typename scalar_t>
struct PatchTaps {
  AxisTaps rows, columns;
  std::vector<Run> runs;
  std::vector<int64_t> first;  // of each pixel in `runs`; one more than there are pixels

  PatchTaps(const PatchConv2d<scalar_t>& op, bool transposed)
      : rows(
            Axis{
                op.out_height, op.height, op.kernel_height, op.stride_height, op.padding_height, op.dilation_height,
                transposed}),
        columns(
            Axis{
                op.out_width, op.width, op.kernel_width, op.stride_width, op.padding_width, op.dilation_width,
                transposed}),
        first(1, 0) {
    for (int64_t y = 0; y < op.out_height; ++y) {
      for (int64_t x = 0; x < op.out_width; ++x) {
        for (const AxisTap& i : rows[y]) {
          for (const AxisTap& j : columns[x]) {
            runs.push_back({i.source * op.width + j.source, i.tap * op.kernel_width + j.tap});
          }
        }
        first.push_back(static_cast<int64_t>(runs.size()));
      }
    }
  }
};

// group[pixel][c][n] = patch n at that place, kPatches apart, of `count` patches from `patch` on: the rows
// [rows.first, rows.second), `channels` channels from `channel` on.  Patches that are missing to `padded`, and channels
// to `padded_channels`, are zeros.
template <int64_t kPatches, typename scalar_t, typename acc_t>
inline void load_group(
    const PatchConv2d<scalar_t>& op, int64_t patch, int64_t count, int64_t padded, std::pair<int64_t, int64_t> rows,
    int64_t channel, int64_t channels, int64_t padded_channels, acc_t* group) {
  const PatchView<scalar_t>& in = op.input;
  const int64_t distance = padded_channels * kPatches, pixels = (rows.second - rows.first) * op.width;
  const bool flat = in.row == op.width * in.column;  // rows follow each other
  const int64_t lines = flat ? 1 : rows.second - rows.first, columns = flat ? pixels : op.width;
  for (int64_t n = 0; n < count;) {  // patches of one image are equally far from each other
    const int64_t image = (patch + n) / op.patches, index = (patch + n) % op.patches;
    const int64_t n_count = std::min(count - n, op.patches - index);
    const scalar_t* from = in.data + (image * in.image + index * in.patch + channel * in.channel + rows.first * in.row);
    for (int64_t y = 0; y < lines; ++y, from += in.row) {
      acc_t* to = group + y * op.width * distance + n;
      if (in.channel == 1 && in.column != 1) {
        for (int64_t x = 0; x < columns; ++x) {
          load_block(from + x * in.column, 1, in.patch, to + x * distance, kPatches, channels, n_count);
        }
      } else {
        for (int64_t c = 0; c < channels; ++c) {
          load_block(from + c * in.channel, in.column, in.patch, to + c * kPatches, distance, columns, n_count);
        }
      }
    }
    n += n_count;
  }
  for (int64_t p = 0; p < pixels; ++p) {
    for (int64_t c = 0; count < padded && c < channels; ++c) {
      std::fill_n(group + p * distance + c * kPatches + count, padded - count, acc_t(0));
    }
    std::fill_n(group + p * distance + channels * kPatches, (padded_channels - channels) * kPatches, acc_t(0));
  }
}

// How the work on a group is cut, so that it stays in cache: whole rows of the output, and channels of a group.
struct PatchBlocks {
  int64_t rows;
  int64_t channels;

  // `patches`: in a group.  `pixel_bytes`: what a pixel of the result takes in cache beside what it reads.
  template <typename scalar_t>
  PatchBlocks(
      const PatchConv2d<scalar_t>& op, const PatchTaps<scalar_t>& taps, int64_t patches, int64_t pixel_bytes,
      const PatchBlocking& blocking)
      : rows(op.out_height),
        channels(op.channels / op.groups) {
    constexpr int64_t kFewest = kPanel<accumulate_t<scalar_t>>;
    const int64_t row_bytes = op.width * patches * static_cast<int64_t>(sizeof(accumulate_t<scalar_t>));
    const auto group_bytes = [&] { return source_rows(taps, op.out_height) * row_bytes * channels; };
    while (rows > 1 && group_bytes() + rows * op.out_width * pixel_bytes > blocking.group_bytes) {
      rows = divide_up(rows, 2);
    }
    while (channels > kFewest && group_bytes() > blocking.group_bytes) {
      channels = round_up(divide_up(channels, 2), kFewest);
    }
  }
  // The most rows of the input that so many rows of the output read.
  template <typename scalar_t>
  int64_t source_rows(const PatchTaps<scalar_t>& taps, int64_t out_height) const {
    int64_t most = 0;
    for (int64_t y = 0; y < out_height; y += rows) {
      const auto sources = taps.rows.sources(y, std::min(y + rows, out_height));
      most = std::max(most, sources.second - sources.first);
    }
    return most;
  }
};

// One thread's buffers, and what it does with some rows of a group of patches.
template <PatchOrder kOrder, typename scalar_t>
class PatchTile {
 public:
  using acc_t = accumulate_t<scalar_t>;
  static constexpr int64_t kPatches = kMicroRows;
  static constexpr int64_t kColumns = kMicroPanels * kPanel<acc_t>;  // channels of the result that are summed together
  // Of a pixel: its sums, and these once more with the channels apart.
  static constexpr int64_t kPixelBytes = 2 * kPatches * kColumns * static_cast<int64_t>(sizeof(acc_t));

  PatchTile(
      const PatchConv2d<scalar_t>& op, const acc_t* weight, const PatchTaps<scalar_t>& taps, const PatchBlocks& blocks)
      : op_(op),
        weight_(weight),
        taps_(taps),
        blocks_(blocks),
        single_(blocks.channels == op.channels / op.groups),
        group_(blocks.source_rows(taps, op.out_height) * op.width * blocks.channels * kPatches),
        bias_(op.groups * round_up(group_outputs(), kPanel<acc_t>)),
        sums_(blocks.rows * op.out_width * kPatches * (single_ ? kColumns : round_up(group_outputs(), kColumns))),
        by_channel_(kOrder == PatchOrder::channels_last ? 0 : blocks.rows * op.out_width * kPatches * kColumns) {
    const int64_t columns = round_up(group_outputs(), kPanel<acc_t>);
    std::fill_n(bias_.get(), op.groups * columns, acc_t(0));
    for (int64_t o = 0; op.bias != nullptr && o < op.out_channels; ++o) {
      bias_[o / group_outputs() * columns + o % group_outputs()] = static_cast<acc_t>(op.bias[o]);
    }
  }

  // Rows [first_row, end_row) of the results of `count` patches from `patch` on.
  template <typename Store>
  void run(int64_t patch, int64_t count, int64_t first_row, int64_t end_row, const Store& store) {
    const auto sources = taps_.rows.sources(first_row, end_row);
    const int64_t inputs = op_.channels / op_.groups, padded = round_up(count, kRowStep);
    const int64_t pixels = (end_row - first_row) * op_.out_width;
    for (int64_t g = 0; g < op_.groups; ++g) {
      for (int64_t c = 0; c < inputs; c += blocks_.channels) {
        const int64_t channels = std::min(blocks_.channels, inputs - c);
        load_group<kPatches>(op_, patch, count, padded, sources, g * inputs + c, channels, channels, group_.get());
        const int64_t panels = divide_up(group_outputs(), kPanel<acc_t>);
        for (int64_t panel = 0; panel < panels; panel += kMicroPanels) {
          const int64_t o = panel * kPanel<acc_t>;
          acc_t* sums = sums_.get() + (single_ ? 0 : o * pixels * kPatches);
          const acc_t* begin = c == 0 ? bias_.get() + (g * panels + panel) * kPanel<acc_t> : nullptr;
          const acc_t* weight = weight_ + ((g * panels + panel) * op_.taps() * inputs + c) * kPanel<acc_t>;
          if (panels - panel >= kMicroPanels) {
            add<kMicroPanels>(weight, sources.first, channels, first_row, pixels, padded, sums, begin);
          } else {
            add<1>(weight, sources.first, channels, first_row, pixels, padded, sums, begin);
          }
          if (c + channels == inputs) {
            const int64_t outputs = std::min(kColumns, group_outputs() - o);
            finish(patch, count, first_row * op_.out_width, pixels, g * group_outputs() + o, outputs, sums, store);
          }
        }
      }
    }
  }

 private:
  int64_t group_outputs() const {
    return op_.out_channels / op_.groups;
  }

  // sums[(pixel * kPatches + n) * kColumns + o], which begin with those, or with what is there.
  template <int kPanels>
  void add(
      const acc_t* weight, int64_t first_source_row, int64_t channels, int64_t first_row, int64_t pixels, int64_t rows,
      acc_t* sums, const acc_t* begin) const {
    const int64_t inputs = op_.channels / op_.groups, origin = first_source_row * op_.width;
    const Panels<acc_t> b{weight, op_.taps() * inputs * kPanel<acc_t>};
    for (int64_t p = 0; p < pixels; ++p, sums += kPatches * kColumns) {
      const int64_t pixel = first_row * op_.out_width + p, first = taps_.first[pixel];
      const ListedRows<acc_t, 1, kPatches> a{group_.get(),
                                             taps_.runs.data() + first,
                                             taps_.first[pixel + 1] - first,
                                             channels,
                                             origin,
                                             channels * kPatches,
                                             inputs};
      const Sums<acc_t> c(sums, kColumns, begin == nullptr ? sums : begin, begin == nullptr ? kColumns : 0);
      gemm_panels<acc_t, kPanels>(a, b, c, rows);
    }
  }

  template <typename Store>
  void finish(
      int64_t patch, int64_t count, int64_t first_pixel, int64_t pixels, int64_t channel, int64_t channels,
      const acc_t* sums, const Store& store) const {
    constexpr int64_t kPixel = kPatches * kColumns;  // between the sums of two pixels
    acc_t* values = by_channel_.get();
    if constexpr (kOrder == PatchOrder::channels_first) {
      for (int64_t n = 0; n < count;) {  // the patches of an image follow each other
        const int64_t image = (patch + n) / op_.patches, index = (patch + n) % op_.patches;
        const int64_t whole = first_pixel == 0 && pixels == op_.out_pixels() ? op_.patches - index : 1;
        const int64_t n_count = std::min(count - n, whole), distance = n_count * pixels;
        for (int64_t i = 0; i < n_count; ++i) {
          transpose(sums + (n + i) * kColumns, kPixel, values + i * pixels, distance, pixels, channels);
        }
        store(
            OutputBlock{image, channel, channels, 0, 1, index * op_.out_pixels() + first_pixel, distance}, values,
            distance);
        n += n_count;
      }
    } else {
      for (int64_t n = 0; n < count; ++n) {
        const OutputBlock block{patch + n, channel, channels, 0, 1, first_pixel, pixels};
        if constexpr (kOrder == PatchOrder::channels_last) {
          store(block, sums + n * kColumns, kPixel);
        } else {
          transpose(sums + n * kColumns, kPixel, values, pixels, pixels, channels);
          store(block, values, pixels);
        }
      }
    }
  }

  const PatchConv2d<scalar_t>& op_;
  const acc_t* weight_;
  const PatchTaps<scalar_t>& taps_;
  const PatchBlocks& blocks_;
  bool single_;  // all channels of a group are one block
  Scratch<acc_t> group_;
  Scratch<acc_t> bias_;  // of each panel
  Scratch<acc_t> sums_;
  Scratch<acc_t> by_channel_;
};

// weight: [groups][panels][taps][Cg][kPanel].  `store` gets blocks of one row, the pixels of a patch: of an output
// [B * N, O, 1, Ho * Wo], or [B, O, 1, N * Ho * Wo] for channels_first.
template <PatchOrder kOrder, bool kTransposed, typename scalar_t, typename Store>
inline void patch_conv2d(
    PatchConv2d<scalar_t> op, const accumulate_t<scalar_t>* weight, const PatchBlocking& blocking, const Store& store) {
  if (op.batch * op.patches * op.out_channels * op.out_pixels() == 0) {
    return;
  }
  if (kOrder != PatchOrder::channels_first && op.input.image == op.patches * op.input.patch) {
    op.patches *= op.batch;  // groups may as well have patches of several images
    op.batch = 1;
  }
  const PatchTaps<scalar_t> taps(op, kTransposed);
  using Tile = PatchTile<kOrder, scalar_t>;
  const PatchBlocks blocks(op, taps, Tile::kPatches, Tile::kPixelBytes, blocking);
  const int threads = omp_get_max_threads();
  // Allocated here, because no exception may leave the parallel region.
  std::vector<Tile> tiles;
  for (int thread = 0; thread < threads; ++thread) {
    tiles.emplace_back(op, weight, taps, blocks);
  }
  const int64_t total = op.batch * op.patches, bands = divide_up(op.out_height, blocks.rows);
  const int64_t work = divide_up(total, Tile::kPatches) * bands;
  // Neighbours in memory for each thread, as long as there is enough for all of them.
  const int64_t chunk = std::clamp<int64_t>(work / (8 * threads), 1, 4);
#pragma omp parallel for num_threads(threads) schedule(dynamic, chunk)
  for (int64_t i = 0; i < work; ++i) {
    const int64_t patch = i / bands * Tile::kPatches, row = i % bands * blocks.rows;
    tiles[omp_get_thread_num()].run(
        patch, std::min(Tile::kPatches, total - patch), row, std::min(row + blocks.rows, op.out_height), store);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_PATCH_CONV2D_H
