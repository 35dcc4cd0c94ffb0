"""Triton kernels, for what Inductor's own Triton code cannot say: loops as long as data say, products of samples.

A file of an operator's family declares, with :func:`inductor_vision.lowering.registry.triton_program_for`, an aten
program with such kernels in it. It is imported when Inductor generates Triton code for the first call of the family.
"""
