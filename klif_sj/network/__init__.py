"""A network's neurons: where it holds them, and which of them are meant."""
