//! Which experts the tokens of a request chose, put together from what taps showed of its passes.

use moewe_plan::{DType, Numbers, Plan, Precision, ProgramKind, TapChoice, TapFrame, TapGroup};

use crate::{Error, Result};

/// The mixtures of experts of a model.
#[derive(Clone, Debug)]
pub(super) struct Routing {
    layers: Vec<u32>,
    top_k: usize,
}

impl Routing {
    pub(super) fn of(plan: &Plan) -> Self {
        Self { layers: plan.model.moe_layers.clone(), top_k: plan.model.num_experts_per_tok as usize }
    }

    /// The taps that show it.
    pub(super) fn taps(&self) -> TapChoice {
        let groups = if self.layers.is_empty() { Vec::new() } else { vec![(TapGroup::Routing, None)] };
        TapChoice { groups, timing: false }
    }

    /// Numbers that tell of one token.
    pub(super) fn row(&self) -> usize {
        self.layers.len() * self.top_k
    }

    /// Whether a session of this plan can tell; `watch` says whether it was made to be watched.
    pub(super) fn check(&self, plan: &Plan, precision: Precision, watch: bool) -> Result<()> {
        if self.layers.is_empty() {
            return Ok(());
        }
        let kind = ProgramKind::Watch;
        if !watch {
            return Err(Error::NotPrepared { kind, place: "session" });
        }
        if plan.model.experts > u32::from(u16::MAX) + 1 {
            return Err(Error::Request {
                what: format!("experts of {} can be told, not of {}", 1 << 16, plan.model.experts),
            });
        }
        let watched = plan.programs.iter().filter(|program| program.kind == kind && program.precision == precision);
        for program in watched {
            for &layer in &self.layers {
                let shows = program.taps.iter().any(|tap| {
                    let ids = plan.buffers[tap.buffer as usize].dtype == DType::U32;
                    tap.group == TapGroup::Routing && tap.layer == Some(layer) && ids
                });
                if !shows {
                    return Err(Error::NoTap { name: format!("routing:{layer}"), kind });
                }
            }
        }
        Ok(())
    }

    /// The chosen experts in a frame, layer by layer; `None` if it does not show all layers.
    fn read<'a>(&self, frame: &'a TapFrame) -> Option<Vec<&'a [u32]>> {
        let of = |layer: &u32| {
            frame.tensors.iter().find_map(|tensor| match &tensor.data {
                Numbers::U32(ids) => {
                    let is = tensor.group == TapGroup::Routing
                        && tensor.layer == Some(*layer)
                        && tensor.columns as usize == self.top_k;
                    is.then_some(&ids[..])
                }
                Numbers::F32(_) => None,
            })
        };
        self.layers.iter().map(of).collect()
    }
}

/// What is known of one request.
#[derive(Debug, Default)]
pub(super) struct Experts {
    /// `[positions, layers, num_experts_per_tok]`: what was not handed out yet.
    held: Vec<u16>,
    /// Positions that were handed out.
    handed: usize,
    /// Positions that are known: all up to here.
    known: usize,
}

impl Experts {
    /// Positions that are known.
    pub(super) fn known(&self) -> usize {
        self.known
    }

    /// Takes in what a frame shows of one position. What is known already is not taken twice, and nothing is taken behind
    /// a gap.
    pub(super) fn see(&mut self, routing: &Routing, frame: &TapFrame, row: usize) {
        if frame.tokens[row].position as usize != self.known {
            return;
        }
        let Some(layers) = routing.read(frame) else { return };
        for ids in layers {
            // There are no more experts than this holds: that was seen to before the request was taken.
            self.held.extend(ids[row * routing.top_k..][..routing.top_k].iter().map(|&id| id as u16));
        }
        self.known += 1;
    }

    /// Hands out what goes with so many new tokens behind those that were told: of the prompt, with the first of them, and of
    /// each of them. `None` if it is not all known.
    pub(super) fn take(&mut self, row: usize, prompt: usize, count: usize) -> Option<(Vec<u16>, Vec<u16>)> {
        if row == 0 {
            return Some((Vec::new(), Vec::new()));
        }
        let mut told = Vec::new();
        if self.handed == 0 {
            // The last token of the prompt tells of itself, and of the first one drawn.
            told = self.held.get(..prompt * row)?.to_vec();
            self.held.drain(..(prompt - 1) * row);
            self.handed = prompt - 1;
        }
        (self.held.len() >= count * row).then(|| {
            self.handed += count;
            (told, self.held.drain(..count * row).collect())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use moewe_plan::{FrameTensor, FrameToken};

    use super::*;

    /// Positions of two layers with two experts each: 10 · position, and so on.
    fn frame(positions: std::ops::Range<u32>) -> TapFrame {
        let tensor = |layer: u32, data| FrameTensor {
            name: Arc::from("ids"),
            group: TapGroup::Routing,
            layer: Some(layer),
            columns: 2,
            data,
        };
        let ids = |layer: u32| positions.clone().flat_map(|p| [p * 10 + layer, p * 10 + layer + 1]).collect();
        let token = |position| FrameToken { sequence: 1, position, id: 0 };
        let weights = tensor(1, Numbers::F32(vec![0.5; positions.len() * 2]));
        let tensors = vec![weights, tensor(4, Numbers::U32(ids(4))), tensor(1, Numbers::U32(ids(1)))];
        TapFrame { number: 0, tokens: positions.clone().map(token).collect(), tensors, times: None }
    }

    #[test]
    fn rows_are_taken_once_and_in_order() {
        let routing = Routing { layers: vec![1, 4], top_k: 2 };
        let row = |position: u16| [1, 2, 4, 5].map(|n| position * 10 + n);
        let rows = |positions: std::ops::Range<u16>| positions.flat_map(row).collect::<Vec<u16>>();
        let mut experts = Experts::default();
        let see = |experts: &mut Experts, positions: std::ops::Range<u32>| {
            let frame = frame(positions);
            (0..frame.tokens.len()).for_each(|row| experts.see(&routing, &frame, row));
        };
        see(&mut experts, 0..2);
        assert_eq!(experts.take(4, 3, 1), None, "the prompt's last token is missing");
        // Computed again from the start, further than before.
        see(&mut experts, 0..5);
        assert_eq!(experts.known(), 5);
        assert_eq!(experts.take(4, 3, 2), Some((rows(0..3), rows(2..4))));
        assert_eq!(experts.take(4, 3, 1), Some((Vec::new(), rows(4..5))));
        see(&mut experts, 6..8);
        assert_eq!((experts.known(), experts.take(4, 3, 1)), (5, None), "nothing behind a gap");
        see(&mut experts, 2..7);
        assert_eq!(experts.take(4, 3, 2), Some((Vec::new(), rows(5..7))));
        assert_eq!(Experts::default().take(0, 9, 4), Some((Vec::new(), Vec::new())), "a model without experts");
    }
}
