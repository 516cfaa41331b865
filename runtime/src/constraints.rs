//! What limits the draws of a sequence beside its sampling parameters: a mask of the tokens that may be drawn, and a bias
//! that is added to their logits.

use std::ops::Range;

use moewe_plan::{BIASED, MASKED, Role};

use crate::{Error, Result, SequenceId, Session};

/// Changed numbers of a bias that are no further apart than this are written together.
const GAP: usize = 64;
/// Where there would be more pieces than this, the whole bias is written.
const MOST_PIECES: usize = 32;

/// Mask and bias of a sequence, and what of them the device has to learn.
#[derive(Debug, Default)]
pub(crate) struct Constraints {
    /// Without it, every token may be drawn.
    mask: Option<Vec<u32>>,
    mask_changed: bool,
    /// A number for each token; empty as long as none was set.
    bias: Vec<f32>,
    /// Tokens whose numbers changed.
    bias_changed: Vec<u32>,
    /// Whether the device's row may hold more that is not so.
    row_unknown: bool,
}

impl Constraints {
    /// None yet. The device's row of biases may hold an earlier sequence's if `row_unknown`.
    pub(crate) fn new(row_unknown: bool) -> Self {
        Self { row_unknown, ..Self::default() }
    }

    /// As the sampling parameters have them.
    pub(crate) fn bits(&self) -> u32 {
        let mask = if self.mask.is_some() { MASKED } else { 0 };
        let bias = if self.bias.is_empty() { 0 } else { BIASED };
        mask | bias
    }

    /// Notes that the device has to be told everything again.
    pub(crate) fn all_changed(&mut self) {
        self.mask_changed = true;
        self.row_unknown = true;
    }

    /// Notes that the device was told. Returns whether its row of biases was written.
    pub(crate) fn uploaded(&mut self) -> bool {
        self.mask_changed = false;
        if self.bias.is_empty() {
            return false;
        }
        self.bias_changed.clear();
        self.row_unknown = false;
        true
    }

    /// Where the device's row of biases is not what it should be.
    fn bias_pieces(&self) -> Vec<Range<usize>> {
        let whole = 0..self.bias.len();
        if self.bias.is_empty() || (self.bias_changed.is_empty() && !self.row_unknown) {
            return Vec::new();
        }
        if self.row_unknown {
            return vec![whole];
        }
        let mut changed: Vec<usize> = self.bias_changed.iter().map(|&token| token as usize).collect();
        changed.sort_unstable();
        let mut pieces: Vec<Range<usize>> = Vec::new();
        for token in changed {
            match pieces.last_mut() {
                Some(last) if token <= last.end + GAP => last.end = last.end.max(token + 1),
                _ => pieces.push(token..token + 1),
            }
        }
        if pieces.len() > MOST_PIECES { vec![whole] } else { pieces }
    }
}

impl Session {
    /// Lets only tokens of `mask` be drawn for a sequence from the next run on, until another mask is set: token i may be
    /// if bit i % 32 of word i / 32 is set. Without a mask all may be. A sequence begins without one. Bits that are of no
    /// token do not count.
    ///
    /// A mask holds for every draw of a run, those behind drafts and later ones of a burst included. Where it depends on
    /// what was drawn, runs are to draw one token each.
    ///
    /// # Errors
    /// [`Error::Mask`] if `mask` does not have ⌈vocabulary / 32⌉ words, or no token.
    pub fn set_mask(&mut self, sequence: SequenceId, mask: Option<&[u32]>) -> Result<()> {
        let vocab_size = self.model.plan().model.vocab_size;
        if let Some(mask) = mask {
            self.has_role(Role::Mask)?;
            check_mask(mask, vocab_size)?;
        }
        let sequence = self.slots.get_mut(sequence)?;
        let constraints = &mut sequence.constraints;
        let bits = constraints.bits();
        match (&mut constraints.mask, mask) {
            (Some(old), Some(new)) if old == new => {}
            (Some(old), Some(new)) => {
                old.copy_from_slice(new);
                constraints.mask_changed = true;
            }
            (old, new) => {
                *old = new.map(<[u32]>::to_vec);
                constraints.mask_changed = true;
            }
        }
        sequence.changed.sampling |= bits != sequence.constraints.bits();
        Ok(())
    }

