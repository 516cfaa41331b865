//! Changes to a running model: muted, forced and scaled experts, pinned choices, latent directions and heads that are
//! zeroed. An edit becomes values of the plan's parameters; nothing is compiled again.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{ModelInfo, Parameter, ParameterKind, Plan};

/// Value of [`ParameterKind::ExpertOffset`] that takes an expert out.
pub const MUTED: f32 = -1e30;
/// Value of [`ParameterKind::ExpertOffset`] that chooses an expert whatever its score.
pub const FORCED: f32 = 1e30;

/// Which layer, and which expert, latent direction or head of it; written `LAYER:NUMBER`, with `*` for all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The layer; all that have such a thing without it.
    pub layer: Option<u32>,
    /// Number of the expert, the direction or the head.
    pub number: u32,
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no place; expected LAYER:NUMBER, such as 3:17, or *:17 for all layers");
        let (layer, number) = text.split_once(':').ok_or_else(wrong)?;
        Ok(Self {
            layer: parse_layer(layer).map_err(|()| wrong())?,
            number: number.trim().parse().map_err(|_| wrong())?,
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "{layer}:{}", self.number),
            None => write!(f, "*:{}", self.number),
        }
    }
}

fn parse_layer(text: &str) -> Result<Option<u32>, ()> {
    match text.trim() {
        "*" => Ok(None),
        number => Ok(Some(number.parse().map_err(|_| ())?)),
    }
}

/// One change. Written as in `mute 3:17`, `force *:17`, `scale 3:17=0.5`, `pin 3:1+5+8+17`, `zero latent 3:7` and
/// `zero head *:2`; such text can be parsed, too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Edit {
    /// Takes an expert out: it is never chosen, and the next best is.
    Mute(Place),
    /// Chooses an expert for every token, in the place of the worst of the others.
    Force(Place),
    /// Multiplies what an expert adds.
    Scale(Place, f32),
    /// Chooses exactly these experts for every token of a layer (all layers without it); weights are the router's.
    Pin(Option<u32>, Vec<u32>),
    /// Zeroes a number of the latent.
    ZeroLatent(Place),
    /// Zeroes what an attention head gives.
    ZeroHead(Place),
}

impl Edit {
    /// Parses `LAYER:NUMBER=FACTOR`.
    pub fn parse_scale(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: expected LAYER:EXPERT=FACTOR, such as 3:17=0.5");
        let (place, factor) = text.split_once('=').ok_or_else(wrong)?;
        let factor: f32 = factor.trim().parse().map_err(|_| wrong())?;
        if !factor.is_finite() {
            return Err(wrong());
        }
        Ok(Edit::Scale(place.parse()?, factor))
    }

    /// Parses `LAYER:E1+E2+…`.
    pub fn parse_pin(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?}: expected LAYER:EXPERT+EXPERT+…, such as 3:1+5+8+17");
        let (layer, experts) = text.split_once(':').ok_or_else(wrong)?;
        let experts: Result<Vec<u32>, _> = experts.split('+').map(|expert| expert.trim().parse()).collect();
        Ok(Edit::Pin(parse_layer(layer).map_err(|()| wrong())?, experts.map_err(|_| wrong())?))
    }
}

impl std::str::FromStr for Edit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (verb, object) = words(text);
        match verb {
            "mute" => Ok(Edit::Mute(object.parse()?)),
            "force" => Ok(Edit::Force(object.parse()?)),
            "scale" => Self::parse_scale(object),
            "pin" => Self::parse_pin(object),
            "zero" => match words(object) {
                ("latent", place) => Ok(Edit::ZeroLatent(place.parse()?)),
                ("head", place) => Ok(Edit::ZeroHead(place.parse()?)),
                _ => Err(format!("{text:?}: expected zero latent LAYER:NUMBER or zero head LAYER:HEAD")),
            },
            _ => Err(format!(
                "{text:?} is no change; expected mute 3:17, force 3:17, scale 3:17=0.5, pin 3:1+5+8+17, zero latent 3:7 \
                 or zero head 3:2, with * for all layers"
            )),
        }
    }
}

/// The first word and what is behind it.
fn words(text: &str) -> (&str, &str) {
    let text = text.trim();
    let (first, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    (first, rest.trim_start())
}

impl fmt::Display for Edit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Edit::Mute(place) => write!(f, "mute {place}"),
            Edit::Force(place) => write!(f, "force {place}"),
            Edit::Scale(place, factor) => write!(f, "scale {place}={factor}"),
            Edit::Pin(layer, experts) => {
                let experts: Vec<String> = experts.iter().map(u32::to_string).collect();
                let layer = layer.map_or("*".to_owned(), |layer| layer.to_string());
                write!(f, "pin {layer}:{}", experts.join("+"))
            }
            Edit::ZeroLatent(place) => write!(f, "zero latent {place}"),
            Edit::ZeroHead(place) => write!(f, "zero head {place}"),
        }
    }
}

/// An edit that the model has no place for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{edit}: {what}")]
pub struct EditError {
    /// The edit, as it is written.
    pub edit: String,
    /// What was found and what is possible.
    pub what: String,
}

/// The values of all parameters of a plan (by index into [`Plan::parameters`]) under these edits, in their order; what no
/// edit touches is neutral.
pub fn parameter_values(plan: &Plan, edits: &[Edit]) -> Result<Vec<Vec<f32>>, EditError> {
    values_of(&plan.model, &plan.parameters, edits)
}

