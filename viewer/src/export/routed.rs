//! The experts of each token, as serving engines return them.

use std::path::Path;

use super::Error;
use super::npz::write_arrays;
use crate::store::Sequence;
use crate::subject::Subject;

/// Writes the chosen experts of a text as vLLM returns them with `enable_return_routed_experts`:
/// `prompt_routed_experts` (int16 `[prompt tokens, mixture-of-experts layers, num_experts_per_tok]`) and
/// `routed_experts` (the same for generated tokens), the best expert first; −1 where nothing was seen, as at the last
/// token, which no pass has read. Beside them `prompt_token_ids` and `token_ids` (int32) and `layers` (int32, which
/// layers these are).
///
/// # Errors
/// [`Error::Nothing`] if no routing of the text is held or an expert's number does not fit, [`Error::Exists`],
/// [`Error::Write`].
pub fn routed_experts(sequence: &Sequence, subject: &Subject, path: &Path, overwrite: bool) -> Result<(), Error> {
    let model = &subject.model;
    let (layers, top_k) = (&model.moe_layers, model.num_experts_per_tok as usize);
    if model.experts > i16::MAX as u32 + 1 {
        return Err(Error::nothing(path, format!("{} experts do not fit into 16 bits", model.experts)));
    }
    let mut experts = Vec::with_capacity(sequence.tokens.len() * layers.len() * top_k);
    for position in 0..sequence.tokens.len() {
        for &layer in layers {
            let ids = sequence.routing(layer, position).map_or(&[][..], |(ids, _)| ids);
            let known = ids.iter().map(|&id| i16::try_from(id).unwrap_or(-1));
            experts.extend(known.chain(std::iter::repeat(-1)).take(top_k));
        }
    }
    if experts.iter().all(|expert| *expert < 0) {
        return Err(Error::nothing(path, "no routing of this text is held; watch it with --taps routing"));
    }
    let prompt = (sequence.info.prompt_tokens as usize).min(sequence.tokens.len());
    let tokens: Vec<i32> = sequence.tokens.iter().map(|token| token.id as i32).collect();
    let numbers: Vec<i32> = layers.iter().map(|layer| *layer as i32).collect();
    let (first, rest) = experts.split_at(prompt * layers.len() * top_k);
    write_arrays(path, overwrite, |arrays| {
        arrays.add("prompt_routed_experts", &[prompt, layers.len(), top_k], first)?;
        arrays.add("routed_experts", &[tokens.len() - prompt, layers.len(), top_k], rest)?;
        arrays.add("prompt_token_ids", &[prompt], &tokens[..prompt])?;
        arrays.add("token_ids", &[tokens.len() - prompt], &tokens[prompt..])?;
        arrays.add("layers", &[numbers.len()], &numbers)
    })
}
