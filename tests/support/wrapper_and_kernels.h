// What C++ that Inductor generates includes, with cpp_wrapper: to be precompiled, see tests/conftest.py.
#include <torch/csrc/inductor/cpp_wrapper/cpu.h>

#include <torch/csrc/inductor/cpp_prefix.h>
