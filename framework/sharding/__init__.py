"""Who holds what: one protocol, and the engines that implement it."""
