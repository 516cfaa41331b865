//! Slow, plain reference of every operation, in f64.
