//! moewe-runtime
