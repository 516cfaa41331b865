//! moewe-viewer
