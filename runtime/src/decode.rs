//! Running sequences forward: prompts in chunks, then tokens that feed back on the device.

use moewe_plan::{FINISHED_STEPS, POISONED, ProgramKind, Role, TokenInfo};

use crate::memory::Buffer;
use crate::session::LastRun;
use crate::{Batch, Error, Result, SequenceId, Session};

/// Most steps of one [`Session::decode`].
pub const MAX_BURST: u32 = FINISHED_STEPS;

/// Runs in one submission, so that the device begins while the next ones are recorded, and no submission is so
/// long that a driver would think the device hangs.
const RUNS_PER_SUBMISSION: u32 = 4;

/// Sampled tokens that wait in the ring on the device.
struct Waiting {
    /// Number of the run among those that the device counts.
    run: u32,
    /// Words of one entry of the ring.
    stride: usize,
    /// For each row, whose token it is (index into the caller's list).
    owners: Vec<usize>,
}

impl Session {
    /// Runs all tokens of these sequences that were not run yet, packed into batches of at most `chunk` tokens
    /// (as many as the largest program takes, without it), and samples the next token of each, in their order.
    pub fn prefill(&mut self, sequences: &[SequenceId], chunk: Option<usize>) -> Result<Vec<u32>> {
        distinct(sequences)?;
        let mut wanted = Vec::with_capacity(sequences.len());
        for &id in sequences {
            wanted.push((id, self.slots.get(id)?.tokens.len()));
        }
        let kind = self.forward_kind();
        let (mut max_tokens, max_rows) = self.capacity(kind)?;
        let drafts = self.ensure_with_drafts(&wanted, 1)?;
        if drafts {
            max_tokens = max_tokens.min(self.draft_capacity()?);
        }
        let chunk = chunk.unwrap_or(max_tokens).clamp(1, max_tokens);
        let mut at: Vec<usize> = sequences.iter().map(|&id| self.cached(id)).collect::<Result<_>>()?;
        let mut sampled = vec![0; sequences.len()];
        let mut waiting: Vec<Waiting> = Vec::new();
        let mut submissions = 0;
        loop {
            let mut batch = Batch::default();
            let mut owners = Vec::new();
            for (index, &(id, length)) in wanted.iter().enumerate() {
                let take = (length - at[index]).min(chunk - batch.tokens.len());
                let ends = take > 0 && at[index] + take == length;
                if take == 0 || (ends && owners.len() == max_rows) {
                    continue;
                }
                let tokens = &self.tokens(id)?[at[index]..at[index] + take];
                batch.tokens.extend(Batch::of(id, tokens, at[index] as u32).tokens);
                at[index] += take;
                if let (Some(last), Some(next)) = (batch.tokens.last_mut(), self.tokens(id)?.get(at[index])) {
                    last.next = next + 1;
                }
                if ends {
                    batch.rows.push(batch.tokens.len() as u32 - 1);
                    owners.push(index);
                }
            }
            if batch.tokens.is_empty() {
                break;
            }
            self.model.gpu().check_stop()?;
            let run = self.start(kind, &batch)?;
            let (number, stride) = (self.finished, self.stride(run));
            let mut encoder = self.model.gpu().encoder("prefill");
            if kind == ProgramKind::Watch {
                let rows = self.frame_tokens(&batch.tokens)?;
                let watched = self.watched(run, rows, false)?;
                self.record_watched(&watched, &mut encoder, 0);
            } else {
                self.record(run, &mut encoder, 1)?;
            }
            self.submit(encoder)?;
            if drafts {
                self.draft_behind(&batch, first_word(number, stride) as u64)?;
            }
            if !owners.is_empty() {
                waiting.push(Waiting { run: number, stride, owners });
            }
            submissions += 1;
            if submissions % FINISHED_STEPS == 0 {
                // Neither the ring nor the uploads in flight may grow without bound.
                self.collect(&mut waiting, &mut sampled)?;
            }
        }
        self.collect(&mut waiting, &mut sampled)?;
        if !drafts {
            self.end_drafts(sequences)?;
        }
        for (&id, &token) in sequences.iter().zip(&sampled) {
            let sequence = self.slots.get_mut(id)?;
            sequence.drafts.clear();
            sequence.cached = sequence.tokens.len();
            sequence.tokens.push(token);
        }
        Ok(sampled)
    }

