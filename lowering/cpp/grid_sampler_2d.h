// Sampling images at places that a grid gives: aten's grid_sampler_2d.  See grid_sampler.h.
//
// The coordinates of a tile of the output become taps and weights, a vector of pixels at a time; all channels are
// summed from these.  There are two ways to do that, which add the same numbers in the same order:
//
//   pixels   channels are the vector: a sample is summed from pixels whose channels are neighbours.  Those of a
//            contiguous image are brought into that order before, a block of channels at a time.
//   planes   neighbouring samples of a channel are the vector: what they are made of is gathered, one by one.  For few
//            channels, and for contiguous images that are large beside the grid.
#ifndef INDUCTOR_VISION_GRID_SAMPLER_2D_H
#define INDUCTOR_VISION_GRID_SAMPLER_2D_H

#include "grid_sampler.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Hands results over that lie [pixel][channel], or [channel][pixel], in the order that the output has.
template <bool kChannelsLast, typename acc_t, typename Store>
inline void store_samples(
    const Store& store, const OutputBlock& block, bool by_pixel, const acc_t* values, int64_t distance, acc_t* turned) {
  const int64_t pixels = block.rows * block.columns;
  if (by_pixel == kChannelsLast) {
    store(block, values, distance);
  } else if (by_pixel) {
    transpose(values, distance, turned, pixels, pixels, block.channels);
    store(block, static_cast<const acc_t*>(turned), pixels);
  } else {
    transpose(values, distance, turned, block.channels, block.channels, pixels);
    store(block, static_cast<const acc_t*>(turned), block.channels);
  }
}

// out[c] for c < channels: one sample, of pixels whose channels are neighbours.
template <GridInterpolation kMode, typename scalar_t, typename value_t, typename acc_t>
inline void sample_pixel(
    const GridTile<kMode, scalar_t>& tile, int64_t i, const View4d<value_t>& image, const value_t* first,
    const value_t* outside, acc_t* out, int64_t channels) {
  using Vec = Vectorized<acc_t>;
  constexpr int kTaps = grid_taps(kMode);
  std::array<const value_t*, kTaps * kTaps> pixels;
  std::array<acc_t, kTaps * kTaps> weights;
  for (int j = 0; j < kTaps; ++j) {
    for (int k = 0; k < kTaps; ++k) {
      const int64_t y = tile.rows.index[j][i], x = tile.columns.index[k][i];
      pixels[j * kTaps + k] = (y | x) < 0 ? outside : first + (y * image.row + x * image.column);
      if constexpr (kMode != GridInterpolation::nearest) {
        weights[j * kTaps + k] = tile.rows.weight[j][i] * tile.columns.weight[k][i];
      }
    }
  }
  const auto sum = [&](int64_t c, int64_t count) {
    Vec sum = load_vector(pixels[0] + c, count);
    if constexpr (kMode != GridInterpolation::nearest) {
      sum = sum * Vec(weights[0]);
      for (int p = 1; p < kTaps * kTaps; ++p) {
        sum = at::vec::fmadd(load_vector(pixels[p] + c, count), Vec(weights[p]), sum);
      }
    }
    return sum;
  };
  int64_t c = 0;
  for (; c + Vec::size() <= channels; c += Vec::size()) {
    sum(c, Vec::size()).store(out + c);
  }
  if (c < channels) {
    sum(c, channels - c).store(out + c, channels - c);
  }
}

// Images whose channels are neighbours: those from `first` to `first` + `images` of the batch, and the `channels`
// channels from `channel` on, which `view` has.
template <GridInterpolation kMode, bool kChannelsLast, typename scalar_t, typename value_t, typename Store>
inline void sample_pixels(
    const GridSampler2d<scalar_t>& op, const View4d<value_t>& view, int64_t first, int64_t images, int64_t channel,
    int64_t channels, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kCached = 65536 / static_cast<int64_t>(sizeof(acc_t));  // elements of a tile
  const GridTiling tiling(
      op.out_height, op.out_width, std::max<int64_t>(1, std::min(kGridTile, kCached / std::max<int64_t>(1, channels))));
  const int threads = omp_get_max_threads();
  const int64_t pixels = std::min(kGridTile, op.out_pixels());
  const int64_t size = round_up(pixels * channels, kCacheLine);
  const Scratch<acc_t> scratch(threads * 2 * size);
  const Scratch<value_t> outside(channels);
  std::fill_n(outside.get(), channels, value_t(0));
#pragma omp parallel num_threads(threads)
  {
    acc_t* samples = scratch.get() + omp_get_thread_num() * 2 * size;
    GridTile<kMode, scalar_t> tile(op);
#pragma omp for
    for (int64_t unit = 0; unit < images * tiling.count(); ++unit) {
      const int64_t image = unit / tiling.count();
      OutputBlock block = tiling.tile(first + image, unit % tiling.count());
      block.channel = channel;
      block.channels = channels;
      tile.find(block);
      for (int64_t i = 0; i < tile.pixels; ++i) {
        sample_pixel(tile, i, view, view.at(image, 0, 0), outside.get(), samples + i * channels, channels);
      }
      store_samples<kChannelsLast>(store, block, true, samples, channels, samples + size);
    }
  }
}

