// Every kernel where memory runs out, at any of its allocations: an exception, in the thread that called it.
#include "box_iou_rotated.h"
#include "deform_conv2d_backward.h"
#include "depthwise_separable_conv2d_backward.h"
#include "direct_conv2d.h"
#include "grid_sampler_2d.h"
#include "grid_sampler_2d_backward.h"
#include "harness.h"
#include "heatmaps_to_keypoints.h"
#include "multiscale_deformable_attention_backward.h"
#include "nms_rotated.h"
#include "paste_masks.h"
#include "patch_conv2d_backward.h"
#include "ps_roi_align.h"
#include "ps_roi_pool.h"
#include "roi_align.h"
#include "roi_pool.h"
#include "soft_nms.h"
#include "upsample2d.h"
#include "winograd_conv2d.h"

#include <atomic>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <new>

namespace {

constexpr int64_t kNever = int64_t{1} << 62;

std::atomic<int64_t> allocations{0};
std::atomic<int64_t> first_to_fail{kNever};  // and all that follow it
std::atomic<int64_t> failed_in_parallel{0};

bool fails() {
  const bool fail = allocations++ >= first_to_fail;
  if (fail && omp_in_parallel() != 0) {
    ++failed_in_parallel;
  }
  return fail;
}

}  // namespace

void* operator new(size_t size) {
  void* p = fails() ? nullptr : std::malloc(size);
  if (p == nullptr) {
    throw std::bad_alloc();
  }
  return p;
}
void operator delete(void* p) noexcept {
  std::free(p);
}
void operator delete(void* p, size_t) noexcept {
  std::free(p);
}
extern "C" void* aligned_alloc(size_t alignment, size_t size) {
  void* p = nullptr;
  return fails() || posix_memalign(&p, alignment, size) != 0 ? nullptr : p;
}

