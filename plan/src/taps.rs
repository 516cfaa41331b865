//! Which taps a user wants: `routing,latents:3` and the like.

use std::str::FromStr;

use crate::{TapGroup, TapSpec};

/// A choice of taps by group and layer, and whether steps are timed. Written as a comma-separated list of `GROUP` or
/// `GROUP:LAYER`; `all` and `none` are possible, too, and `timing` asks for times.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapChoice {
    /// Groups, each with one layer or with all.
    pub groups: Vec<(TapGroup, Option<u32>)>,
    /// Whether the steps of each run are timed.
    pub timing: bool,
}

impl TapChoice {
    /// Everything.
    pub fn all() -> Self {
        Self { groups: TapGroup::ALL.map(|group| (group, None)).to_vec(), timing: true }
    }

    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether nothing is chosen.
    pub fn is_none(&self) -> bool {
        self.groups.is_empty() && !self.timing
    }

    /// Whether a group is wanted at a layer. A tap without a layer is wanted with its group.
    pub fn wants(&self, group: TapGroup, layer: Option<u32>) -> bool {
        let matches = |only: Option<u32>| only.is_none() || layer.is_none() || only == layer;
        self.groups.iter().any(|&(g, only)| g == group && matches(only))
    }

    /// Whether a tap is wanted.
    pub fn wants_tap(&self, tap: &TapSpec) -> bool {
        self.wants(tap.group, tap.layer)
    }
}

impl FromStr for TapChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut choice = Self::none();
        for part in text.split(',').map(str::trim) {
            match part {
                "all" => return if text.trim() == "all" { Ok(Self::all()) } else { Err(alone("all")) },
                "none" => return if text.trim() == "none" { Ok(Self::none()) } else { Err(alone("none")) },
                "timing" => choice.timing = true,
                _ => choice.groups.push(group_and_layer(part)?),
            }
        }
        Ok(choice)
    }
}

fn alone(word: &str) -> String {
    format!("`{word}` stands alone")
}

fn group_and_layer(part: &str) -> Result<(TapGroup, Option<u32>), String> {
    let (name, layer) = part.split_once(':').map_or((part, None), |(name, layer)| (name, Some(layer)));
    let group = TapGroup::ALL.into_iter().find(|group| group.name() == name).ok_or_else(|| {
        let names: Vec<&str> = TapGroup::ALL.iter().map(|group| group.name()).collect();
        format!("{name:?} is no group of taps; there are {}, timing, all and none", names.join(", "))
    })?;
    let layer = layer.map(|layer| layer.parse().map_err(|_| format!("{layer:?} is no layer; expected {name}:3")));
    Ok((group, layer.transpose()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_layers_and_words_are_understood() {
        let choice: TapChoice = "routing,latents:3,timing".parse().unwrap();
        assert!(choice.timing && choice.wants(TapGroup::Routing, Some(7)) && choice.wants(TapGroup::Latents, Some(3)));
        assert!(!choice.wants(TapGroup::Latents, Some(4)) && !choice.wants(TapGroup::Hidden, None));
        assert_eq!("all".parse(), Ok(TapChoice::all()));
        assert!("none".parse::<TapChoice>().unwrap().is_none());
        for wrong in ["", "rooting", "latents:x", "all,routing", "none,timing"] {
            assert!(wrong.parse::<TapChoice>().is_err(), "{wrong}");
        }
    }
}