    /// Samples `steps` tokens of each sequence without reading anything back in between. Each sequence must have been
    /// prefilled, so that only its last token was not run yet. Returns the tokens of each step, in the order of the
    /// sequences.
    pub fn decode(&mut self, sequences: &[SequenceId], steps: u32) -> Result<Vec<Vec<u32>>> {
        distinct(sequences)?;
        if steps == 0 || steps > MAX_BURST {
            return Err(Error::Batch { what: format!("{steps} decode steps, 1 to {MAX_BURST} are possible") });
        }
        let mut batch = Batch::default();
        let mut wanted = Vec::with_capacity(sequences.len());
        for (row, &id) in sequences.iter().enumerate() {
            let sequence = self.slots.get(id)?;
            let pending = sequence.tokens.len() - sequence.cached;
            let (&[.., last], 1) = (sequence.tokens.as_slice(), pending) else {
                return Err(Error::Pending { slot: id.slot(), pending, expected: "one (prefill first)" });
            };
            let position = sequence.cached as u32;
            batch.tokens.push(TokenInfo { id: last, position, sequence: id.slot(), next: 0 });
            batch.rows.push(row as u32);
            wanted.push((id, sequence.cached + steps as usize));
        }
        let kind = self.forward_kind();
        let drafts = self.ensure_with_drafts(&wanted, sequences.len())?;
        let run = self.start(kind, &batch)?;
        let first = self.finished;
        let mut watched = Vec::new();
        if kind == ProgramKind::Watch {
            let rows = self.frame_tokens(&batch.tokens)?;
            watched.push(self.watched(run, rows, false)?);
        }
        if drafts {
            watched.push(self.draft_of_next(&batch)?);
        }
        let mut done = 0;
        while done < steps {
            let runs = (steps - done).min(RUNS_PER_SUBMISSION);
            let mut encoder = self.model.gpu().encoder("decode");
            if watched.is_empty() {
                self.record(run, &mut encoder, runs)?;
            }
            for step in done..done + runs {
                for watched in &watched {
                    self.record_watched(watched, &mut encoder, step);
                }
            }
            self.submit(encoder)?;
            done += runs;
        }
        let ring = self.ring()?;
        let (stride, rows) = (self.stride(run), sequences.len());
        let mut steps_tokens = Vec::with_capacity(steps as usize);
        for step in 0..steps {
            let tokens = (0..rows).map(|row| self.entry(&ring, first.wrapping_add(step), stride, row));
            steps_tokens.push(tokens.collect::<Result<Vec<u32>>>()?);
        }
        if !drafts {
            self.end_drafts(sequences)?;
        }
        for (row, &id) in sequences.iter().enumerate() {
            let sequence = self.slots.get_mut(id)?;
            sequence.drafts.clear();
            sequence.tokens.extend(steps_tokens.iter().map(|tokens| tokens[row]));
            sequence.cached += steps as usize;
        }
        Ok(steps_tokens)
    }

    /// Words of one entry of the ring, for the program that ran.
    pub(crate) fn stride(&self, run: LastRun) -> usize {
        self.model.plan().programs[run.program].max_rows as usize
    }

    /// Reads waiting tokens into `sampled`.
    fn collect(&self, waiting: &mut Vec<Waiting>, sampled: &mut [u32]) -> Result<()> {
        if waiting.is_empty() {
            return self.model.gpu().wait();
        }
        let ring = self.ring()?;
        for entry in waiting.drain(..) {
            for (row, &owner) in entry.owners.iter().enumerate() {
                sampled[owner] = self.entry(&ring, entry.run, entry.stride, row)?;
            }
        }
        Ok(())
    }

    /// Waits for the device and reads the ring of finished tokens.
    fn ring(&self) -> Result<Vec<u32>> {
        Ok(self.ring_with(&[])?.remove(0))
    }

    /// The same, and behind it parts of other buffers (each from a byte, of so many).
    pub(crate) fn ring_with(&self, others: &[(&Buffer, u64, u64)]) -> Result<Vec<Vec<u32>>> {
        let plan_says = |what: String| Err(Error::Plan { what });
        let Some(buffer) = self.buffers.role(Role::Finished) else {
            return plan_says("its forward programs have no buffer of finished tokens".into());
        };
        let gpu = self.model.gpu();
        let sources = [&[(buffer, 0, buffer.bytes())], others].concat();
        let mut words = gpu.read(gpu.encoder("finished"), &sources)?;
        if words[0] != self.finished {
            return plan_says(format!("its forward programs counted {} steps, {} were run", words[0], self.finished));
        }
        let mut parts = Vec::with_capacity(sources.len());
        for (_, _, bytes) in sources {
            let rest = words.split_off((bytes / 4) as usize);
            parts.push(std::mem::replace(&mut words, rest));
        }
        Ok(parts)
    }

    fn entry(&self, ring: &[u32], run: u32, stride: usize, row: usize) -> Result<u32> {
        self.check_token(ring[first_word(run, stride) + row])
    }

    /// A token that the device drew.
    pub(crate) fn check_token(&self, token: u32) -> Result<u32> {
        if token == POISONED {
            return Err(Error::Poisoned);
        }
        let vocab_size = self.model.plan().model.vocab_size;
        if token >= vocab_size {
            return Err(Error::Plan { what: format!("it sampled token {token} of a vocabulary of {vocab_size}") });
        }
        Ok(token)
    }
}

/// Where the tokens of a run begin in the ring.
pub(crate) fn first_word(run: u32, stride: usize) -> usize {
    1 + (run % FINISHED_STEPS) as usize * stride
}

pub(crate) fn distinct(sequences: &[SequenceId]) -> Result<()> {
    if sequences.is_empty() {
        return Err(Error::Batch { what: "no sequences".into() });
    }
    match sequences.iter().enumerate().find(|(index, id)| sequences[..*index].contains(id)) {
        Some((_, id)) => Err(Error::Batch { what: format!("sequence {} is named twice", id.slot()) }),
        None => Ok(()),
    }
}
