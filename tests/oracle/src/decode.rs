//! Greedy decoding, plain and speculative. Spec §7.

use crate::Trace;
use crate::model::{Cache, Model};

impl Model {
    /// The `n` tokens that greedy decoding appends to the prompt.
    pub fn greedy(&self, tokens: &[u32], n: usize) -> Vec<u32> {
        let (mut cache, mut out) = (Cache::default(), Vec::new());
        let mut next = tokens.to_vec();
        while out.len() < n {
            let token = self.last_argmax(&self.forward(&next, &mut cache).logits);
            out.push(token);
            next = vec![token];
        }
        out
    }

    /// Lossless greedy decoding with one draft from each MTP module a step: the `n` appended tokens, and the accepted
    /// drafts of each verification pass.
    pub fn speculative(&self, tokens: &[u32], n: usize) -> (Vec<u32>, Vec<usize>) {
        let (layers, width) = (self.config.layers, self.config.hidden);
        let (mut cache, mut accepted) = (Cache::default(), Vec::new());
        let output = self.forward(tokens, &mut cache);
        let mut verified = tokens.to_vec();
        verified.push(self.last_argmax(&output.logits));
        let mut hidden = output.hidden; // h⁰ of every position the main model has processed and kept

        while verified.len() - tokens.len() < n {
            let processed = verified.len() - 1;
            let drafts = self.draft(&verified, &hidden);
            let pass = [&verified[processed..], &drafts].concat();
            let output = self.forward(&pass, &mut cache);
            let agrees = |&(i, &draft): &(usize, &u32)| self.row_argmax(&output.logits, i) == draft;
            let good = drafts.iter().enumerate().take_while(agrees).count();

            accepted.push(good);
            verified.extend(&drafts[..good]);
            verified.push(self.row_argmax(&output.logits, good));
            hidden.extend(&output.hidden[..(good + 1) * width]);
            // Rejected drafts leave the latent cache again.
            cache.truncate(0..layers, processed + 1 + good);
        }
        (verified[tokens.len()..][..n].to_vec(), accepted)
    }

    /// One draft from each module, given the verified tokens and h⁰ of all but the last. Every module starts afresh
    /// each time: slow, but there are no stale rows to think about.
    fn draft(&self, verified: &[u32], hidden: &[f64]) -> Vec<u32> {
        let (rows, mut cache) = (verified.len() - 1, Cache::default());
        let (mut extended, mut carried) = (verified.to_vec(), hidden.to_vec());
        for j in 1..=self.config.mtp_modules {
            let output = self.mtp(j, &carried, &extended[j..j + rows], &mut cache, &mut Trace::new());
            extended.push(self.last_argmax(&output.logits));
            carried = output.hidden;
        }
        extended.split_off(verified.len())
    }
}