// As many channels at a time as the copy of an image stays in cache, of as many images.
template <GridInterpolation kMode, bool kChannelsLast, typename scalar_t, typename Store>
inline void sample_transposed(const GridSampler2d<scalar_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  constexpr int64_t kLine = kCacheLine / static_cast<int64_t>(sizeof(acc_t));
  constexpr int64_t kCached = (int64_t{2} << 20) / static_cast<int64_t>(sizeof(acc_t));  // elements, by all threads
  constexpr int64_t kStrip = 128;                                                        // pixels
  const int64_t plane = op.height * op.width, strips = divide_up(op.width, kStrip);
  const int64_t group = std::min(op.channels, std::max(kLine, round_down(kCached / plane, kLine)));
  const int64_t together = std::min(op.batch, std::max<int64_t>(1, kCached / (plane * group)));
  const Scratch<acc_t> copy(together * plane * group);
  for (int64_t first = 0; first < op.batch; first += together) {
    const int64_t images = std::min(together, op.batch - first);
    for (int64_t channel = 0; channel < op.channels; channel += group) {
      const int64_t channels = std::min(group, op.channels - channel);
      const View4d<acc_t> view{copy.get(), plane * channels, 1, op.width * channels, channels};
#pragma omp parallel for num_threads(omp_get_max_threads())
      for (int64_t unit = 0; unit < images * op.height * strips; ++unit) {
        const int64_t image = unit / strips / op.height, y = unit / strips % op.height, x = unit % strips * kStrip;
        const scalar_t* from = op.input.at(first + image, y, x) + channel * op.input.channel;
        acc_t* to = copy.get() + ((image * op.height + y) * op.width + x) * channels;
        load_block(from, op.input.column, op.input.channel, to, channels, std::min(kStrip, op.width - x), channels);
      }
      sample_pixels<kMode, kChannelsLast>(op, view, first, images, channel, channels, store);
    }
  }
}

template <GridInterpolation kMode, bool kChannelsLast, typename scalar_t, typename Store>
inline void sample_planes(const GridSampler2d<scalar_t>& op, const Store& store) {
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  constexpr int kTaps = grid_taps(kMode), kPixels = kTaps * kTaps;
  constexpr int64_t kBlock = 16;  // channels that are stored together
  const GridTiling tiling(op.out_height, op.out_width, kGridTile);
  const int threads = omp_get_max_threads();
#pragma omp parallel num_threads(threads)
  {
    GridTile<kMode, scalar_t> tile(op);
    GridOffsets<kMode, scalar_t> offsets(op);
    alignas(kCacheLine) acc_t weights[kPixels][kGridTile];
    alignas(kCacheLine) acc_t values[kPixels][kGridTile] = {};
    alignas(kCacheLine) acc_t samples[kBlock * kGridTile], turned[kBlock * kGridTile];
#pragma omp for
    for (int64_t unit = 0; unit < op.batch * tiling.count(); ++unit) {
      OutputBlock block = tiling.tile(unit / tiling.count(), unit % tiling.count());
      tile.find(block);
      offsets.find(tile);
      for (int p = 0; p < (kMode == GridInterpolation::nearest ? 0 : kPixels); ++p) {
        for (int64_t i = 0; i < tile.pixels; i += Vec::size()) {
          const Vec row = Vec::loadu(tile.rows.weight[p / kTaps] + i);
          (row * Vec::loadu(tile.columns.weight[p % kTaps] + i)).store(weights[p] + i);
        }
      }
      for (block.channel = 0; block.channel < op.channels; block.channel += kBlock) {
        block.channels = std::min(kBlock, op.channels - block.channel);
        for (int64_t c = 0; c < block.channels; ++c) {
          const scalar_t* plane = op.input.at(block.image, 0, 0) + (block.channel + c) * op.input.channel;
          acc_t* out = samples + c * kGridTile;
          if constexpr (kMode == GridInterpolation::nearest) {
            offsets.gather(0, plane, out);
          } else {
            for (int p = 0; p < kPixels; ++p) {
              offsets.gather(p, plane, values[p]);
            }
            for (int64_t i = 0; i < tile.pixels; i += Vec::size()) {
              Vec sum = Vec::loadu(values[0] + i) * Vec::loadu(weights[0] + i);
              for (int p = 1; p < kPixels; ++p) {
                sum = at::vec::fmadd(Vec::loadu(values[p] + i), Vec::loadu(weights[p] + i), sum);
              }
              sum.store(out + i);
            }
          }
        }
        store_samples<kChannelsLast>(store, block, false, samples, kGridTile, turned);
      }
    }
  }
}

// `store`: for an output of that memory format, see OutputBlock.  The bits do not depend on it, nor on the input's.
template <GridInterpolation kMode, bool kChannelsLast, typename scalar_t, typename Store>
inline void grid_sampler_2d(const GridSampler2d<scalar_t>& op, const Store& store) {
  constexpr int64_t kPixels = grid_taps(kMode) * grid_taps(kMode);
  if (op.channels < Vectorized<accumulate_t<scalar_t>>::size()) {
    sample_planes<kMode, kChannelsLast>(op, store);
  } else if (op.input.channel == 1) {
    sample_pixels<kMode, kChannelsLast>(op, op.input, 0, op.batch, 0, op.channels, store);
  } else if (op.height * op.width <= kPixels * op.out_pixels()) {  // it takes less time to copy a pixel than to gather
    sample_transposed<kMode, kChannelsLast>(op, store);
  } else {
    sample_planes<kMode, kChannelsLast>(op, store);
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_GRID_SAMPLER_2D_H
