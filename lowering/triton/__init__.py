"""Triton kernels, for what Inductor's own Triton code cannot say: loops as long as data say, products of samples.

A file of an operator's family declares an aten program with such kernels in it (``triton_program_for`` in
``lowering/common/registry.py``). It is imported when Inductor generates Triton code for the first call of the family.
"""