namespace {

using namespace inductor_vision;
using harness::Layout;
using harness::Random;
using harness::Tensor;

// One call that succeeds says how many allocations there are; then each is the first that fails, or one of so many.
void run_out_of_memory(const char* name, const std::function<void()>& call) {
  constexpr int64_t kAtMost = 100;
  call();
  allocations = 0;
  call();
  const int64_t count = allocations, step = divide_up(count, kAtMost);
  int64_t calls = 0, thrown = 0;
  failed_in_parallel = 0;
  for (int64_t first = 0; first < count; first += step, ++calls) {
    allocations = 0;
    first_to_fail = first;
    try {
      call();
    } catch (const std::bad_alloc&) {
      ++thrown;
    }
    first_to_fail = kNever;
  }
  call();
  std::printf(
      "%s_calls=%" PRId64 " %s_thrown=%" PRId64 " %s_in_parallel=%" PRId64 "\n", name, calls, name, thrown, name,
      failed_in_parallel.load());
  std::fflush(stdout);  // the next one may be the last
}

Tensor<float> tensor(int64_t batch, int64_t channels, int64_t height, int64_t width, double low, double high) {
  Tensor<float> values(batch, channels, height, width, Layout::contiguous);
  Random random(1);
  values.fill([&](int64_t, int64_t, int64_t, int64_t) { return random.uniform(low, high); });
  return values;
}

void run_boxes() {
  constexpr int64_t kCount = 5000;  // enough for all threads
  Random random(2);
  Tensor<float> boxes(1, 1, kCount, 5, Layout::contiguous), scores = tensor(1, 1, 1, kCount, 0.1, 1);
  boxes.fill([&](int64_t, int64_t, int64_t, int64_t column) {
    return column < 2 ? random.uniform(0, 400) : column < 4 ? random.uniform(400, 500) : random.uniform(0, 90);
  });
  std::vector<int64_t> classes(kCount), kept(kCount);
  for (int64_t i = 0; i < kCount; ++i) {
    classes[i] = i % 4;  // none is large
  }
  std::vector<float> lowered(kCount);
  const auto scored = [&](const int64_t* classes) {
    const auto& view = boxes.view();
    return ScoredBoxes<float, float>{view.data, view.row, view.column, scores.view().data, 1, classes, 1, kCount};
  };
  const SoftRule rule{true, 0.3, 0.5, 0.05};
  run_out_of_memory("nms", [&] { nms(scored(nullptr), 0.5, kept.data()); });
  run_out_of_memory("nms_of_classes", [&] { nms(scored(classes.data()), 0.5, kept.data()); });
  run_out_of_memory("nms_pair_by_pair", [&] { nms(scored(classes.data()), -0.1, kept.data()); });
  run_out_of_memory("nms_rotated_of_classes", [&] { nms_rotated(scored(classes.data()), 0.5, kept.data()); });
  run_out_of_memory(
      "soft_nms_of_classes", [&] { soft_nms(scored(classes.data()), rule, kept.data(), lowered.data()); });
  const RotatedBoxes<float> few{boxes.view().data, boxes.view().row, 1, 60};
  std::vector<float> ious(60 * 60);
  run_out_of_memory("box_iou_rotated", [&] { box_iou_rotated(few, few, ious.data()); });
  const Tensor<float> maps = tensor(3, 2, 5, 6, -1, 1);
  const float sides[] = {0, 0, 9, 8, 1, 2, 20, 30, 3, 3, 5, 7};
  std::vector<float> keypoints(3 * 2 * 3);
  run_out_of_memory("heatmaps_to_keypoints", [&] {
    heatmaps_to_keypoints(Images<float>{maps.view(), 3, 2, 5, 6}, HeatmapBoxes<float>{sides, 4, 1}, keypoints.data());
  });
  const Tensor<float> masks = tensor(3, 1, 5, 6, -1, 1);
  const int64_t corners[] = {0, 0, 9, 8, 1, 2, 20, 30, 3, 3, 5, 7};
  std::vector<float> pasted(3 * 40 * 50);
  run_out_of_memory("paste_masks", [&] {
    paste_masks(
        PasteMasks<float>{Images<float>{masks.view(), 3, 1, 5, 6}, corners, 4, 1, 40, 50},
        DenseStore<false, float>{pasted.data(), 1, 40, 50});
  });
}

void run_images() {
  const Tensor<float> images = tensor(2, 3, 20, 30, -1, 1), many(2, 20, 9, 11, Layout::channels_last);
  std::vector<float> out(2 * 20 * 40 * 50);
  const Upsample2d<float> few{images.view(), 2, 3, 20, 30, 37, 44, 40, 50, false, 0, 0};
  const Upsample2d<float> pixels{many.view(), 2, 20, 9, 11, 37, 44, 40, 50, false, 0, 0};
  run_out_of_memory("upsample_bilinear2d", [&] {
    upsample2d<LinearTaps, false>(few, DenseStore<false, float>{out.data(), 3, 40, 50});
  });
  run_out_of_memory("upsample_bicubic2d", [&] {
    upsample2d<CubicTaps, true>(pixels, DenseStore<true, float>{out.data(), 20, 40, 50});
  });
}

void run_samples() {
  constexpr auto kMode = GridInterpolation::bilinear;
  const Tensor<float> images = tensor(2, 20, 9, 11, -1, 1), grid = tensor(2, 2, 12, 13, -1, 1);
  const Tensor<float> grad = tensor(2, 20, 12, 13, -1, 1);
  std::vector<float> out(2 * 20 * 12 * 13), grad_images(2 * 20 * 9 * 11), grad_grid(2 * 2 * 12 * 13);
  const GridSampler2d<float> many{images.view(), grid.view(), 2, 20, 9, 11, 12, 13, GridPadding::zeros, false};
  const GridSampler2dGradients<float> gradients{
      grad.view(), {grad_images.data(), 20 * 99, 99, 11, 1}, {grad_grid.data(), 2 * 156, 156, 13, 1}};
  run_out_of_memory("grid_sampler_2d", [&] {
    grid_sampler_2d<kMode, false>(many, DenseStore<false, float>{out.data(), 20, 12, 13});
  });
  run_out_of_memory("grid_sampler_2d_backward", [&] { grid_sampler_2d_backward<kMode>(many, gradients); });
}

void run_regions() {
  constexpr int64_t kRegions = 6, kChannels = 20, kHeight = 9, kWidth = 11;
  const Bins bins{2, 3};
  const Tensor<float> maps = tensor(2, kChannels * bins.count(), kHeight, kWidth, -1, 1);
  const Tensor<float> gradient = tensor(kRegions, kChannels, bins.height, bins.width, -1, 1);
  std::vector<float> rois;
  for (int64_t k = 0; k < kRegions; ++k) {
    const float first = static_cast<float>(k);
    rois.insert(rois.end(), {static_cast<float>(k % 2), first, first / 2, first + 9, first / 2 + 7});
  }
  const Boxes<float> boxes{rois.data(), 5, 1, kRegions, nullptr};
  const FeatureMaps<float> level{maps.view(), kHeight, kWidth, 0.5};
  const Pyramid<float> pyramid{&level, 1, 2, kChannels, 4096};
  const PositionSensitiveMaps<float> split{level, 2, kChannels, bins};
  const GridSampling sampling{-1, true, false}, split_sampling{2, true, true};
  const GradMaps of_maps{2, kChannels, kHeight, kWidth, 0.5, 0, 4096};
  const GradMaps of_split{2, kChannels * bins.count(), kHeight, kWidth, 0.5, 0, 4096};
  std::vector<float> results(kRegions * kChannels * bins.count());
  std::vector<float> gradients(2 * kChannels * bins.count() * kHeight * kWidth);
  const std::vector<int32_t> argmax(results.size(), 7);
  const View4d<float>& grad = gradient.view();
  const View4d<int32_t> at{argmax.data(), grad.image, grad.channel, grad.row, grad.column};
  const DenseStore<false, float> store{results.data(), kChannels, bins.height, bins.width};
  const DenseStore<false, float> grad_store{gradients.data(), kChannels, kHeight, kWidth};
  const DenseStore<false, float> split_store{gradients.data(), kChannels * bins.count(), kHeight, kWidth};
  run_out_of_memory("roi_align", [&] { roi_align<false>(pyramid, boxes, bins, sampling, store); });
  run_out_of_memory(
      "roi_align_backward", [&] { roi_align_backward<false>(grad, boxes, bins, sampling, of_maps, grad_store); });
  run_out_of_memory("roi_pool", [&] { roi_pool<false, false>(pyramid, boxes, bins, store, [](const auto&...) {}); });
  run_out_of_memory("roi_pool_backward", [&] { roi_pool_backward<false>(grad, at, boxes, bins, of_maps, grad_store); });
  run_out_of_memory("ps_roi_align", [&] { ps_roi_align<false>(split, boxes, split_sampling, store); });
  run_out_of_memory("ps_roi_align_backward", [&] {
    ps_roi_align_backward<false>(grad, boxes, bins, split_sampling, of_split, split_store);
  });
  run_out_of_memory("ps_roi_pool", [&] { ps_roi_pool<false>(split, boxes, store); });
  run_out_of_memory(
      "ps_roi_pool_backward", [&] { ps_roi_pool_backward<false>(grad, boxes, bins, of_split, split_store); });
}

// All of 3 x 3, with a padding of 1, from 20 channels to 24.
constexpr int64_t kBatch = 3, kIn = 20, kOut = 24, kHeight = 8, kWidth = 9, kTaps = 9, kPanels = 2;

void run_deform() {
  const Tensor<float> input = tensor(kBatch, kIn, kHeight, kWidth, -1, 1);
  const Tensor<float> offset = tensor(kBatch, 2 * kTaps, kHeight, kWidth, -2, 2);
  const Tensor<float> mask = tensor(kBatch, kTaps, kHeight, kWidth, 0, 1);
  const Tensor<float> packed = tensor(1, kPanels, kTaps * kIn, kPanel<float>, -1, 1);
  const Tensor<float> weight = tensor(kOut, kIn, 3, 3, -1, 1), grad = tensor(kBatch, kOut, kHeight, kWidth, -1, 1);
  const DeformConv2d<float> op{
      input.view(),
      offset.view(),
      mask.view(),
      nullptr,
      kBatch,
      kIn,
      kHeight,
      kWidth,
      kOut,
      kHeight,
      kWidth,
      3,
      3,
      1,
      1,
      1,
      1,
      1,
      1,
      1,
      1};
  std::vector<float> out(kBatch * kOut * kHeight * kWidth), grad_input(kBatch * kIn * kHeight * kWidth),
      grad_offset(2 * kBatch * kTaps * kHeight * kWidth), grad_weight(kOut * kIn * kTaps), grad_bias(kOut),
      grad_mask(kBatch * kTaps * kHeight * kWidth);
  run_out_of_memory("deform_conv2d", [&] {
    deform_conv2d<false, DeformKernel::gemm>(
        op, packed.view().data, DeformBlocking{48, 180, 65536},
        DenseStore<false, float>{out.data(), kOut, kHeight, kWidth});
  });
  const auto like = [](const Tensor<float>& tensor, std::vector<float>& data) {
    const View4d<float>& view = tensor.view();
    return Output4d<float>{data.data(), view.image, view.channel, view.row, view.column};
  };
  const DeformGradients<float> gradients{grad.view(),
                                         weight.view(),
                                         like(input, grad_input),
                                         like(offset, grad_offset),
                                         like(weight, grad_weight),
                                         grad_bias.data(),
                                         like(mask, grad_mask)};
  run_out_of_memory("deform_conv2d_backward", [&] {
    deform_conv2d_backward<DeformKernel::gemm, kGradInput | kGradOffset | kGradWeight | kGradBias | kGradMask>(
        op, gradients, DeformBackwardBlocking{48, 1 << 16, 1 << 16});
  });
}

void run_separable() {
  const Tensor<float> input = tensor(kBatch, kIn, kHeight, kWidth, -1, 1);
  const Tensor<float> depthwise = tensor(1, 1, kTaps, kIn, -1, 1), pointwise = tensor(1, kPanels, kIn, 16, -1, 1);
  const Tensor<float> bias = tensor(1, 1, 1, kIn, -1, 1), grad = tensor(kBatch, kHeight, kWidth, kIn, -1, 1);
  const DepthwiseSeparableConv2d<float> op{
      input.view(),
      depthwise.view().data,
      bias.view().data,
      pointwise.view().data,
      nullptr,
      kBatch,
      kIn,
      kHeight,
      kWidth,
      1,
      kOut,
      kHeight,
      kWidth,
      3,
      3,
      1,
      1,
      1,
      1,
      1,
      1};
  std::vector<float> out(kBatch * kOut * kHeight * kWidth), grad_input(kBatch * kIn * kHeight * kWidth),
      grad_weight(kTaps * kIn), grad_bias(kIn), hidden(kBatch * kHeight * kWidth * kIn);
  run_out_of_memory("depthwise_separable_conv2d", [&] {
    depthwise_separable_conv2d<false>(
        op, NoExpansion{}, Relu{}, SeparableBlocking{24}, DenseStore<false, float>{out.data(), kOut, kHeight, kWidth});
  });
  const Tensor<float> weight = tensor(1, divide_up(kIn, 16), kIn, 16, -1, 1);
  const Tensor<float> shift = tensor(1, 1, divide_up(kIn, 16), 16, -1, 1);
  const Expansion<float, Relu> expansion{weight.view().data, shift.view().data, kIn, {}};
  run_out_of_memory("inverted_residual_conv2d", [&] {
    depthwise_separable_conv2d<true>(
        op, expansion, Relu{}, SeparableBlocking{24}, DenseStore<true, float>{out.data(), kOut, kHeight, kWidth});
  });
  const SeparableGradients<float> gradients{grad.view().data, false,   grad_input.data(), grad_weight.data(),
                                            grad_bias.data(), nullptr, hidden.data()};
  run_out_of_memory("depthwise_separable_conv2d_backward", [&] {
    depthwise_separable_conv2d_backward(op, Relu{}, gradients, SeparableBackwardBlocking{4096});
  });
}

void run_patches() {
  const Tensor<float> input = tensor(kBatch, kIn, kHeight, kWidth, -1, 1);
  const Tensor<float> grad = tensor(kBatch, kOut, kHeight, kWidth, -1, 1);
  const Tensor<float> packed = tensor(1, kPanels, kTaps * kIn, kPanel<float>, -1, 1);
  const auto patches = [](const Tensor<float>& tensor, int64_t channels) {
    const View4d<float>& view = tensor.view();
    return PatchView<float>{view.data, kBatch * channels * kHeight * kWidth, view.image, view.channel, view.row, 1};
  };
  const PatchConv2d<float> op{
      patches(input, kIn), nullptr, 1, kBatch, kIn, kHeight, kWidth, kOut, kHeight, kWidth, 3, 3, 1, 1, 1, 1, 1, 1, 1};
  std::vector<float> out(kBatch * kOut * kHeight * kWidth), grad_weight(kOut * kIn * kTaps), grad_bias(kOut);
  run_out_of_memory("patch_conv2d", [&] {
    patch_conv2d<PatchOrder::patches_first, false>(
        op, packed.view().data, PatchBlocking{2048}, DenseStore<false, float>{out.data(), kOut, 1, kHeight * kWidth});
  });
  const PatchGradients<float> gradients{patches(grad, kOut), grad_weight.data(), grad_bias.data()};
  run_out_of_memory("patch_conv2d_backward", [&] { patch_conv2d_backward(op, gradients, PatchBlocking{2048}); });
}

void run_winograd() {
  const Tensor<float> input = tensor(kBatch, kIn, kHeight, kWidth, -1, 1), weight = tensor(kOut, kIn, 3, 3, -1, 1);
  const Tensor<float> grad = tensor(kBatch, kOut, kHeight, kWidth, -1, 1);
  const auto run = [&](const char* name, const View4d<float>& from, int64_t channels, int64_t out_channels,
                       const WinogradWeight<float>& weights) {
    const WinogradConv2d<float> op{from,         nullptr, nullptr, kBatch, channels, kHeight, kWidth,
                                   out_channels, kHeight, kWidth,  1,      1,        1};
    std::vector<float> out(kBatch * out_channels * kHeight * kWidth);
    run_out_of_memory(name, [&] {
      winograd_conv2d<false, 4, 16>(
          op, weights, WinogradBlocking{6, 1}, DenseStore<false, float>{out.data(), out_channels, kHeight, kWidth});
    });
  };
  const float* data = weight.view().data;
  run("winograd_conv2d", input.view(), kIn, kOut, {data, 1, kOut, kIn, kOut * kIn * 9, kIn * 9, 9, false});
  run("winograd_conv2d_backward", grad.view(), kOut, kIn, {data, 1, kIn, kOut, kOut * kIn * 9, 9, kIn * 9, true});
}

void run_direct() {
  const Tensor<float> input = tensor(kBatch, kIn, kHeight, kWidth, -1, 1);
  const std::vector<float> weight(round_up(kOut, kPanel<float>) * kIn * 9, 1.0f);
  const DirectConv2d<float> op{input.view(),
                               weight.data(),
                               nullptr,
                               kBatch,
                               kIn,
                               kHeight,
                               kWidth,
                               kOut,
                               kHeight,
                               kWidth,
                               3,
                               3,
                               1,
                               1,
                               1,
                               1,
                               1,
                               1};
  std::vector<float> out(kBatch * kOut * kHeight * kWidth);
  run_out_of_memory("direct_conv2d", [&] {
    const DenseStore<false, float> store{out.data(), kOut, kHeight, kWidth};
    direct_conv2d<false, false>(op, DirectBlocking{12, 16, 0}, store);
  });
}

void run_attention() {
  constexpr int64_t kQueries = 40, kHeads = 3, kChannels = 20, kPixels = 9 * 11 + 2, kPoints = 5;
  const Tensor<float> value = tensor(2, kPixels, kHeads, kChannels, -1, 1);
  const Tensor<float> grad = tensor(2, kQueries, kHeads, kChannels, -1, 1);
  const Tensor<float> locations = tensor(2, kQueries, kHeads, 2 * kPoints, 0, 1);
  const Tensor<float> weights = tensor(2, kQueries, kHeads, kPoints, 0, 1);
  const int64_t sizes[] = {9, 11, 1, 2}, points[] = {4, 1};
  const View4d<float>& view = value.view();
  const DeformableAttention<float, float, float> op{
      {view.data, view.image, view.channel, view.row, view.column},
      locations.view().data,
      weights.view().data,
      sizes,
      points,
      2,
      2,
      kPixels,
      kQueries,
      kHeads,
      kChannels};
  std::vector<float> out(2 * kQueries * kHeads * kChannels), of_value(2 * kPixels * kHeads * kChannels);
  std::vector<float> of_locations(2 * kQueries * kHeads * 2 * kPoints), of_weights(2 * kQueries * kHeads * kPoints);
  const DeformableAttentionGradients<float, float, float> gradients{
      grad.view().data, of_value.data(), of_locations.data(), of_weights.data(), 1024};
  run_out_of_memory("multiscale_deformable_attention", [&] {
    const DenseStore<true, float> store{out.data(), kHeads * kChannels, 1, kQueries};
    multiscale_deformable_attention<false, false>(op, store);
  });
  run_out_of_memory("multiscale_deformable_attention_backward", [&] {
    multiscale_deformable_attention_backward<false, false>(op, gradients);
  });
}

}  // namespace

int main() {
  omp_set_num_threads(3);
  run_boxes();
  run_images();
  run_samples();
  run_regions();
  run_deform();
  run_separable();
  run_patches();
  run_winograd();
  run_direct();
  run_attention();
}
