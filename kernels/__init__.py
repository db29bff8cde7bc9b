"""One public function per op."""
