// The gradients of the weight and the bias of a convolution of many small patches.  Symbols as in patch_conv2d.h;
// `grad` is the gradient of the result.  That of the input is in patch_conv2d.h.
//
//   grad_weight[o, c, i, j] = sum over b, n, y, x of grad[b, n, o, y, x] * input[b, n, c, sy, sx]
//   grad_bias[o]            = sum over b, n, y, x of grad[b, n, o, y, x]
//
// As a matrix product for each tap: rows are channels, and what is summed over are the pixels whose (sy, sx) is in the
// patch, for a group of patches that was brought into cache: the input as in patch_conv2d.h, the gradient in panels
// (gemm.h).
//
// The patches are cut into chunks, and where these are few the channels of the result into parts; each is the work of
// one thread, with sums of its own, which are added to the result in the order of the chunks.  The cuts depend on the
// shape alone: the result is the same, to the bit, for any number of threads.
#ifndef INDUCTOR_VISION_PATCH_CONV2D_BACKWARD_H
#define INDUCTOR_VISION_PATCH_CONV2D_BACKWARD_H

#include "patch_conv2d.h"

namespace [[gnu::visibility("hidden")]] inductor_vision {

// Beside the operation itself, of which `bias` is not looked at.
template <typename scalar_t>
struct PatchGradients {
  PatchView<scalar_t> output;
  scalar_t* weight;  // [O, Cg, kH, kW], contiguous; null: not wanted
  scalar_t* bias;    // null: not wanted
};

// For each tap and row of the output, the pixels whose source is in the patch.
template <typename scalar_t>
struct PatchSources {
  std::vector<Run> runs;
  std::vector<int64_t> first;  // of each (tap, row) in `runs`; one more than there are

  PatchSources(const PatchConv2d<scalar_t>& op, const PatchTaps<scalar_t>& taps) : first(1, 0) {
    for (int64_t i = 0; i < op.kernel_height; ++i) {
      for (int64_t j = 0; j < op.kernel_width; ++j) {
        for (int64_t y = 0; y < op.out_height; ++y) {
          add_row(op, taps, i, j, y);
          first.push_back(static_cast<int64_t>(runs.size()));
        }
      }
    }
  }

 private:
  void add_row(const PatchConv2d<scalar_t>& op, const PatchTaps<scalar_t>& taps, int64_t i, int64_t j, int64_t y) {
    for (const AxisTap& row : taps.rows[y]) {
      for (int64_t x = 0; row.tap == i && x < op.out_width; ++x) {
        for (const AxisTap& column : taps.columns[x]) {
          if (column.tap == j) {
            runs.push_back({row.source * op.width + column.source, y * op.out_width + x});
          }
        }
      }
    }
  }
};

// Patches in chunks of whole groups, panels of the result's channels (of all groups of the weight) in parts.
struct PatchWork {
  // In a group; on all processors the same, so that sums are.
  static constexpr int64_t kPatches = 12;

  int64_t groups, chunks;
  int64_t panels, parts;

  PatchWork(int64_t patches, int64_t panels) : groups(divide_up(patches, kPatches)), panels(panels) {
    constexpr int64_t kFewest = 16, kMost = 64;  // pieces of work
    chunks = std::clamp<int64_t>(groups, 1, std::clamp<int64_t>(groups / 32, kFewest, kMost));
    parts = std::min(panels, divide_up(kFewest, chunks));
  }
  // The groups and panels of a piece.
  std::pair<int64_t, int64_t> groups_of(int64_t piece) const {
    const int64_t chunk = piece / parts;
    return {groups * chunk / chunks, groups * (chunk + 1) / chunks};
  }
  std::pair<int64_t, int64_t> panels_of(int64_t piece) const {
    const int64_t part = piece % parts;
    return {panels * part / parts, panels * (part + 1) / parts};
  }
};

// One thread's buffers, and what it adds up of a piece of work.
template <typename scalar_t>
class PatchGradientSums {
 public:
  using acc_t = accumulate_t<scalar_t>;
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kPatches = PatchWork::kPatches;

  PatchGradientSums(
      const PatchConv2d<scalar_t>& op, const PatchGradients<scalar_t>& gradients, const PatchTaps<scalar_t>& taps,
      const PatchSources<scalar_t>& sources, const PatchBlocks& blocks, const PatchWork& work)
      : op_(op),
        output_(gradients.output),
        with_weight_(gradients.weight != nullptr),
        taps_(taps),
        sources_(sources),
        blocks_(blocks),
        work_(work),
        inputs_(op.channels / op.groups),
        outputs_(op.out_channels / op.groups),
        group_panels_(divide_up(outputs_, kPanel<acc_t>)),
        input_(
            with_weight_
                ? blocks.source_rows(taps, op.out_height) * op.width * round_up(blocks.channels, kRowStep) * kPatches
                : 0),
        grad_(divide_up(work.panels, work.parts) * blocks.rows * op.out_width * kPatches * kPanel<acc_t>),
        weight_(with_weight_ ? divide_up(work.panels, work.parts) * panel_size() : 0),
        bias_(divide_up(work.panels, work.parts) * kPanel<acc_t>) {
  }

