//! Colours of maps: scales that people with any colour vision can read, with legends.

use egui::Color32;
use serde::{Deserialize, Serialize};

/// A colour scale for magnitudes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Palette {
    /// Dark blue through green to yellow.
    #[default]
    Viridis,
    /// Dark blue through grey to yellow; looks nearly the same to all people.
    Cividis,
}

impl Palette {
    /// The colour of a value from 0 to 1; what is no number is grey.
    pub fn colour(self, value: f32) -> Color32 {
        if value.is_nan() {
            return Color32::from_gray(128);
        }
        let gradient = match self {
            Palette::Viridis => colorous::VIRIDIS,
            Palette::Cividis => colorous::CIVIDIS,
        };
        let colour = gradient.eval_continuous(f64::from(value.clamp(0.0, 1.0)));
        Color32::from_rgb(colour.r, colour.g, colour.b)
    }

    /// The name shown to users.
    pub fn name(self) -> &'static str {
        match self {
            Palette::Viridis => "viridis",
            Palette::Cividis => "cividis",
        }
    }
}

/// The colour of a signed value from −1 to 1: purple, white, orange (ColorBrewer's PuOr).
pub fn diverging(value: f32) -> Color32 {
    if value.is_nan() {
        return Color32::from_gray(128);
    }
    let colour = colorous::PURPLE_ORANGE.eval_continuous(f64::from(value.clamp(-1.0, 1.0)).mul_add(0.5, 0.5));
    Color32::from_rgb(colour.r, colour.g, colour.b)
}

/// One of a few kinds (Okabe and Ito's colours), for domains, groups and the like.
pub fn kind(index: usize) -> Color32 {
    const COLOURS: [[u8; 3]; 8] = [
        [0, 114, 178],
        [230, 159, 0],
        [0, 158, 115],
        [204, 121, 167],
        [86, 180, 233],
        [213, 94, 0],
        [240, 228, 66],
        [120, 120, 120],
    ];
    let [r, g, b] = COLOURS[index % COLOURS.len()];
    Color32::from_rgb(r, g, b)
}

/// Black or white, whichever is readable on a colour.
pub fn text_on(background: Color32) -> Color32 {
    let [r, g, b, _] = background.to_array().map(f32::from);
    if 0.299 * r + 0.587 * g + 0.114 * b > 140.0 { Color32::BLACK } else { Color32::WHITE }
}