    /// Sets what is added to the logits of these tokens in draws for a sequence, from the next run on. Others keep what
    /// they have, which is 0 at first. Of entries of one token the last counts.
    ///
    /// # Errors
    /// [`Error::Bias`] if a token is not of the vocabulary, or a number is not finite; nothing has changed then.
    pub fn set_bias(&mut self, sequence: SequenceId, entries: &[(u32, f32)]) -> Result<()> {
        let vocab_size = self.model.plan().model.vocab_size;
        for &(token, bias) in entries {
            if token >= vocab_size {
                return Err(Error::Bias { what: format!("token {token}, the vocabulary has {vocab_size}") });
            }
            if !bias.is_finite() {
                return Err(Error::Bias { what: format!("{bias} for token {token}, a finite number expected") });
            }
        }
        if !entries.is_empty() {
            self.has_role(Role::Bias)?;
        }
        let sequence = self.slots.get_mut(sequence)?;
        let constraints = &mut sequence.constraints;
        let bits = constraints.bits();
        for &(token, bias) in entries {
            constraints.bias.resize(vocab_size as usize, 0.0);
            let old = &mut constraints.bias[token as usize];
            if old.to_bits() != bias.to_bits() {
                *old = bias;
                constraints.bias_changed.push(token);
            }
        }
        sequence.changed.sampling |= bits != sequence.constraints.bits();
        Ok(())
    }

    /// Writes what changed of the mask and the bias of the sequence in a slot.
    pub(crate) fn upload_constraints(&self, slot: usize, constraints: &Constraints) {
        let vocab_size = self.model.plan().model.vocab_size;
        if let Some(mask) = constraints.mask.as_ref().filter(|_| constraints.mask_changed) {
            self.write(Role::Mask, slot * mask.len(), mask);
        }
        for piece in constraints.bias_pieces() {
            let words = bytemuck::cast_slice(&constraints.bias[piece.clone()]);
            self.write(Role::Bias, slot * vocab_size as usize + piece.start, words);
        }
    }

    /// Whether a program in use reads a buffer of this role: what is written elsewhere would be without effect.
    fn has_role(&self, role: Role) -> Result<()> {
        match self.buffers.role(role) {
            Some(_) => Ok(()),
            None => Err(Error::Plan { what: format!("the programs of the session have no buffer {role:?}") }),
        }
    }
}

/// Whether a mask fits a vocabulary and has a token.
fn check_mask(mask: &[u32], vocab_size: u32) -> Result<()> {
    let words = vocab_size.div_ceil(32) as usize;
    if mask.len() != words {
        let what = format!("{} words, a vocabulary of {vocab_size} tokens has {words}", mask.len());
        return Err(Error::Mask { what });
    }
    let (last, others) = mask.split_last().expect("a vocabulary has tokens");
    let within = u32::MAX >> (words as u32 * 32 - vocab_size);
    if last & within == 0 && others.iter().all(|&word| word == 0) {
        return Err(Error::Mask { what: "no token may be drawn".into() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_written() {
        let mut constraints = Constraints::new(false);
        assert!(constraints.bias_pieces().is_empty() && !constraints.uploaded());
        constraints.bias = vec![0.0; 100_000];
        constraints.bias_changed = vec![99_999, 7, 70, 7, 200];
        assert_eq!(constraints.bias_pieces(), [7..71, 200..201, 99_999..100_000]);
        assert!(constraints.uploaded() && constraints.bias_pieces().is_empty());
        let whole = 0..100_000;
        constraints.bias_changed = (0..33).map(|i| i * 1000).collect();
        assert_eq!(constraints.bias_pieces(), vec![whole.clone()]);
        constraints.bias_changed.pop();
        assert_eq!(constraints.bias_pieces().len(), 32);
        // After a failure, or in a row that another sequence had, everything is.
        constraints.uploaded();
        constraints.all_changed();
        assert_eq!(constraints.bias_pieces(), vec![whole.clone()]);
        let mut heir = Constraints::new(true);
        assert!(heir.bias_pieces().is_empty(), "a row that nobody reads may hold anything");
        assert!(!heir.uploaded());
        (heir.bias, heir.bias_changed) = (vec![0.0; 10], vec![3]);
        let row = 0..10;
        assert_eq!(heir.bias_pieces(), vec![row]);
    }

    #[test]
    fn masks_are_checked() {
        for (mask, vocab_size, sound) in [
            (&[0, 1][..], 33, true),
            (&[0, 2], 33, false),
            (&[0, 0], 33, false),
            (&[0, 1 << 31], 64, true),
            (&[1 << 31], 32, true),
            (&[1 << 31], 31, false),
            (&[1, 0], 32, false),
            (&[1], 33, false),
            (&[], 1, false),
        ] {
            let checked = check_mask(mask, vocab_size);
            assert_eq!(checked.is_ok(), sound, "{mask:?} of {vocab_size}");
            assert!(sound || matches!(checked, Err(Error::Mask { .. })));
        }
    }
}
