//! moewe-plan
