// What the kernels include of torch's, which is half of the time that their tests take to compile: to be precompiled.
#ifndef INDUCTOR_VISION_TEST_TORCH_HEADERS_H
#define INDUCTOR_VISION_TEST_TORCH_HEADERS_H

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#endif  // INDUCTOR_VISION_TEST_TORCH_HEADERS_H
