//! moewe-compiler
