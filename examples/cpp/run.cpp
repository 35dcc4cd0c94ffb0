// Runs an AOTInductor package (examples/export.py and examples/detect.py make some) with torch's libraries alone: no
// Python, no torchvision.
// Build it with build.sh; `run --help` says how to use it.

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

namespace {

// What a call of the model has freed serves the next call: otherwise glibc gives large blocks back to the kernel, which
// fills each page with zeros when it is used again. Other allocators keep memory by themselves, or cannot be told.
// inductor_vision.keep_memory() does the same in Python.
void keep_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);         // no block is mapped by itself
  mallopt(M_TRIM_THRESHOLD, -1);  // the heap never shrinks
  mallopt(M_TOP_PAD, 64 << 20);
  mallopt(M_ARENA_MAX, 1);  // all threads share that heap
#endif
}

constexpr const char* kUsage =
    R"(usage: run MODEL.pt2 [--shape 1x3x224x224] [--input FILE] [--output FOLDER] [--threads T] [--runs R]

Runs the model on a float32 tensor of that shape: on random numbers between 0 and 1, or on FILE, which holds them
raw, in native byte order. Prints the shape of each result, its checksum (the sum of all values), and the median time
of R runs (default 10). --output writes each result into a file of FOLDER as --input reads it. --threads 0, the
default, uses all cores.
)";

// Bad arguments or files, as opposed to a failure of the model.
struct UsageError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Arguments {
  std::string model, input, output;
  std::vector<int64_t> shape{1, 3, 224, 224};
  int64_t threads = 0, runs = 10;
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

std::vector<int64_t> parse_shape(const std::string& option, const std::string& text) {
  std::vector<int64_t> shape;
  std::istringstream sizes(text + 'x');
  for (std::string size; std::getline(sizes, size, 'x');) shape.push_back(parse_number(option, size, 1));
  return shape;
}

Arguments parse_arguments(const std::vector<std::string>& words) {
  Arguments arguments;
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& option = words[i];
    if (option.rfind("--", 0) != 0) {
      if (!arguments.model.empty())
        throw UsageError("one model is wanted, got '" + option + "' as well");
      arguments.model = option;
      continue;
    }
    const std::vector<std::string> known{"--shape", "--input", "--output", "--threads", "--runs"};
    if (std::find(known.begin(), known.end(), option) == known.end())
      throw UsageError("no option " + option);
    if (++i == words.size())
      throw UsageError(option + " wants a value");
    const std::string& value = words[i];
    if (option == "--shape")
      arguments.shape = parse_shape(option, value);
    if (option == "--input")
      arguments.input = value;
    if (option == "--output")
      arguments.output = value;
    if (option == "--threads")
      arguments.threads = parse_number(option, value, 0);
    if (option == "--runs")
      arguments.runs = parse_number(option, value, 1);
  }
  if (arguments.model.empty())
    throw UsageError("which model?");
  if (!std::ifstream(arguments.model))
    throw UsageError("cannot read " + arguments.model);
  return arguments;
}

at::Tensor make_input(const Arguments& arguments) {
  if (arguments.input.empty()) {
    at::manual_seed(0);
    return at::rand(arguments.shape);
  }
  at::Tensor tensor = at::empty(arguments.shape);
  std::ifstream file(arguments.input, std::ios::binary | std::ios::ate);
  if (!file)
    throw UsageError("cannot read " + arguments.input);
  const auto size = static_cast<int64_t>(file.tellg()), wanted = static_cast<int64_t>(tensor.nbytes());
  if (size != wanted) {
    throw UsageError(
        arguments.input + " holds " + std::to_string(size) + " bytes, the shape wants " + std::to_string(wanted));
  }
  file.seekg(0);
  file.read(static_cast<char*>(tensor.data_ptr()), wanted);
  return tensor;
}

// What the package calls its results (inductor_vision.export_detector gives them names), otherwise output0 and so on.
std::vector<std::string> output_names(torch::inductor::AOTIModelPackageLoader& model, size_t count) {
  std::vector<std::string> names;
  std::istringstream given(model.get_metadata()["outputs"]);
  for (std::string name; std::getline(given, name, ',');) names.push_back(name);
  for (size_t i = names.size(); i < count; ++i) names.push_back("output" + std::to_string(i));
  return names;
}

void write_output(const at::Tensor& tensor, const std::filesystem::path& path) {
  const at::Tensor values = tensor.to(at::kFloat).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(values.data_ptr()), static_cast<std::streamsize>(values.nbytes()));
  if (!file)
    throw UsageError("cannot write " + path.string());
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
  if (arguments.threads > 0)
    at::set_num_threads(static_cast<int>(arguments.threads));
  const c10::InferenceMode guard;
  const std::vector<at::Tensor> inputs{make_input(arguments)};
  torch::inductor::AOTIModelPackageLoader model(arguments.model);
  const std::vector<at::Tensor> outputs = model.run(inputs);
  const std::vector<std::string> names = output_names(model, outputs.size());

  for (size_t i = 0; i < outputs.size(); ++i) {
    std::string shape;
    for (const int64_t size : outputs[i].sizes()) shape += (shape.empty() ? "" : ", ") + std::to_string(size);
    std::printf(
        "%-16s  [%s], checksum %.9g\n", names[i].c_str(), shape.c_str(), outputs[i].sum(at::kDouble).item<double>());
  }
  std::printf("%-16s  %d\n", "threads", at::get_num_threads());
  std::printf("%-16s  %.3f ms\n", "time", median_milliseconds(model, inputs, arguments.runs));
  if (arguments.output.empty())
    return;
  std::filesystem::create_directories(arguments.output);
  for (size_t i = 0; i < outputs.size(); ++i) {
    write_output(outputs[i], std::filesystem::path(arguments.output) / names[i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> words(argv + 1, argv + argc);
  if (std::find(words.begin(), words.end(), "--help") != words.end()) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 0);  // a package checks shapes and types only when told to
  keep_memory();
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
