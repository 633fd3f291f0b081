"""Find the neurons of a network, select some of them, and report what was done to them."""
