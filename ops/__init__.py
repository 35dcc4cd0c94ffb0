"""What each operator means: public function, module, argument checks, aten decomposition, gradient."""
