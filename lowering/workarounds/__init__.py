"""Faults of torch's, and the ways around them, a module for each.

A module begins with the fault, the releases of torch in which it was seen, and the way around. A test of it is called
``test_torch_still_needs_this``, or is in a class of that name: it shows the fault, with nothing worked around, and so
fails with the first torch that has none. Where an older torch that has it is still served, the test is skipped from
there on; where none is, module and test go.
"""
