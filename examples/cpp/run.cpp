// Runs an AOTInductor package (examples/export.py makes one) with torch's libraries alone: no Python, no torchvision.
// Build it with build.sh; `run --help` says how to use it.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

constexpr const char* kUsage =
    R"(usage: run MODEL.pt2 [--batch N] [--channels C] [--height H] [--width W]
                     [--input FILE] [--output FILE] [--threads T] [--runs R]

Runs the model on a float32 tensor of shape [N, C, H, W] (default 1, 3, 224, 224): on random numbers, or on
FILE, which holds them raw, in native byte order. Prints the output's shape, its checksum (the sum of all values)
and the median time of R runs (default 10). --output writes the result as --input reads it. --threads 0, the
default, uses all cores.
)";

// Bad arguments or files, as opposed to a failure of the model.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string model, input, output;
  int64_t batch = 1, channels = 3, height = 224, width = 224, threads = 0, runs = 10;
};

int64_t parse_number(const std::string& option, const std::string& text, int64_t least) {
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end || number < least) {
    throw UsageError(option + " must be an integer of at least " + std::to_string(least) + ", got '" + text + "'");
  }
  return number;
}

// Where an option that takes a number keeps it; null if there is no such option.
int64_t* number_option(Arguments& arguments, const std::string& option) {
  if (option == "--batch") return &arguments.batch;
  if (option == "--channels") return &arguments.channels;
  if (option == "--height") return &arguments.height;
  if (option == "--width") return &arguments.width;
  if (option == "--threads") return &arguments.threads;
  if (option == "--runs") return &arguments.runs;
  return nullptr;
}

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments arguments;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word.rfind("--", 0) != 0) {
      if (!arguments.model.empty()) throw UsageError("one model is wanted, got '" + word + "' as well");
      arguments.model = word;
      continue;
    }
    int64_t* number = number_option(arguments, word);
    if (number == nullptr && word != "--input" && word != "--output") throw UsageError("no option " + word);
    if (++i == words.size()) throw UsageError(word + " wants a value");
    if (number != nullptr) {
      *number = parse_number(word, words[i], word == "--threads" ? 0 : 1);
    } else {
      (word == "--input" ? arguments.input : arguments.output) = words[i];
    }
  }
  if (arguments.model.empty()) throw UsageError("which model?");
  if (!std::ifstream(arguments.model)) throw UsageError("cannot read " + arguments.model);
  return arguments;
}

at::Tensor make_input(const Arguments& arguments) {
  const std::vector<int64_t> shape{arguments.batch, arguments.channels, arguments.height, arguments.width};
  if (arguments.input.empty()) {
    at::manual_seed(0);
    return at::randn(shape);
  }
  at::Tensor tensor = at::empty(shape);
  std::ifstream file(arguments.input, std::ios::binary | std::ios::ate);
  if (!file) throw UsageError("cannot read " + arguments.input);
  const auto size = static_cast<int64_t>(file.tellg()), wanted = static_cast<int64_t>(tensor.nbytes());
  if (size != wanted) {
    throw UsageError(
        arguments.input + " holds " + std::to_string(size) + " bytes, the shape wants " + std::to_string(wanted));
  }
  file.seekg(0);
  file.read(static_cast<char*>(tensor.data_ptr()), wanted);
  return tensor;
}

void write_output(const at::Tensor& tensor, const std::string& path) {
  const at::Tensor values = tensor.to(at::kFloat).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(values.data_ptr()), static_cast<std::streamsize>(values.nbytes()));
  if (!file) throw UsageError("cannot write " + path);
}

double median_milliseconds(
    torch::inductor::AOTIModelPackageLoader& model, const std::vector<at::Tensor>& inputs, int64_t runs) {
  using Clock = std::chrono::steady_clock;
  std::vector<double> times;
  for (int64_t i = 0; i < runs; ++i) {
    const auto start = Clock::now();
    model.run(inputs);
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + runs / 2, times.end());
  return times[runs / 2];
}

void run(const Arguments& arguments) {
  if (arguments.threads > 0) at::set_num_threads(static_cast<int>(arguments.threads));
  const c10::InferenceMode guard;
  const std::vector<at::Tensor> inputs{make_input(arguments)};
  torch::inductor::AOTIModelPackageLoader model(arguments.model);
  const at::Tensor output = model.run(inputs).at(0);

  std::string shape;
  for (const int64_t size : output.sizes()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
  std::printf("output    [%s]\n", shape.c_str());
  std::printf("checksum  %.9g\n", output.sum(at::kDouble).item<double>());
  std::printf("threads   %d\n", at::get_num_threads());
  std::printf("time      %.3f ms\n", median_milliseconds(model, inputs, arguments.runs));
  if (!arguments.output.empty()) write_output(output, arguments.output);
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (std::find(words.begin(), words.end(), "--help") != words.end()) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // a package checks shapes and types only when told to
  try {
    run(parse_arguments(words));
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "run: %s (see run --help)\n", error.what());
    return 2;
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "run: the model failed: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run: the model failed: %s\n", error.what());
  }
  return 1;
}
