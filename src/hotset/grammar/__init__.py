"""Which tokens may follow, where an output has a form to keep."""