  // Elements of a panel of the weight's gradient: [taps][Cg, rounded up][kPanel].
  int64_t panel_size() const {
    return op_.taps() * round_up(inputs_, kRowStep) * kPanel<acc_t>;
  }
  const acc_t* weight() const {
    return weight_.get();
  }
  const acc_t* bias() const {
    return bias_.get();
  }

  void run(int64_t piece) {
    const auto [first_panel, end_panel] = work_.panels_of(piece);
    const auto [first_group, end_group] = work_.groups_of(piece);
    const int64_t total = op_.batch * op_.patches;
    if (with_weight_) {
      std::fill_n(weight_.get(), (end_panel - first_panel) * panel_size(), acc_t(0));
    }
    std::fill_n(bias_.get(), (end_panel - first_panel) * kPanel<acc_t>, acc_t(0));
    for (int64_t group = first_group; group < end_group; ++group) {
      const int64_t patch = group * kPatches, count = std::min(kPatches, total - patch);
      for (int64_t row = 0; row < op_.out_height; row += blocks_.rows) {
        add_band(patch, count, row, std::min(row + blocks_.rows, op_.out_height), first_panel, end_panel);
      }
    }
  }

 private:
  void add_band(
      int64_t patch, int64_t count, int64_t first_row, int64_t end_row, int64_t first_panel, int64_t end_panel) {
    const int64_t pixels = (end_row - first_row) * op_.out_width;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      acc_t* grad = grad_.get() + (panel - first_panel) * pixels * kPatches * kPanel<acc_t>;
      load_panel(patch, count, first_row, end_row, panel, grad);
      add_bias(grad, pixels, count, bias_.get() + (panel - first_panel) * kPanel<acc_t>);
    }
    if (!with_weight_) {
      return;
    }
    const auto sources = taps_.rows.sources(first_row, end_row);
    for (int64_t panel = first_panel; panel < end_panel;) {
      const int64_t g = panel / group_panels_, end = std::min(end_panel, (g + 1) * group_panels_);
      for (int64_t c = 0; c < inputs_; c += blocks_.channels) {
        const int64_t channels = std::min(blocks_.channels, inputs_ - c);
        const int64_t rows = round_up(channels, kRowStep);
        load_group<kPatches>(op_, patch, count, count, sources, g * inputs_ + c, channels, rows, input_.get());
        for (int64_t p = panel; p < end; ++p) {
          const acc_t* grad = grad_.get() + (p - first_panel) * pixels * kPatches * kPanel<acc_t>;
          acc_t* weight = weight_.get() + (p - first_panel) * panel_size() + c * kPanel<acc_t>;
          add_panel(grad, sources.first, count, channels, first_row, end_row, weight);
        }
      }
      panel = end;
    }
  }

  // grad[pixel - first][n][o - first].
  void load_panel(int64_t patch, int64_t count, int64_t first_row, int64_t end_row, int64_t panel, acc_t* grad) const {
    const int64_t o = panel % group_panels_ * kPanel<acc_t>, channels = std::min(kPanel<acc_t>, outputs_ - o);
    const int64_t rows = end_row - first_row, channel = panel / group_panels_ * outputs_ + o;
    const bool flat = output_.row == op_.out_width * output_.column;
    for (int64_t n = 0; n < count; ++n) {
      const scalar_t* from =
          output_.data + ((patch + n) / op_.patches * output_.image + (patch + n) % op_.patches * output_.patch +
                          channel * output_.channel + first_row * output_.row);
      for (int64_t y = 0; y < (flat ? 1 : rows); ++y) {
        const int64_t columns = flat ? rows * op_.out_width : op_.out_width;
        load_block(
            from + y * output_.row, output_.column, output_.channel,
            grad + (y * op_.out_width * kPatches + n) * kPanel<acc_t>, kPatches * kPanel<acc_t>, columns, channels);
      }
    }
    if (channels < kPanel<acc_t>) {
      for (int64_t i = 0; i < rows * op_.out_width * kPatches; ++i) {
        std::fill(grad + i * kPanel<acc_t> + channels, grad + (i + 1) * kPanel<acc_t>, acc_t(0));
      }
    }
  }

