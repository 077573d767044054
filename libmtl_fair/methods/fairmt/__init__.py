"""FairMT: one fairness constraint over heterogeneous, partly labelled tasks (arXiv:2512.00469)."""
