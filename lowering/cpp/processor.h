// Whether the processor at hand has the instructions that this source is compiled with.
//
// This runs before anything that may use them, so it is compiled for any processor, and calls nothing: what is inline
// elsewhere, as most of the C++ library, is compiled for the same processors as the rest of the source.
#ifndef INDUCTOR_VISION_PROCESSOR_H
#define INDUCTOR_VISION_PROCESSOR_H

#if defined(__x86_64__) && defined(__GNUC__)
// "no-sse3" stands for all that came later among the vector instructions.
#define INDUCTOR_VISION_ANY_PROCESSOR \
  __attribute__((noinline, target("no-sse3,no-popcnt,no-lzcnt,no-bmi,no-bmi2,no-movbe")))
#else
#define INDUCTOR_VISION_ANY_PROCESSOR
#endif

namespace [[gnu::visibility("hidden")]] inductor_vision {

// An error message that names what the processor lacks, or null if it lacks nothing.
//
// What the compiler may have used is what its macros say. Others than those of x86-64 are not looked for.
INDUCTOR_VISION_ANY_PROCESSOR inline const char* why_not_on_this_processor(const char* compiled_for) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
#define INDUCTOR_VISION_LACKS(name) __builtin_cpu_supports(name) ? "" : " " name
  const char* lacks[] = {
      "",
#if defined(__SSE4_2__)
      INDUCTOR_VISION_LACKS("sse4.2"),
#endif
#if defined(__POPCNT__)
      INDUCTOR_VISION_LACKS("popcnt"),
#endif
#if defined(__SSE4A__)
      INDUCTOR_VISION_LACKS("sse4a"),
#endif
#if defined(__AES__)
      INDUCTOR_VISION_LACKS("aes"),
#endif
#if defined(__PCLMUL__)
      INDUCTOR_VISION_LACKS("pclmul"),
#endif
#if defined(__AVX__)
      INDUCTOR_VISION_LACKS("avx"),
#endif
#if defined(__FMA4__)
      INDUCTOR_VISION_LACKS("fma4"),
#endif
#if defined(__XOP__)
      INDUCTOR_VISION_LACKS("xop"),
#endif
#if defined(__AVX2__)
      INDUCTOR_VISION_LACKS("avx2"),
#endif
#if defined(__FMA__)
      INDUCTOR_VISION_LACKS("fma"),
#endif
#if defined(__BMI__)
      INDUCTOR_VISION_LACKS("bmi"),
#endif
#if defined(__BMI2__)
      INDUCTOR_VISION_LACKS("bmi2"),
#endif
#if defined(__AVX512F__)
      INDUCTOR_VISION_LACKS("avx512f"),
#endif
#if defined(__AVX512BW__)
      INDUCTOR_VISION_LACKS("avx512bw"),
#endif
#if defined(__AVX512CD__)
      INDUCTOR_VISION_LACKS("avx512cd"),
#endif
#if defined(__AVX512DQ__)
      INDUCTOR_VISION_LACKS("avx512dq"),
#endif
#if defined(__AVX512VL__)
      INDUCTOR_VISION_LACKS("avx512vl"),
#endif
#if defined(__AVX512IFMA__)
      INDUCTOR_VISION_LACKS("avx512ifma"),
#endif
#if defined(__AVX512VBMI__)
      INDUCTOR_VISION_LACKS("avx512vbmi"),
#endif
#if defined(__AVX512VBMI2__)
      INDUCTOR_VISION_LACKS("avx512vbmi2"),
#endif
#if defined(__AVX512VNNI__)
      INDUCTOR_VISION_LACKS("avx512vnni"),
#endif
#if defined(__AVX512BITALG__)
      INDUCTOR_VISION_LACKS("avx512bitalg"),
#endif
#if defined(__AVX512VPOPCNTDQ__)
      INDUCTOR_VISION_LACKS("avx512vpopcntdq"),
#endif
#if defined(__AVX512BF16__)
      INDUCTOR_VISION_LACKS("avx512bf16"),
#endif
#if defined(__GFNI__)
      INDUCTOR_VISION_LACKS("gfni"),
#endif
#if defined(__VPCLMULQDQ__)
      INDUCTOR_VISION_LACKS("vpclmulqdq"),
#endif
// Older compilers do not know how to ask for the rest.
#if (defined(__clang__) && __clang_major__ >= 18) || (!defined(__clang__) && __GNUC__ >= 12)
#if defined(__F16C__)
      INDUCTOR_VISION_LACKS("f16c"),
#endif
#if defined(__LZCNT__)
      INDUCTOR_VISION_LACKS("lzcnt"),
#endif
#if defined(__MOVBE__)
      INDUCTOR_VISION_LACKS("movbe"),
#endif
#if defined(__AVXVNNI__)
      INDUCTOR_VISION_LACKS("avxvnni"),
#endif
#if defined(__AVX512FP16__)
      INDUCTOR_VISION_LACKS("avx512fp16"),
#endif
#if defined(__AMX_TILE__)
      INDUCTOR_VISION_LACKS("amx-tile"),
#endif
#if defined(__AMX_BF16__)
      INDUCTOR_VISION_LACKS("amx-bf16"),
#endif
#if defined(__AMX_INT8__)
      INDUCTOR_VISION_LACKS("amx-int8"),
#endif
#endif
  };
#undef INDUCTOR_VISION_LACKS
  static char message[1024];  // all names take half of it, `compiled_for` some hundred bytes
  char* end = message;
  bool complete = true;
  const char* words[] = {"this package was compiled for ", compiled_for, "; the processor at hand lacks"};
  for (const char* word : words) {
    while (*word != '\0') *end++ = *word++;
  }
  for (const char* word : lacks) {
    complete = complete && *word == '\0';
    while (*word != '\0') *end++ = *word++;
  }
  *end = '\0';
  return complete ? nullptr : message;
#else
  (void)compiled_for;
  return nullptr;
#endif
}

}  // namespace inductor_vision

#endif  // INDUCTOR_VISION_PROCESSOR_H
