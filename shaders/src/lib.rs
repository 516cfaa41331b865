//! moewe-shaders