  void add_bias(const acc_t* grad, int64_t pixels, int64_t count, acc_t* bias) const {
    constexpr int kVec = static_cast<int>(kPanel<acc_t> / Vec::size());
    auto sum = generate<kVec>([&](int i) { return Vec::loadu(bias + i * Vec::size()); });
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t n = 0; n < count; ++n) {
        const acc_t* from = grad + (p * kPatches + n) * kPanel<acc_t>;
        ForcedUnroll<kVec>{}([&](auto i) { sum[i] = sum[i] + Vec::loadu(from + i * Vec::size()); });
      }
    }
    ForcedUnroll<kVec>{}([&](auto i) { sum[i].store(bias + i * Vec::size()); });
  }

  // weight[tap][c][o] for all taps and some channels.
  void add_panel(
      const acc_t* grad, int64_t first_source_row, int64_t count, int64_t channels, int64_t first_row, int64_t end_row,
      acc_t* weight) const {
    const int64_t rows = round_up(channels, kRowStep), origin = first_source_row * op_.width;
    // The gradient in cache begins with the first pixel of the band, the list counts from that of the patch.
    const Panels<acc_t> b{grad - first_row * op_.out_width * kPatches * kPanel<acc_t>, 0};
    for (int64_t tap = 0; tap < op_.taps(); ++tap) {
      const int64_t begin = sources_.first[tap * op_.out_height + first_row];
      const int64_t end = sources_.first[tap * op_.out_height + end_row];
      const ListedRows<acc_t, kPatches, 1> a{
          input_.get(), sources_.runs.data() + begin, end - begin, count, origin, rows * kPatches, kPatches};
      const Sums<acc_t> c(weight + tap * round_up(inputs_, kRowStep) * kPanel<acc_t>, kPanel<acc_t>);
      gemm_panels<acc_t, 1>(a, b, c, rows);
    }
  }

  const PatchConv2d<scalar_t>& op_;
  const PatchView<scalar_t> output_;
  bool with_weight_;
  const PatchTaps<scalar_t>& taps_;
  const PatchSources<scalar_t>& sources_;
  const PatchBlocks& blocks_;
  const PatchWork& work_;
  int64_t inputs_, outputs_;  // channels of a group of the weight
  int64_t group_panels_;
  Scratch<acc_t> input_;
  Scratch<acc_t> grad_;
  Scratch<acc_t> weight_;
  Scratch<acc_t> bias_;
};

template <typename scalar_t>
inline void patch_conv2d_backward(
    PatchConv2d<scalar_t> op, const PatchGradients<scalar_t>& gradients, const PatchBlocking& blocking) {
  using acc_t = accumulate_t<scalar_t>;
  if (op.input.image == op.patches * op.input.patch && gradients.output.image == op.patches * gradients.output.patch) {
    op.patches *= op.batch;  // groups may as well have patches of several images
    op.batch = 1;
  }
  const int64_t inputs = op.channels / op.groups, outputs = op.out_channels / op.groups;
  const int64_t group_panels = divide_up(outputs, kPanel<acc_t>);
  const PatchTaps<scalar_t> taps(op, false);
  const PatchSources<scalar_t> sources(op, taps);
  const PatchWork work(op.batch * op.patches, op.groups * group_panels);
  const int64_t pixel_bytes =
      divide_up(work.panels, work.parts) * PatchWork::kPatches * kPanel<acc_t> * static_cast<int64_t>(sizeof(acc_t));
  const PatchBlocks blocks(op, taps, PatchWork::kPatches, pixel_bytes, blocking);
  const int threads = omp_get_max_threads();
  // Allocated here, because no exception may leave the parallel region.
  std::vector<PatchGradientSums<scalar_t>> sums;
  for (int thread = 0; thread < threads; ++thread) {
    sums.emplace_back(op, gradients, taps, sources, blocks, work);
  }
  const int64_t panel_size = gradients.weight == nullptr ? 0 : sums[0].panel_size();
  const Scratch<acc_t> weight(work.panels * panel_size), bias(work.panels * kPanel<acc_t>);
  std::fill_n(weight.get(), work.panels * panel_size, acc_t(0));
  std::fill_n(bias.get(), work.panels * kPanel<acc_t>, acc_t(0));

#pragma omp parallel for num_threads(threads) schedule(dynamic) ordered
  for (int64_t piece = 0; piece < work.chunks * work.parts; ++piece) {
    auto& mine = sums[omp_get_thread_num()];
    mine.run(piece);
    const auto panels = work.panels_of(piece);  // clang has no structured bindings inside of parallel regions
    const int64_t first = panels.first, end = panels.second;
#pragma omp ordered
    {
      add_to(weight.get() + first * panel_size, mine.weight(), (end - first) * panel_size);
      add_to(bias.get() + first * kPanel<acc_t>, mine.bias(), (end - first) * kPanel<acc_t>);
    }
  }

  for (int64_t o = 0; o < op.out_channels; ++o) {
    const int64_t panel = o / outputs * group_panels + o % outputs / kPanel<acc_t>;
    const int64_t column = o % outputs % kPanel<acc_t>;
    if (gradients.bias != nullptr) {
      gradients.bias[o] = static_cast<scalar_t>(bias[panel * kPanel<acc_t> + column]);
    }
    for (int64_t c = 0; gradients.weight != nullptr && c < inputs; ++c) {
      for (int64_t tap = 0; tap < op.taps(); ++tap) {
        const int64_t row = tap * round_up(inputs, kRowStep) + c;
        const acc_t sum = weight[panel * panel_size + row * kPanel<acc_t> + column];
        gradients.weight[(o * inputs + c) * op.taps() + tap] = static_cast<scalar_t>(sum);
      }
    }
  }
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_PATCH_CONV2D_BACKWARD_H
