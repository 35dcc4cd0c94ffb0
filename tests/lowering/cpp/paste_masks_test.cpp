// Runs the kernel of paste_masks.h against a plain loop, to be built with sanitizers.
//
// Each call runs on several numbers of threads, which must give the same bits.  All memory is allocated to the exact
// size, so that AddressSanitizer sees any access beyond it; gaps between the elements of strided tensors are NaN, so
// that a read of one shows in the result.
//
// Prints one line of figures and exits with 0, or says which call failed and exits with 1.
#include "paste_masks.h"

#include <cinttypes>
#include <cstdio>

#include "harness.h"

namespace {

using harness::Figures;
using harness::kInf;
using harness::kLayouts;
using harness::kNaN;
using harness::Layout;
using harness::Numbers;
using harness::Random;
using harness::Results;
using harness::Sink;
using harness::Tensor;
using inductor_vision::accumulate_t;
using inductor_vision::Images;
using inductor_vision::PasteMasks;

// Around those of vectors, and of bands of rows.
constexpr int64_t kLengths[] = {1, 1, 2, 3, 7, 14, 15, 16, 17, 28, 30, 33};
constexpr int64_t kImageLengths[] = {0, 1, 2, 15, 16, 17, 33, 63, 64, 65, 130, 5000};
constexpr int64_t kFar[] = {
    -harness::kHuge, harness::kHuge, std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()};

struct Call {
  int64_t count, rows, columns, height, width;
  Layout layout;
  bool hostile;  // NaN and infinite, here and there; boxes that are far away

  std::string describe() const {
    char text[200];
    std::snprintf(
        text, sizeof text,
        "%" PRId64 " masks of %" PRId64 " x %" PRId64 " in %" PRId64 " x %" PRId64 ", layout %d, hostile %d", count,
        rows, columns, height, width, static_cast<int>(layout), hostile);
    return text;
  }
};

[[noreturn]] void fail(const char* type, const std::string& what, const Call& call) {
  std::printf("%s: %s\n  in %s\n", type, what.c_str(), call.describe().c_str());
  std::exit(1);
}

// Where pixel `at` of an image is among `source` pixels of a mask; false: it is not in the box.
template <typename acc_t>
bool place(int64_t at, int64_t begin, int64_t last, int64_t source, int64_t* whole, double* fraction) {
  begin = std::min(std::max(begin, -harness::kHuge), harness::kHuge);
  last = std::min(std::max(last, -harness::kHuge), harness::kHuge);
  if (at < begin || at > last) {
    return false;
  }
  const acc_t ratio = static_cast<acc_t>(source) / static_cast<acc_t>(last - begin + 1);
  const acc_t middle = static_cast<acc_t>(at - begin) + acc_t(0.5);
  const double exact = std::fma(static_cast<double>(ratio), static_cast<double>(middle), -0.5);
  const double where =
      std::min(std::max(static_cast<double>(static_cast<acc_t>(exact)), 0.0), static_cast<double>(source - 1));
  *whole = static_cast<int64_t>(where);
  *fraction = static_cast<double>(static_cast<acc_t>(where - std::floor(where)));
  return true;
}

template <typename scalar_t>
Numbers plain_loop(const Call& call, const Tensor<scalar_t>& masks, const std::vector<int64_t>& boxes) {
  using acc_t = accumulate_t<scalar_t>;
  Numbers out(call.count * call.height * call.width);
  for (int64_t i = 0; i < static_cast<int64_t>(out.sum.size()); ++i) {
    const int64_t n = i / call.width / call.height, y = i / call.width % call.height, x = i % call.width;
    const int64_t* box = boxes.data() + 4 * n;
    int64_t row, column;
    double down, right;
    if (!place<acc_t>(y, box[1], box[3], call.rows, &row, &down) ||
        !place<acc_t>(x, box[0], box[2], call.columns, &column, &right)) {
      continue;
    }
    for (int corner = 0; corner < 4; ++corner) {
      const double weight = (corner / 2 == 0 ? 1 - down : down) * (corner % 2 == 0 ? 1 - right : right);
      const int64_t at_row = std::min(row + corner / 2, call.rows - 1);
      const int64_t at_column = std::min(column + corner % 2, call.columns - 1);
      out.add(i, weight * masks(n, 0, at_row, at_column));
    }
  }
  return out;
}

template <typename scalar_t>
void check(const char* type, const Call& call, Random& random, Figures& figures) {
  using acc_t = accumulate_t<scalar_t>;
  Tensor<scalar_t> masks(call.count, 1, call.rows, call.columns, call.layout);
  masks.fill([&](int64_t, int64_t, int64_t, int64_t) {
    const double hostile[] = {kNaN, kInf, -kInf};
    return call.hostile && random.integer(0, 9) == 0 ? random.pick(hostile) : random.uniform(-1, 1);
  });
  std::vector<int64_t> boxes(4 * call.count);
  for (size_t i = 0; i < boxes.size(); ++i) {
    const int64_t length = i % 2 == 0 ? call.width : call.height;
    boxes[i] = call.hostile && random.integer(0, 5) == 0 ? random.pick(kFar) : random.integer(-9, length + 9);
  }
  ++figures.calls;
  const Numbers expected = plain_loop(call, masks, boxes);
  std::vector<acc_t> first;
  for (const int threads : {1, 2, 3}) {
    ++figures.runs;
    omp_set_num_threads(threads);
    Results<acc_t> out(call.count, 1, call.height, call.width);
    const PasteMasks<scalar_t> op{Images<scalar_t>{masks.view(), call.count, 1, call.rows, call.columns},
                                  boxes.data(),
                                  4,
                                  1,
                                  call.height,
                                  call.width};
    inductor_vision::paste_masks(op, Sink<acc_t>{&out, false});
    std::string complaint;
    if (!out.written(1, &complaint)) {
      fail(type, complaint, call);
    }
    if (threads == 1) {
      first = out.values();
      complaint = harness::complaint_of<acc_t>(first, expected, 5e-7, figures);
      if (!complaint.empty()) {
        fail(type, complaint, call);
      }
    } else if (!harness::same_bits(out.values(), first)) {
      fail(type, "other bits on " + std::to_string(threads) + " threads", call);
    }
  }
}

template <typename scalar_t>
void check_type(const char* type, int calls, Figures& figures) {
  Random random(sizeof(scalar_t) + 16 * std::is_same_v<scalar_t, at::Half>);
  for (int i = 0; i < calls; ++i) {
    const int64_t width = random.pick(kImageLengths);
    const int64_t height = width > 1000 ? random.integer(0, 9) : random.pick(kImageLengths) % 200;
    const Call call{random.integer(0, 4),  random.pick(kLengths),    random.pick(kLengths), height, width,
                    random.pick(kLayouts), random.integer(0, 2) == 0};
    check<scalar_t>(type, call, random, figures);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int calls = argc > 1 ? std::atoi(argv[1]) : 50;
  Figures figures;
  check_type<float>("float", calls, figures);
  check_type<double>("double", calls, figures);
  check_type<at::BFloat16>("bf16", calls, figures);
  check_type<at::Half>("fp16", calls, figures);
  figures.print();
  return 0;
}