/// Whether a model has a place for these edits, as [`parameter_values`] will find if all of its decoder layers can be
/// changed. Needs memory for as many numbers as that.
pub fn check_edits(model: &ModelInfo, edits: &[Edit]) -> Result<(), EditError> {
    let of = |kind, layer, len| Parameter { kind, layer, buffer: 0, len };
    let experts = model.moe_layers.iter().flat_map(|&layer| {
        [ParameterKind::ExpertOffset, ParameterKind::ExpertScale].map(|kind| of(kind, layer, model.experts))
    });
    let attention = (0..model.layers).flat_map(|layer| {
        [
            of(ParameterKind::LatentScale, layer, model.kv_lora_rank),
            of(ParameterKind::HeadScale, layer, model.num_attention_heads),
        ]
    });
    values_of(model, &experts.chain(attention).collect::<Vec<_>>(), edits).map(drop)
}

fn values_of(model: &ModelInfo, parameters: &[Parameter], edits: &[Edit]) -> Result<Vec<Vec<f32>>, EditError> {
    let neutral = |parameter: &Parameter| vec![parameter.kind.neutral(); parameter.len as usize];
    let mut values: Vec<Vec<f32>> = parameters.iter().map(neutral).collect();
    for edit in edits {
        apply(model, parameters, edit, &mut values).map_err(|what| EditError { edit: edit.to_string(), what })?;
    }
    check_choices(model, parameters, &values)?;
    Ok(values)
}

fn apply(model: &ModelInfo, parameters: &[Parameter], edit: &Edit, values: &mut [Vec<f32>]) -> Result<(), String> {
    let mut set = |kind, place, value| set(model, parameters, kind, place, value, values);
    match edit {
        Edit::Mute(place) => set(ParameterKind::ExpertOffset, *place, MUTED),
        Edit::Force(place) => set(ParameterKind::ExpertOffset, *place, FORCED),
        Edit::Scale(place, factor) => set(ParameterKind::ExpertScale, *place, *factor),
        Edit::ZeroLatent(place) => set(ParameterKind::LatentScale, *place, 0.0),
        Edit::ZeroHead(place) => set(ParameterKind::HeadScale, *place, 0.0),
        Edit::Pin(layer, experts) => {
            let wanted = model.num_experts_per_tok as usize;
            let distinct = experts.iter().enumerate().all(|(i, expert)| !experts[..i].contains(expert));
            if experts.len() != wanted || !distinct {
                return Err(format!("{} experts, expected {wanted} different ones", experts.len()));
            }
            let mut pin = |&number| set(ParameterKind::ExpertOffset, Place { layer: *layer, number }, FORCED);
            experts.iter().try_for_each(&mut pin)
        }
    }
}

fn set(
    model: &ModelInfo,
    parameters: &[Parameter],
    kind: ParameterKind,
    place: Place,
    value: f32,
    values: &mut [Vec<f32>],
) -> Result<(), String> {
    let of_kind = |parameter: &&Parameter| parameter.kind == kind;
    let mut found = false;
    for (parameter, values) in parameters.iter().zip(values.iter_mut()).filter(|(p, _)| of_kind(p)) {
        if place.layer.is_none_or(|layer| layer == parameter.layer) {
            let number = place.number as usize;
            let Some(slot) = values.get_mut(number) else {
                return Err(format!("there is no number {number}, expected 0 to {}", parameter.len.saturating_sub(1)));
            };
            *slot = value;
            found = true;
        }
    }
    if found {
        return Ok(());
    }
    let of_experts = matches!(kind, ParameterKind::ExpertOffset | ParameterKind::ExpertScale);
    let layers: Vec<u32> = parameters.iter().filter(of_kind).map(|p| p.layer).collect();
    Err(if layers.is_empty() && of_experts && model.moe_layers.is_empty() {
        "the model has no routed experts".into()
    } else if layers.is_empty() {
        "the bundle has no such parameter; compile it with taps".into()
    } else {
        format!("no such layer; the layers that have it are {}", ranges(&layers))
    })
}

/// Ascending numbers, runs of three and more as `3 to 60`.
fn ranges(numbers: &[u32]) -> String {
    let runs = numbers.chunk_by(|before, next| before.checked_add(1) == Some(*next));
    let words = runs.flat_map(|run| match run {
        [first, _, .., last] => vec![format!("{first} to {last}")],
        few => few.iter().map(u32::to_string).collect(),
    });
    words.collect::<Vec<_>>().join(", ")
}

/// An error if a layer has too few experts left or more forced than it chooses.
fn check_choices(model: &ModelInfo, parameters: &[Parameter], values: &[Vec<f32>]) -> Result<(), EditError> {
    let top_k = model.num_experts_per_tok as usize;
    let mut wrong: BTreeMap<u32, String> = BTreeMap::new();
    for (parameter, values) in parameters.iter().zip(values) {
        if parameter.kind == ParameterKind::ExpertOffset {
            let left = values.iter().filter(|&&value| value > MUTED).count();
            let forced = values.iter().filter(|&&value| value >= FORCED).count();
            if left < top_k {
                wrong.insert(parameter.layer, format!("{left} experts are left, at least {top_k} are needed"));
            } else if forced > top_k {
                wrong.insert(parameter.layer, format!("{forced} experts are forced, at most {top_k} can be"));
            }
        }
    }
    match wrong.pop_first() {
        None => Ok(()),
        Some((layer, what)) => Err(EditError { edit: format!("layer {layer}"), what }),
    }
}
