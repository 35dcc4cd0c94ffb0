"""How each operator becomes C++ when Inductor compiles it."""
