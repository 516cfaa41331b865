//! Views of expert routing and attention latents over what a plan's taps show. Nothing stands here yet: `moewe trace` and
//! `moewe run --heatmap` are the ways to look inside until it does.
